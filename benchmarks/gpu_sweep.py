# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tilings of the experts' kernels on an NVIDIA Hopper GPU, by time on the device.

Each of a SwiGLU layer's products, against a dense product of as many FLOPs and
against the grouped products that JAX ships in `jax.experimental.pallas.ops.gpu`:

  python benchmarks/gpu_sweep.py --model_size=2048 --hidden_size=1408

What `grouped.matmul_tiling` and `grouped.outer_tiling` take is marked.
"""

import functools
import itertools
import json
import pathlib
import time
from typing import Any

import gpu_experts
import gpu_profile
import jax
import jax.numpy as jnp
from absl import app, flags
from jax.experimental.pallas.ops.gpu import (
  ragged_dot_mgpu,
  transposed_ragged_dot_mgpu,
)

from jaxroute.kernels.gpu import grouped

_ROWS = flags.DEFINE_integer("rows", 49_152, "N, tokens times K.")
_EXPERTS = flags.DEFINE_integer("experts", 64, "E.")
_MODEL_SIZE = flags.DEFINE_integer("model_size", 2048, "D.")
_HIDDEN_SIZE = flags.DEFINE_integer("hidden_size", 1408, "F.")
_LOAD = flags.DEFINE_string("load", "MaxVio 1", "One of `gpu_experts.loads`.")
_SECONDS = flags.DEFINE_integer("seconds", 150, "Begin nothing after so many.")

_JSON = flags.DEFINE_string("json", "", "Where to write the tables, too.")

_DTYPE = jnp.bfloat16
# Those that compile without spills. 256 columns and 4 stages fill shared memory.
_MATMUL = [(128, 128, 4), (128, 128, 6), (128, 192, 4), (128, 256, 4)]
_MATMUL += [(128, 256, 3), (256, 128, 4)]
_OUTER = [(128, 128, 4), (128, 128, 6), (128, 256, 4), (256, 128, 4)]
_WIDTHS = (1, 4, None)
# In pairs, too.
_IN_PAIRS = [(128, 128, 6), (128, 256, 4)]


def _tilings(
  shapes: list[tuple[int, int, int]], in_pairs: bool
) -> list[grouped.Tiling]:
  if in_pairs:
    shapes = [shape for shape in shapes if shape in _IN_PAIRS]
  return [
    grouped.Tiling(*shape, width, 2 if in_pairs else 1)
    for shape in shapes
    for width in _WIDTHS
  ]


def matmul(group_sizes: jax.Array, transpose_rhs: bool, in_pairs: bool) -> Any:
  """Candidates for `[N, D] x [E, D, F]`, or `[N, F]` times the transposes."""
  n, e = _ROWS.value, _EXPERTS.value
  d, f = _MODEL_SIZE.value, _HIDDEN_SIZE.value
  depth, columns = (f, d) if transpose_rhs else (d, f)
  keys = jax.random.split(jax.random.key(0))
  lhs = jax.random.normal(keys[0], (n, depth), _DTYPE)
  rhs = jax.random.normal(keys[1], (e, d, f), _DTYPE)
  chosen = grouped.matmul_tiling(columns)

  def dense(lhs, rhs, group_sizes):
    del group_sizes
    return lhs @ (rhs[0].T if transpose_rhs else rhs[0])

  def of_jax(width, lhs, rhs, group_sizes):
    blocks = dict(block_m=128, block_n=128, block_k=64, grid_block_n=width)
    return ragged_dot_mgpu.ragged_dot(
      lhs,
      rhs,
      group_sizes=group_sizes,
      transpose_rhs=transpose_rhs,
      max_concurrent_steps=4,
      **blocks,
    )

  calls = {"dense product": dense}
  calls |= {
    f"jax's ragged_dot, 128 x 128, width {w}": functools.partial(of_jax, w)
    for w in (1, 8)
  }
  # They stand in the tables of single blocks.
  calls = {} if in_pairs else calls
  calls |= {
    _name(tiling, chosen): functools.partial(
      grouped.matmul, dtype=_DTYPE, transpose_rhs=transpose_rhs, tiling=tiling
    )
    for tiling in _tilings(_MATMUL, in_pairs)
  }
  args = lhs, rhs, group_sizes
  return {name: (call, args) for name, call in calls.items()}


def outer(group_sizes: jax.Array, m: int, f: int, in_pairs: bool) -> Any:
  """Candidates for the transpose of `[N, m]` times `[N, f]`, by groups."""
  keys = jax.random.split(jax.random.key(0))
  lhs = jax.random.normal(keys[0], (_ROWS.value, m), _DTYPE)
  rhs = jax.random.normal(keys[1], (_ROWS.value, f), _DTYPE)
  chosen = grouped.outer_tiling(m, f)

  def dense(lhs, rhs, group_sizes):
    del group_sizes
    return lhs.T @ rhs

  def of_jax(lhs, rhs, group_sizes):
    blocks = dict(block_m=128, block_n=128, block_k=64, grid_block_n=1)
    return transposed_ragged_dot_mgpu.transposed_ragged_dot(
      lhs, rhs, group_sizes=group_sizes, max_concurrent_steps=4, **blocks
    )

  calls = {
    "dense product": dense,
    "jax's transposed_ragged_dot, 128 x 128": of_jax,
  }
  calls = {} if in_pairs else calls
  calls |= {
    _name(tiling, chosen): functools.partial(
      grouped.outer, dtype=_DTYPE, tiling=tiling
    )
    for tiling in _tilings(_OUTER, in_pairs)
  }
  args = lhs, rhs, group_sizes
  return {name: (call, args) for name, call in calls.items()}


def _name(tiling: grouped.Tiling, chosen: grouped.Tiling) -> str:
  m, n, stages, width, cluster = tiling
  pairs = ", in pairs" if cluster > 1 else ""
  mark = ", by default" if tiling == chosen else ""
  return f"{m} x {n}, {stages} stages, width {width or 'all'}{pairs}{mark}"


def main(argv: list[str]) -> None:
  """Prints two tables for each product."""
  del argv
  d, f = _MODEL_SIZE.value, _HIDDEN_SIZE.value
  sizes = gpu_experts.Sizes(n=_ROWS.value, e=_EXPERTS.value, d=d, f=f)
  group_sizes = jnp.asarray(gpu_experts.loads(sizes)[_LOAD.value])
  products = {
    "[N, D] x [E, D, F]": functools.partial(matmul, group_sizes, False),
    "[N, F] x [E, D, F] transposed": functools.partial(
      matmul, group_sizes, True
    ),
    "[N, D] transposed x [N, F]": functools.partial(outer, group_sizes, d, f),
    "[N, F] transposed x [N, D]": functools.partial(outer, group_sizes, f, d),
  }
  print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
  deadline = time.monotonic() + _SECONDS.value
  tables = {}

  def save(title, rows):
    tables[title] = rows
    if _JSON.value:
      pathlib.Path(_JSON.value).write_text(json.dumps(tables, indent=1))

  # Blocks in pairs come last: what hangs there loses nothing.
  for in_pairs, (title, product) in itertools.product(
    (False, True), products.items()
  ):
    how = ", in pairs" if in_pairs else ""
    table = gpu_profile.Table(
      f"{title}{how}, bfloat16, {sizes}, {_LOAD.value}",
      functools.partial(product, in_pairs),
      sizes.flops // 3,
    )
    gpu_profile.measure(table, deadline, save)


if __name__ == "__main__":
  app.run(main)
