# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What one call of `jaxroute.route` costs on a chip that is not here."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import presets as presets_lib
from jaxroute import routing as routing_lib
from jaxroute.aot import chips, gpu, process, tpu


def report(
  preset: presets_lib.Preset, tokens: int, topology: str
) -> dict[str, dict[str, Any]]:
  """Compiles the kernel and the plain XLA graph for one device.

  Args:
    preset: of the router.
    tokens: T.
    topology: as for `chips.devices`; its first device is compiled for.

  Returns:
    Implementation to figures by name. Of a TPU, the `Profile`, with
    `cycles_per_token`; of a GPU, the `Program`, and of its kernel that routes the
    figures of `Kernel`, with `instructions` for a warp of tokens.

  Raises:
    RuntimeError: if a compiler failed.
  """
  found = {}
  if chips.chip(topology).platform == "tpu":
    for name in ("pallas_tpu", "xla"):
      profile = tpu.profile(compile_for, preset, tokens, topology, name)
      found[name] = {
        "cycles_per_token": round(profile.cycles / tokens, 2),
        "hbm_bytes": profile.moved,
        "temporaries": profile.temporaries,
        "vmem": profile.vmem,
      }
    return found
  for name in ("pallas_gpu", "xla"):
    program = process.apart(_on_gpu, preset, tokens, topology, name)
    found[name] = {
      "launches": program.launches,
      "hbm_bytes": program.moved,
      "temporaries": program.temporaries,
    }
    for kernel in program.kernels:
      found[name] |= {
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
  def route(logits, expert_bias):
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
