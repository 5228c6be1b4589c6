# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A SwiGLU layer's experts on an NVIDIA GPU: memory, rows multiplied and time.

Against `jax.lax.ragged_dot`, and against one expert that gets all the rows:
dense products, of the layer's FLOPs. On a GPU it prints times:

  python benchmarks/gpu.py

Without one it compiles for the GPU that --target describes, given
jax-cuda13-pjrt and jax-cuda13-plugin. XLA has such files:
xla/backends/gpu/target_config/specs.

  python benchmarks/gpu.py --target=h100_sxm.txtpb
"""

import functools
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import timing
from absl import app, flags
from jax.experimental import topologies

from jaxroute import experts
from jaxroute.experts import batched

_TARGET = flags.DEFINE_string("target", "", "A GPU's description, to compile.")
_ROWS = flags.DEFINE_integer("rows", 49_152, "N, tokens times K.")
_EXPERTS = flags.DEFINE_integer("experts", 64, "E.")
_TOP_K = flags.DEFINE_integer("top_k", 6, "K; no expert gets more than N / K.")
_MODEL_SIZE = flags.DEFINE_integer("model_size", 512, "D.")
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 256, "F.")
_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed calls per candidate.")

CANDIDATES = {
  "dense": "ragged_dot",
  "jaxroute": "batched",
  "ragged_dot": "ragged_dot",
}


def loads() -> dict[str, np.ndarray]:
  """Name to group sizes, from even ones to the most uneven there are."""
  n, e = _ROWS.value, _EXPERTS.value
  shares = {
    "even": np.ones(e),
    "MaxVio 0.25": np.where(np.arange(e) < e // 2, 1.25, 0.75),
    "MaxVio 1": np.linspace(0.0, 2.0, e),
    "MaxVio 4": np.maximum(0.0, 5 - np.arange(e) * 12.5 / e),
    "K experts": np.arange(e) < _TOP_K.value,
  }
  sizes = {}
  for name, share in shares.items():
    ends = np.round(np.cumsum(share) / share.sum() * n)
    sizes[name] = np.diff(ends, prepend=0).astype(np.int32)
  return sizes


@jax.jit
def rows_multiplied(group_sizes: jax.Array) -> jax.Array:
  """Rows in the products of `implementation="batched"`, padding included."""

  def body(block, total):
    return total + block.index.size

  return batched.for_each_batch(body, jnp.int32(0), group_sizes, _ROWS.value)


def step(implementation, x, params, group_sizes, d_out):
  """Output and all gradients of the experts."""
  out, pull = jax.vjp(
    lambda x, params: experts.swiglu(
      x, params, group_sizes, implementation=implementation
    ),
    x,
    params,
  )
  return out, pull(d_out)


def arguments(name: str, dtype: jnp.dtype) -> tuple:
  """Shapes of `step`'s arguments, for one of the candidates."""
  n, d, f = _ROWS.value, _MODEL_SIZE.value, _HIDDEN_SIZE.value
  e = 1 if name == "dense" else _EXPERTS.value
  rows = jax.ShapeDtypeStruct((n, d), dtype)
  params = jax.eval_shape(
    lambda: experts.init_expert_params(jax.random.key(0), e, d, f, dtype)
  )
  return rows, params, jax.ShapeDtypeStruct((e,), jnp.int32), rows


def compiled(name: str, dtype: jnp.dtype, device: jax.Device):
  """`step` of a candidate, compiled for a device that need not be here."""
  sharding = jax.sharding.SingleDeviceSharding(device)
  args = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
    arguments(name, dtype),
  )
  call = jax.jit(functools.partial(step, CANDIDATES[name]))
  return call.lower(*args).compile()


def print_memory(programs: dict[str, dict]) -> None:
  """GB of temporaries, one column per dtype."""
  print("\n| temporaries, GB | " + " | ".join(programs) + " |")
  print("| --- " * (1 + len(programs)) + "|")
  for name in CANDIDATES:
    sizes = (
      p[name].memory_analysis().temp_size_in_bytes for p in programs.values()
    )
    print(f"| {name} | " + " | ".join(f"{s / 1e9:.2f}" for s in sizes) + " |")


def print_rows() -> None:
  """Rows multiplied for each that there is, one column per distribution."""
  sizes = loads()
  print("\n| rows multiplied per row | " + " | ".join(sizes) + " |")
  print("| --- " * (1 + len(sizes)) + "|")
  ours = (int(rows_multiplied(s)) / _ROWS.value for s in sizes.values())
  print("| jaxroute | " + " | ".join(f"{r:.2f}" for r in ours) + " |")
  theirs = f" {_EXPERTS.value} |" * len(sizes)
  print(f"| ragged_dot |{theirs}")


def print_times(programs: dict[str, dict]) -> None:
  """Medians of milliseconds, per dtype and distribution."""
  for dtype, by_name in programs.items():
    for title, sizes in loads().items():
      calls = {}
      for name, program in by_name.items():
        shapes = arguments(name, jnp.dtype(dtype))
        groups = np.int32([_ROWS.value]) if name == "dense" else sizes
        x, params, _, d_out = jax.tree.map(_random, shapes)
        args = jax.device_put((x, params, groups, d_out), jax.devices()[0])
        calls[name] = functools.partial(program, *args)
      medians = timing.interleaved_medians(calls, _REPEATS.value)
      timing.print_table(f"{dtype}, {title}", medians, "dense")


def _random(shape):
  return jax.random.normal(jax.random.key(0), shape.shape).astype(shape.dtype)


def the_device() -> jax.Device:
  """The GPU, or the one that --target describes.

  Raises:
    absl.app.UsageError: if there is neither.
  """
  if _TARGET.value:
    # The compiler works without CUDA, but looks for it unless told not to.
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")
    return topologies.get_topology_desc(
      platform="cuda",
      topology_name="",
      topology="1x1x1",
      target_config=pathlib.Path(_TARGET.value).read_text(),
    ).devices[0]
  device = jax.devices()[0]
  if device.platform != "gpu":
    raise app.UsageError(
      f"expected a GPU, found {device.platform}. Give --target to compile for"
      " one that is not here."
    )
  return device


def main(argv: list[str]) -> None:
  del argv
  device = the_device()
  print(
    f"jax {jax.__version__}, {device.device_kind}: SwiGLU with gradients,"
    f" N={_ROWS.value}, E={_EXPERTS.value}, D={_MODEL_SIZE.value},"
    f" F={_HIDDEN_SIZE.value}"
  )
  programs = {
    dtype: {
      name: compiled(name, jnp.dtype(dtype), device) for name in CANDIDATES
    }
    for dtype in ("bfloat16", "float32")
  }
  print_memory(programs)
  print_rows()
  if not _TARGET.value:
    print_times(programs)


if __name__ == "__main__":
  app.run(main)
