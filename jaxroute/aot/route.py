# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What one call of `jaxroute.route` costs on a chip that is not here."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import presets as presets_lib
from jaxroute import routing as routing_lib
from jaxroute.aot import chips, gpu, process, tpu


def implementations(topology: str) -> tuple[str, str]:
  """The kernel for a topology, and the plain XLA graph."""
  is_tpu = chips.chip(topology).platform == "tpu"
  return ("pallas_tpu" if is_tpu else "pallas_gpu"), "xla"


def report(
  preset: presets_lib.Preset, tokens: int, topology: str, implementation: str
) -> dict[str, Any]:
  """Compiles routing for one device, in a process of its own.

  Args:
    preset: of the router.
    tokens: T.
    topology: as for `chips.devices`; its first device is compiled for.
    implementation: as in `jaxroute.route`.

  Returns:
    Figures by name: of a TPU those of `tpu.Profile`, with cycles a token; of a GPU
    those of `gpu.Program`, and of its routing kernel those of `gpu.Kernel`, with
    the instructions of a warp.

  Raises:
    RuntimeError: if the compiler failed.
  """
  if chips.chip(topology).platform == "tpu":
    profile = tpu.profile(compile_for, preset, tokens, topology, implementation)
    return {
      "cycles_per_token": round(profile.cycles / tokens, 2),
      "hbm_bytes": profile.moved,
      "temporaries": profile.temporaries,
      "vmem": profile.vmem,
    }
  program = process.apart(_on_gpu, preset, tokens, topology, implementation)
  found = {
    "launches": program.launches,
    "hbm_bytes": program.moved,
    "temporaries": program.temporaries,
  }
  for kernel in program.kernels:
    found |= {
      "registers": kernel.registers,
      "shared_memory": kernel.shared_memory,
      "blocks_per_core": kernel.blocks_per_core,
      "instructions_per_warp": kernel.instructions,
    }
  return found


def compile_for(
  preset: presets_lib.Preset, tokens: int, topology: str, implementation: Any
) -> jax.stages.Compiled:
  """Routing, compiled for one TPU of a topology.

  Args:
    preset: of the router.
    tokens: T.
    topology: as for `chips.devices`.
    implementation: as in `jaxroute.route`.

  Returns:
    The program, of logits `[T, E]` and a bias `[E]`.
  """
  mesh = chips.make_mesh(chips.devices(topology)[:1], {"data": 1})
  whole = jax.NamedSharding(mesh, jax.P())
  shapes = [
    jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=whole)
    for s in _shapes(preset, tokens)
  ]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(_route(preset, implementation)).trace(*shapes)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def _on_gpu(
  preset: presets_lib.Preset, tokens: int, topology: str, implementation: Any
) -> gpu.Program:
  """The same for a GPU, read."""
  target = topology.partition(":")[0]
  function = _route(preset, implementation)
  return gpu.report(target, function, *_shapes(preset, tokens))


def _route(preset: presets_lib.Preset, implementation: Any) -> Any:
  def route(logits: jax.Array, expert_bias: jax.Array) -> Any:
    r = routing_lib.route(
      logits, expert_bias, preset.config, implementation=implementation
    )
    return r.expert_idx, r.weights, r.load, r.cutoff

  return route


def _shapes(
  preset: presets_lib.Preset, tokens: int
) -> list[jax.ShapeDtypeStruct]:
  e = preset.config.num_experts
  return [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((tokens, e), (e,))]
