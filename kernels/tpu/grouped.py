# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Grouped products on the matrix unit of TPUs.

`matmul` multiplies the rows of every group by the group's matrix, `outer` sums
over a group's rows. The form is that of `megablox` in
`jax.experimental.pallas.ops.tpu`: rows are cut into blocks, and the grid walks
visits, each to the rows of one group in one block, so that a block with the
ends of several groups is visited for each. Unlike there

- rows past the groups are written as 0, and no operand has to be cut evenly;
- rows of another group are replaced by 0 in both operands of `outer`, so that a
  NaN stays in its group;
- a matrix is read whole along the dimension that is summed over, so that no sum
  leaves the registers' side for another step of the grid;
- the results vary over the mesh axes of the operands, as `jax.shard_map` checks.

  kernel | grid | a step reads | and writes
  `matmul` | [columns, visits] | `[R, D]`, `[D, columns]` of a group | `[R, columns]`
  `outer` | [D, F, visits] | `[R, D part]`, `[R, F part]` | a group's `[D part, F part]`
"""

import functools
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref

# A group multiplies about as many in vain, and fewer do not fill the matrix unit:
# of the bundles that the compiler schedules for v6e, 128 rows keep it busy in 69%,
# 256 in 84%, 512 in 93%.
ROWS = 256
"""Rows of a block."""

# Bytes of the part of a matrix that is in memory, of which there are two.
_MATRIX_BYTES = 8 * 2**20
# Sums of `outer`, by rows and columns. Each is read and written in every step.
_OUTER_TILE = 2048, 1024
_MIN_ROWS = 128
# What the compiler needs beside blocks and sums.
_SPARE_BYTES = 16 * 2**20


def unsupported(num_rows: Any, widths: Iterable[int], dtype: Any) -> str | None:
  """Says why the kernels cannot multiply this.

  Args:
    num_rows: N.
    widths: the other sizes of rows and matrices, D and F.
    dtype: of the operands.

  Returns:
    The reason, for an error message; None if they can.
  """
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"the TPU kernel takes bfloat16 and float32, got {dtype}"
  if not isinstance(num_rows, int) or num_rows < _MIN_ROWS:
    return f"the TPU kernel takes {_MIN_ROWS} rows or more, got {num_rows}"
  most = _MATRIX_BYTES // (device.LANES * dtype.itemsize)
  for width in widths:
    if width % device.LANES or not 0 < width <= most:
      return (
        f"the TPU kernel takes widths in multiples of {device.LANES} up to {most},"
        f" got {width}"
      )
  return None


@functools.partial(
  jax.jit, static_argnames=("dtype", "transpose_rhs", "interpret")
)
def matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype: Any,
  transpose_rhs: bool = False,
  interpret: Any = False,
) -> jax.Array:
  """Multiplies every row by the matrix of the group that owns it.

  Args:
    lhs: `[N, D]`, in group order; not `unsupported`.
    rhs: `[E, D, F]`, the dtype of `lhs`; `[E, F, D]` if it is transposed.
    group_sizes: `[E]` int32. At most N in sum.
    dtype: of the result; static. Sums are float32.
    transpose_rhs: whether matrices are multiplied by as their transposes; static.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[N, F]`. Rows past the groups are 0, whatever they hold.
  """
  num_rows, depth = lhs.shape
  num_groups, width = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
  rows = min(ROWS, num_rows)
  most = _MATRIX_BYTES // (depth * rhs.dtype.itemsize)
  columns = _tile(width, most, device.num_cores())
  rest = num_rows - jnp.sum(group_sizes, dtype=jnp.int32)
  visits = _visits(jnp.append(group_sizes, rest), num_rows, rows)
  # Rows past the groups are visited to be written, and are not multiplied.
  is_group = visits.group < num_groups
  visits = visits._replace(
    group=jnp.minimum(visits.group, num_groups - 1),
    end=jnp.where(is_group, visits.end, visits.begin),
  )

  def rhs_index(column, i, visits):
    at = (column, 0) if transpose_rhs else (0, column)
    return visits.group[i], *at

  rhs_block = (columns, depth) if transpose_rhs else (depth, columns)
  call = _call(
    functools.partial(_matmul_kernel, transpose_rhs),
    grid=(pl.cdiv(width, columns), visits.group.size),
    in_specs=[
      pl.BlockSpec((rows, depth), lambda _, i, visits: (visits.block[i], 0)),
      pl.BlockSpec((None, *rhs_block), rhs_index),
    ],
    out_specs=pl.BlockSpec(
      (rows, columns), lambda column, i, visits: (visits.block[i], column)
    ),
    out=_like(lhs, (num_rows, width), dtype),
    flops=2 * num_rows * depth * width,
    interpret=interpret,
    name="jaxroute_grouped_matmul",
  )
  return call(visits, lhs, rhs)


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def outer(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype: Any,
  interpret: Any = False,
) -> jax.Array:
  """The transpose of every group's rows times its rows of another array.

  Args:
    lhs: `[N, D]`, in group order; not `unsupported`.
    rhs: `[N, F]`, the dtype of `lhs`.
    group_sizes: `[E]` int32. At most N in sum.
    dtype: of the result; static. Sums are float32.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[E, D, F]`; 0 for a group of no rows.
  """
  (num_rows, m), n = lhs.shape, rhs.shape[1]
  rows = min(ROWS, num_rows)
  most_m, most_n = _OUTER_TILE
  tile_m, tile_n = _tile(m, most_m, device.num_cores()), _tile(n, most_n)
  # A group of no rows is visited to be written.
  visits = _visits(group_sizes, num_rows, rows, least=1)
  call = _call(
    _outer_kernel,
    grid=(pl.cdiv(m, tile_m), pl.cdiv(n, tile_n), visits.group.size),
    in_specs=[
      pl.BlockSpec((rows, tile_m), lambda j, _, i, v: (v.block[i], j)),
      pl.BlockSpec((rows, tile_n), lambda _, k, i, v: (v.block[i], k)),
    ],
    out_specs=pl.BlockSpec(
      (None, tile_m, tile_n), lambda j, k, i, v: (v.group[i], j, k)
    ),
    out=_like(lhs, (group_sizes.size, m, n), dtype),
    scratch=[pltpu.VMEM((tile_m, tile_n), jnp.float32)],
    flops=2 * num_rows * m * n,
    interpret=interpret,
    name="jaxroute_grouped_outer",
  )
  return call(visits, lhs, rhs)


class _Visits(NamedTuple):
  """What the steps of a grid work on, `[visits]` int32 each.

  Attributes:
    group: whose rows.
    block: the number of the block of rows.
    begin: the first row of the block that is the group's.
    end: the row of the block after its last; `begin` if there is nothing to do.
  """

  group: Ref
  block: Ref
  begin: Ref
  end: Ref


def _visits(
  sizes: jax.Array, num_rows: int, rows: int, least: int = 0
) -> _Visits:
  """The visits to groups of some sizes, in order.

  Args:
    sizes: `[groups]` int32.
    num_rows: N.
    rows: of a block.
    least: how often a group of no rows is visited, 0 or 1.

  Returns:
    As many visits as there can be; the last ones visit the last group again, and
    have nothing to do.
  """
  num_blocks = pl.cdiv(num_rows, rows)
  ends = jnp.cumsum(sizes)
  begins = ends - sizes
  first = begins // rows
  counts = jnp.where(sizes > 0, (ends - 1) // rows - first + 1, least)
  num_up_to = jnp.cumsum(counts)
  # Every group but the first adds a visit at most, to the block where it begins.
  visit = jnp.arange(num_blocks + sizes.size - 1, dtype=jnp.int32)
  group = jnp.sum(num_up_to[None] <= visit[:, None], axis=1, dtype=jnp.int32)
  group = jnp.minimum(group, sizes.size - 1)
  is_here = group[:, None] == jnp.arange(sizes.size, dtype=jnp.int32)[None]

  def of_group(x):
    # A gather of so few takes longer than comparisons with all.
    return jnp.sum(jnp.where(is_here, x[None], 0), axis=1, dtype=jnp.int32)

  block = of_group(first - num_up_to + counts) + visit
  begin = jnp.clip(of_group(begins) - block * rows, 0, rows)
  end = jnp.clip(of_group(ends) - block * rows, begin, rows)
  return _Visits(group, jnp.minimum(block, num_blocks - 1), begin, end)


def _tile(size: int, most: int, cores: int = 1) -> int:
  """A multiple of 128 near `most` whose multiples exceed `size` the least.

  There are as many tiles as cores share the work, if there can be.
  """
  lanes = device.LANES
  most = max(min(most, size // cores) // lanes, 1)
  tiles = range((most + 1) // 2 * lanes, most * lanes + 1, lanes)
  return min(tiles, key=lambda tile: (pl.cdiv(size, tile) * tile, -tile))


def _like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
  """The shape of a result that varies over the mesh axes of an operand."""
  varying = jax.typeof(x).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def _is_new(ref: Ref, i: jax.Array) -> jax.Array:
  """Whether a step has another number than the step before."""
  return (i == 0) | (ref[i] != ref[jnp.maximum(i - 1, 0)])


def _has_rows(visits: _Visits, i: jax.Array) -> jax.Array:
  return visits.begin[i] < visits.end[i]


def _is_owned(visits: _Visits, i: jax.Array, shape: Any) -> jax.Array:
  row = lax.broadcasted_iota(jnp.int32, shape, 0)
  return (visits.begin[i] <= row) & (row < visits.end[i])


def _matmul_kernel(
  transpose_rhs: bool, visits: _Visits, lhs: Ref, rhs: Ref, out: Ref
) -> None:
  """Writes the products of one visit into the rows of a block."""
  i = pl.program_id(1)

  @pl.when(_is_new(visits.block, i))
  def _():
    out[...] = jnp.zeros_like(out)

  @pl.when(_has_rows(visits, i))
  def _():
    contracted = (1,), (1 if transpose_rhs else 0,)
    product = lax.dot_general(
      lhs[...],
      rhs[...],
      (contracted, ((), ())),
      preferred_element_type=jnp.float32,
    )
    others = out[...].astype(jnp.float32)
    is_owned = _is_owned(visits, i, out.shape)
    out[...] = jnp.where(is_owned, product, others).astype(out.dtype)


def _outer_kernel(
  visits: _Visits, lhs: Ref, rhs: Ref, out: Ref, total: Ref
) -> None:
  """Adds the rows of one visit to the sums of their group."""
  i = pl.program_id(2)
  last = pl.num_programs(2) - 1
  is_new = _is_new(visits.group, i)

  # Sums start here, at no cost: to fill them with 0 before would take as long as
  # to store them after. A group of no rows multiplies what is masked.
  @pl.when(is_new | _has_rows(visits, i))
  def _():
    a, b = (
      jnp.where(_is_owned(visits, i, ref.shape), ref[...], 0)
      for ref in (lhs, rhs)
    )
    total[...] = jnp.where(is_new, 0, total[...]) + lax.dot_general(
      a, b, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )

  @pl.when((i == last) | _is_new(visits.group, jnp.minimum(i + 1, last)))
  def _():
    out[...] = total[...].astype(out.dtype)


def _call(
  kernel: Any,
  *,
  grid: tuple[int, ...],
  in_specs: list[pl.BlockSpec],
  out_specs: pl.BlockSpec,
  out: jax.ShapeDtypeStruct,
  flops: int,
  interpret: Any,
  name: str,
  scratch: Any = (),
) -> Any:
  """A call of a kernel whose first operand is the visits."""

  def call(visits, lhs, rhs):
    blocks = zip((*in_specs, out_specs), (lhs, rhs, out), strict=True)
    sizes = [_size(spec.block_shape, x.dtype) for spec, x in blocks]
    sums = [_size(x.shape, x.dtype) for x in scratch]
    moved = [x.size * x.dtype.itemsize for x in (lhs, rhs, out)]
    return pl.pallas_call(
      kernel,
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=grid,
        in_specs=in_specs,
        out_specs=out_specs,
        scratch_shapes=scratch,
      ),
      out_shape=out,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel",) * (len(grid) - 1) + ("arbitrary",),
        # Every block is there twice, while one is worked on.
        vmem_limit_bytes=2 * sum(sizes) + sum(sums) + _SPARE_BYTES,
      ),
      cost_estimate=pl.CostEstimate(
        flops=flops, bytes_accessed=sum(moved), transcendentals=0
      ),
      interpret=interpret,
      name=name,
    )(visits, lhs, rhs)

  return call


def _size(shape: Any, dtype: Any) -> int:
  size = jnp.dtype(dtype).itemsize
  for n in shape:
    size *= n or 1
  return size
