# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Grouped products on the tensor cores of NVIDIA Hopper, in Mosaic GPU.

`matmul` multiplies the rows of every group by the group's matrix, `outer` sums
over a group's rows. A block of threads makes one tile of the result after the
other. One warpgroup moves operands to shared memory, 64 of the dimension that
is summed over at a time and four steps ahead; two warpgroups multiply, each
one half of the tile's rows, and hold float32 sums in registers. A tile of 128 x
256 is read for 85 operations per byte, one of 128 x 128 for 64.

The form is that of `hopper_matmul_mgpu`, `ragged_dot_mgpu` and
`transposed_ragged_dot_mgpu` in `jax.experimental.pallas.ops.gpu`, whose grouped
products know no float32 result, leave rows past the groups unwritten, and let a
NaN of one group reach the gradient of the next. Here

- which tile is of which group is computed once, before the kernel, and not
  anew for every tile, by a search over all groups;
- a tile starts at the group's first row, rounded down to a multiple of 8, as
  copies have to, so that a group has half a tile of padding and not a whole one;
- tiles of rows past the groups are not multiplied, and are written as 0;
- rows of another group are replaced by 0, in both operands, where they are
  summed over.
"""

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jaxroute.kernels.gpu import device, row_tiles
from jaxroute.kernels.gpu.mosaic import plgpu
from jaxroute.kernels.gpu.row_tiles import PACK

# One swizzled row of 16-bit operands, 128 bytes.
_STEP = 64
# Rows of the result that are stored at a time.
_PIECE = 64
_PIECE_BYTES = 128
_MIN_SIZE = 128
# How much more work may be done in tiles of 128 x 256 than in those of 128 x 128.
_WORTH = 9 / 8
_INTERPRETED_CORES = 2
# What the pipeline asks for: the registers of a thread that only moves data.
_MEMORY_REGISTERS = 40


class Tiling(NamedTuple):
  """How a result is cut into tiles.

  Attributes:
    m: rows of a tile, a multiple of 128.
    n: columns of a tile, a multiple of 64; of 128 for `outer`. A thread holds
      m n / 256 sums.
    stages: steps that are in shared memory at a time.
    width: columns of tiles, or of clusters of them, that are walked before the
      next row; None for all.
    cluster: tiles side by side that are made at once, by as many blocks: in a
      row of `matmul`, in a column of `outer`. They share what they have in
      common, of which each loads a part for all.
  """

  m: int
  n: int
  stages: int = 4
  width: int | None = None
  cluster: int = 1


def unsupported(num_rows: Any, widths: Iterable[int], dtype: Any) -> str | None:
  """Says why the kernels cannot multiply this.

  Args:
    num_rows: N.
    widths: the other sizes of rows and matrices, D and F.
    dtype: of the operands.

  Returns:
    The reason, for an error message; None if they can.
  """
  if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
    return f"the GPU kernel takes bfloat16 and float16, got {jnp.dtype(dtype)}"
  if not isinstance(num_rows, int):
    return f"the GPU kernel needs a number of rows, got {num_rows}"
  sizes = [("a number of rows", num_rows, PACK)]
  sizes += [("a width", width, _STEP) for width in widths]
  for what, size, unit in sizes:
    if size < _MIN_SIZE or size % unit:
      return (
        f"the GPU kernel takes {what} of {_MIN_SIZE} or more, in multiples of {unit},"
        f" got {size}"
      )
  return None


def matmul_tiling(n: int) -> Tiling:
  """The tiling of `matmul` for a result of n columns."""
  return _least_work(1, n, [Tiling(128, 256)])


def outer_tiling(m: int, n: int) -> Tiling:
  """The tiling of `outer` for results of m x n."""
  return _least_work(m, n, [Tiling(128, 256), Tiling(256, 128)])


def _least_work(m: int, n: int, large: list[Tiling]) -> Tiling:
  """The large tiling that sticks out least, if its tiles are worth that."""

  def work(tiling: Tiling) -> int:
    return pl.cdiv(m, tiling.m) * tiling.m * pl.cdiv(n, tiling.n) * tiling.n

  best, small = min(large, key=work), Tiling(128, 128)
  return best if work(best) <= _WORTH * work(small) else small


@functools.partial(
  jax.jit, static_argnames=("dtype", "transpose_rhs", "tiling", "interpret")
)
def matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype: Any,
  transpose_rhs: bool = False,
  tiling: Tiling | None = None,
  interpret: Any = None,
) -> jax.Array:
  """Multiplies every row by the matrix of the group that owns it.

  Args:
    lhs: `[N, D]` bfloat16 or float16, in group order; not `unsupported`.
    rhs: `[E, D, F]`, the dtype of `lhs`; `[E, F, D]` if it is transposed.
    group_sizes: `[E]` int32. At most N in sum.
    dtype: of the result; static. Sums are float32.
    transpose_rhs: whether matrices are multiplied by as their transposes; static.
    tiling: None for that of `matmul_tiling`; static.
    interpret: what `plgpu.kernel` takes; static.

  Returns:
    `[N, F]`. Rows past the groups are 0, whatever they hold.
  """
  num_rows, depth = lhs.shape
  num_groups, n = rhs.shape[0], rhs.shape[1 if transpose_rhs else 2]
  tiling = tiling or matmul_tiling(n)
  stages = min(tiling.stages, depth // _STEP)
  blocks_n = pl.cdiv(n, tiling.n * tiling.cluster)
  tiles = row_tiles.row_tiles_of(group_sizes, num_rows, tiling.m)
  if transpose_rhs:
    rhs_spec = plgpu.BlockSpec((tiling.n, _STEP), lambda k: (0, k))
  else:
    rhs_spec = plgpu.BlockSpec((_STEP, tiling.n), lambda k: (k, 0))
  lhs_spec = plgpu.BlockSpec(
    (tiling.m, _STEP), lambda k: (0, k), collective_axes=_shared_by(tiling)
  )
  pipeline = functools.partial(_pipeline, [lhs_spec, rhs_spec], stages)
  half = tiling.m // 2

  def make_tile(index, tiles, lhs, rhs, out, scratch):
    group, start, begin, end = (ref[index[0]] for ref in tiles[:4])
    start = pl.multiple_of(start, PACK)
    columns = pl.ds(index[1] * tiling.n, tiling.n)
    warpgroup = lax.axis_index("warpgroup")

    def multiply(_, lhs_smem, rhs_smem, acc):
      rows = pl.ds(pl.multiple_of(warpgroup * half, half), half)
      if transpose_rhs:
        rhs_smem = rhs_smem.transpose((1, 0))
      plgpu.wgmma(acc, lhs_smem.at[rows], rhs_smem)
      plgpu.wgmma_wait(0)
      return acc

    def store(smem, row, column):
      row += warpgroup * half
      first = jnp.clip(begin - row, 0, _PIECE)
      count = jnp.clip(end - row, 0, _PIECE) - first
      columns = pl.ds(index[1] * tiling.n + column, smem.shape[1])
      _store_rows(smem, out.at[:, columns], start + row, first, count)

    group_rhs = rhs.at[jnp.minimum(group, num_groups - 1)]
    pipeline(
      multiply,
      functools.partial(_sum_and_store, tiling, dtype, scratch.out, store),
      lax.select(group < num_groups, jnp.int32(depth // _STEP), jnp.int32(0)),
    )(
      lhs.at[pl.ds(start, tiling.m), :],
      group_rhs.at[columns, :] if transpose_rhs else group_rhs.at[:, columns],
      allocations=scratch.pipeline,
    )

  def body(*refs):
    *tiles, lhs, rhs, out = refs
    grid = tiles[-1][0], blocks_n

    def run(scratch):
      @plgpu.nd_loop((grid[0] * grid[1],), collective_axes="core")
      def _(info):
        index = plgpu.planar_snake(
          info.index[0], grid, 1, tiling.width or blocks_n
        )
        index = index[0], _of_cluster(tiling, index[1])
        make_tile(index, tiles, lhs, rhs, out, scratch)

    _run_with_scratch(run, pipeline, (lhs, rhs.at[0]), dtype)

  shape = num_rows, n
  return _call(
    "matmul", body, tiles, lhs, rhs, shape, dtype, tiling.cluster, interpret
  )


@functools.partial(jax.jit, static_argnames=("dtype", "tiling", "interpret"))
def outer(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  dtype: Any,
  tiling: Tiling | None = None,
  interpret: Any = None,
) -> jax.Array:
  """The transpose of every group's rows times its rows of another array.

  Args:
    lhs: `[N, D]` bfloat16 or float16, in group order; not `unsupported`.
    rhs: `[N, F]`, the dtype of `lhs`.
    group_sizes: `[E]` int32. At most N in sum.
    dtype: of the result; static. Sums are float32.
    tiling: None for that of `outer_tiling`; static.
    interpret: what `plgpu.kernel` takes; static.

  Returns:
    `[E, D, F]`; 0 for a group of no rows.
  """
  (num_rows, m), n = lhs.shape, rhs.shape[1]
  tiling = tiling or outer_tiling(m, n)
  grid = pl.cdiv(m, tiling.m * tiling.cluster), pl.cdiv(n, tiling.n)
  groups = row_tiles.groups_of(group_sizes)
  specs = [
    plgpu.BlockSpec((_STEP, size), lambda k: (k, 0), collective_axes=axes)
    for size, axes in ((tiling.m, ()), (tiling.n, _shared_by(tiling)))
  ]
  pipeline = functools.partial(_pipeline, specs, tiling.stages)
  half_m, half_n = tiling.m // 2, tiling.n // 2

  def make_tile(group, index, groups, lhs, rhs, out, scratch):
    start, begin, end = (ref[group] for ref in groups)
    start = pl.multiple_of(start, PACK)
    warpgroup = lax.axis_index("warpgroup")

    def multiply(step, lhs_smem, rhs_smem, acc):
      half = pl.ds(pl.multiple_of(warpgroup * half_m, half_m), half_m)
      lhs_smem = lhs_smem.at[:, half]
      first = start + step[0] * _STEP

      @pl.when((first < begin) | (first + _STEP > end))
      def _():
        half = pl.ds(pl.multiple_of(warpgroup * half_n, half_n), half_n)
        for ref in (lhs_smem, rhs_smem.at[:, half]):
          _keep_rows(ref, begin - first, end - first)
        plgpu.commit_smem()
        # Each warpgroup multiplies by what both have masked.
        plgpu.barrier_arrive(scratch.masked)
        plgpu.barrier_wait(scratch.masked)

      plgpu.wgmma(acc, lhs_smem.transpose((1, 0)), rhs_smem)
      plgpu.wgmma_wait(0)
      return acc

    def store(smem, row, column):
      row += index[0] * tiling.m + warpgroup * half_m
      column += index[1] * tiling.n
      rows, columns = pl.ds(row, _PIECE), pl.ds(column, smem.shape[1])
      plgpu.copy_smem_to_gmem(
        smem, out.at[group, rows, columns], commit_group=False
      )

    pipeline(
      multiply,
      functools.partial(_sum_and_store, tiling, dtype, scratch.out, store),
      lax.select(begin < end, pl.cdiv(end - start, _STEP), jnp.int32(0)),
    )(
      lhs.at[pl.ds(start, num_rows), pl.ds(index[0] * tiling.m, tiling.m)],
      rhs.at[pl.ds(start, num_rows), pl.ds(index[1] * tiling.n, tiling.n)],
      allocations=scratch.pipeline,
    )

  def body(*refs):
    *groups, lhs, rhs, out = refs

    def run(scratch):
      @plgpu.nd_loop(
        (len(group_sizes), grid[0] * grid[1]), collective_axes="core"
      )
      def _(info):
        group, tile = info.index
        index = plgpu.planar_snake(tile, grid, 1, tiling.width or grid[1])
        index = _of_cluster(tiling, index[0]), index[1]
        make_tile(group, index, groups, lhs, rhs, out, scratch)

    _run_with_scratch(run, pipeline, (lhs, rhs), dtype)

  shape = len(group_sizes), m, n
  return _call(
    "outer", body, groups, lhs, rhs, shape, dtype, tiling.cluster, interpret
  )


class _Scratch(NamedTuple):
  """What a block of threads has in shared memory.

  Attributes:
    pipeline: operands and barriers of the pipeline.
    out: `[2, 2, rows, columns]`: for either warpgroup, two pieces of the result.
    masked: the barrier at which the two meet.
  """

  pipeline: Any
  out: Any
  masked: Any


def _pipeline(
  specs: list[Any], stages: int, body: Any, context: Any, steps: Any
) -> Any:
  return plgpu.emit_pipeline_warp_specialized(
    body,
    grid=(steps,),
    memory_registers=_MEMORY_REGISTERS,
    in_specs=specs,
    wg_axis="warpgroup",
    num_compute_wgs=2,
    max_concurrent_steps=stages,
    compute_context=context,
  )


def _run_with_scratch(
  run: Callable[[_Scratch], None], pipeline: Any, operands: Any, dtype: Any
) -> None:
  """Calls a function with shared memory, and waits for what it has stored."""
  stages = pipeline.args[1]
  columns = _PIECE_BYTES // jnp.dtype(dtype).itemsize

  def scope(**scratch):
    run(_Scratch(**scratch))
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

  pl.run_scoped(
    scope,
    # Memory does not depend on what is done in it.
    pipeline=pipeline(_ignore, _ignore, stages).get_allocations(*operands),
    out=plgpu.SMEM((2, 2, _PIECE, columns), dtype),
    masked=plgpu.Barrier(num_arrivals=2),
    collective_axes="warpgroup",
  )


def _shared_by(tiling: Tiling) -> tuple[str, ...]:
  """The axes of blocks for which one loads what all need."""
  return ("cluster",) if tiling.cluster > 1 else ()


def _of_cluster(tiling: Tiling, index: Any) -> Any:
  """Which of the tiles that a cluster makes at once is of this block."""
  if tiling.cluster == 1:
    return index
  return index * tiling.cluster + lax.axis_index("cluster")


def _ignore(*args: Any, **kwargs: Any) -> None:
  del args, kwargs


def _sum_and_store(
  tiling: Tiling, dtype: Any, out_smem: Any, store: Any, run_pipeline: Any
) -> None:
  """Runs the pipeline on sums of 0 and stores them, a piece after the other.

  `store` is called with a piece in shared memory, and the row and the column
  that it has in the warpgroup's half of the tile.
  """
  rows, columns = tiling.m // 2, out_smem.shape[-1]
  out_smem = out_smem.at[lax.axis_index("warpgroup")]

  @functools.partial(
    pl.run_scoped, acc=plgpu.ACC((rows, tiling.n), jnp.float32)
  )
  def _(acc):
    run_pipeline(acc)
    total = acc[...].astype(dtype)
    corners = itertools.product(
      range(0, rows, _PIECE), range(0, tiling.n, columns)
    )
    for number, (row, column) in enumerate(corners):
      smem = out_smem.at[number % 2]
      # What was here has been read: all of the tile before, of this one all but
      # the last piece.
      plgpu.wait_smem_to_gmem(min(number, 1), wait_read_only=True)
      smem[...] = total[row : row + _PIECE, column : column + columns]
      plgpu.commit_smem()
      store(smem, row, column)
      plgpu.commit_smem_to_gmem_group()


def _store_rows(
  smem: Any, out: Any, row: jax.Array, first: jax.Array, count: jax.Array
) -> None:
  """Stores some rows of a piece: as many copies as `count` has bits set.

  The size of a copy is static, and the number of rows is not.
  """
  size = _PIECE
  while size:

    @pl.when(count & size != 0)
    def _(size=size, first=first):
      plgpu.copy_smem_to_gmem(
        smem.at[pl.ds(first, size)],
        out.at[pl.ds(row + first, size)],
        commit_group=False,
      )

    first += count & size
    size //= 2


def _keep_rows(ref: Any, begin: jax.Array, end: jax.Array) -> None:
  """Replaces rows before `begin` and from `end` on by 0."""
  row = plgpu.layout_cast(
    lax.broadcasted_iota(jnp.int32, ref.shape, 0), plgpu.Layout.WGMMA
  )
  values = ref[...]
  is_kept = (begin <= row) & (row < end)
  ref[...] = jnp.where(is_kept, values, jnp.zeros_like(values))


def _call(
  name: str,
  body: Any,
  table: Iterable[jax.Array],
  lhs: jax.Array,
  rhs: jax.Array,
  shape: tuple[int, ...],
  dtype: Any,
  cluster: int,
  interpret: Any,
) -> jax.Array:
  # Every core is a thread of the interpreter.
  cores = _INTERPRETED_CORES if interpret else device.num_cores()
  blocks: dict[str, Any] = {}
  if cluster > 1:
    blocks = dict(cluster=(cluster,), cluster_names=("cluster",))
  kernel = plgpu.kernel(
    body,
    out_type=jax.ShapeDtypeStruct(shape, dtype),
    grid=(cores // cluster,),
    grid_names=("core",),
    **blocks,
    num_threads=3,
    thread_name="warpgroup",
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup
    ),
    kernel_name=f"jaxroute_{name}",
    interpret=interpret,
  )
  return kernel(*table, lhs, rhs)
