# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What one thread of a GPU does that Pallas has no operation for.

The kernels work on blocks of 128 threads, four warps of 32. An array is spread over
these so that a thread holds a row of it: `[128]` is one number for each thread,
`[128, W]` are W numbers for each. What follows are the operations on such arrays that
look things up by an index of a thread's own, or exchange them within a warp, or have to
round as XLA's programs for GPUs do. `twins.py` has all of them in plain JAX, for
Pallas's interpreter.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mosaic
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, memref, nvvm, vector
from jaxlib.mlir.dialects import gpu as gpu_dialect
from jaxlib.mlir.dialects import math as math_dialect

from jaxroute.kernels.gpu.mosaic import plgpu

THREADS = 128
"""Threads of a block, and rows of an array in its registers."""

WARP = 32
"""Threads of a warp."""

Ref = Any
# A scalar that a thread holds, while Mosaic's code is made.
Value = Any


def by_row(vector_size: int) -> Any:
  """The layout of `[128, W]` by which a thread holds a row.

  Args:
    vector_size: numbers that a register holds of it.

  Returns:
    A Pallas layout.
  """
  return plgpu.Layout.TCGEN05_TMEM_NATIVE(vector_size)


ROW = by_row(1).reduce(1)
"""The layout of `[128]`: a number for each thread."""


def full(value: Any, dtype: Any = jnp.float32) -> jax.Array:
  """`[128]` of one value."""
  return plgpu.layout_cast(jnp.full((THREADS,), value, dtype), ROW)


def columns(x: jax.Array) -> list[jax.Array]:
  """The columns `[128]` of `[128, W]`, without moving anything."""
  x = plgpu.layout_cast(x, by_row(1))
  return [jnp.max(x[:, j : j + 1], axis=1) for j in range(x.shape[1])]


def widen(x: jax.Array, width: int) -> jax.Array:
  """`[128, W]` of W equal columns."""
  x = lax.broadcast_in_dim(x, (THREADS, width), (0,))
  return plgpu.layout_cast(x, by_row(4))


def as_words(flags: jax.Array) -> jax.Array:
  """`[128]` int32, 1 where a bool is True."""
  return jnp.where(flags, 1, 0)


class Threads:
  """The operations, in instructions of the GPU. Methods take and return `[128]`."""

  def index(self) -> jax.Array:
    """int32: 0 to 127."""

    @plgpu.inline_mgpu(return_type=_row_type(jnp.int32))
    def run(ctx: Any) -> Any:
      del ctx
      return _row_of(_thread(), jnp.int32)

    return run()

  def block_barrier(self) -> None:
    """Waits for all threads of the block; they then see what each has written."""

    # LLVM takes this instruction for convergent and does not copy it into the arms
    # of a branch. The barrier of a warpgroup in Mosaic is inline assembly, which it
    # copies: threads that take different arms then wait for ever.
    @plgpu.inline_mgpu()
    def run(ctx: Any) -> None:
      del ctx
      gpu_dialect.barrier()

    run()

  def warp_barrier(self) -> None:
    """Waits for the threads of the warp, and shows them what each has written."""

    @plgpu.inline_mgpu()
    def run(ctx: Any) -> None:
      del ctx
      nvvm.bar_warp_sync(_int32(-1))

    run()

  def shuffle_xor(self, x: jax.Array, distance: int) -> jax.Array:
    """`x` of the thread whose number differs in the bits of `distance`, below 32."""

    def shuffle(value: Value) -> Value:
      is_word = value.type == _i32()
      word = value if is_word else arith.bitcast(_i32(), value)
      word = nvvm.shfl_sync(
        _int32(-1), word, _int32(distance), _int32(31), nvvm.ShflKind.bfly
      )
      return word if is_word else arith.bitcast(value.type, word)

    return _elementwise(shuffle, x)

  def ballot(self, flags: jax.Array) -> jax.Array:
    """int32: bit i is whether `flags`, int32, is not 0 in thread i of the warp."""

    def vote(value: Value) -> Value:
      predicate = arith.cmpi(arith.CmpIPredicate.ne, value, _int32(0))
      kind = nvvm.VoteSyncKind.ballot
      return nvvm.vote_sync(_int32(-1), predicate, kind)

    return _elementwise(vote, flags)

  def any(self, flags: jax.Array) -> jax.Array:
    """int32 scalar: whether `flags`, int32, is not 0 in any thread of the warp.

    Interpreted, of the block: let nothing but work that is not needed depend on it.
    """
    layout = plgpu.Layout.WG_SPLAT(())

    @plgpu.inline_mgpu(
      arg_types=(ROW,),
      return_type=plgpu.ShapeDtypeStruct((), jnp.int32, layout=layout),
    )
    def run(ctx: Any, flags: Any) -> Any:
      del ctx
      ne = arith.CmpIPredicate.ne
      predicate = arith.cmpi(ne, _scalar(flags), _int32(0))
      vote = nvvm.vote_sync(_int32(-1), predicate, nvvm.VoteSyncKind.any)
      return mosaic.FragmentedArray.splat(
        arith.extui(_i32(), vote), (), is_signed=True
      )

    return run(flags)

  def count_bits(self, x: jax.Array) -> jax.Array:
    """The number of ones of int32."""
    return _elementwise(math_dialect.ctpop, x)

  def transpose_bits(self, x: jax.Array) -> jax.Array:
    """Bit i of thread j becomes bit j of thread i, in every warp; int32."""

    def transpose(value: Value) -> Value:
      lane = arith.remui(_thread(), _int32(WARP))
      for distance, mask in (
        (16, 0x0000FFFF),
        (8, 0x00FF00FF),
        (4, 0x0F0F0F0F),
        (2, 0x33333333),
        (1, 0x55555555),
      ):
        other = nvvm.shfl_sync(
          _int32(-1), value, _int32(distance), _int32(31), nvvm.ShflKind.bfly
        )
        is_upper = arith.cmpi(
          arith.CmpIPredicate.ne,
          arith.andi(lane, _int32(distance)),
          _int32(0),
        )
        # Bits that stay; the others come from as many places above or below.
        own = arith.select(is_upper, _int32(~mask), _int32(mask))
        turn = arith.select(is_upper, _int32(WARP - distance), _int32(distance))
        other = llvm.intr_fshl(other, other, turn)
        # Of three operations on bits, which are one instruction.
        difference = arith.andi(arith.xori(value, other), own)
        value = arith.xori(difference, other)
      return value

    return _elementwise(transpose, x)

  def gather(self, ref: Ref, index: jax.Array) -> jax.Array:
    """`ref[index]` of a vector in memory; int32 for bools. No index may be outside."""
    dtype = jnp.int32 if ref.dtype == jnp.bool_ else ref.dtype

    @plgpu.inline_mgpu(
      arg_types=(plgpu.RefType(), ROW), return_type=_row_type(dtype)
    )
    def run(ctx: Any, ref: Any, index: Any) -> Any:
      del ctx
      return _row_of(memref.load(ref, [_as_index(_scalar(index))]), dtype)

    return run(ref, index)

  def scatter(
    self, ref: Ref, index: jax.Array, value: jax.Array, keep: jax.Array | None
  ) -> None:
    """`ref[index] = value`, where `keep`, int32, is not 0 or is None."""

    def store(
      ref: Value, index: Value, value: Value, predicate: Value | None
    ) -> None:
      if predicate is not None:
        _store_if(predicate, ref, index, value)
        return
      if ir.MemRefType(ref.type).element_type == _integer(1):
        value = arith.trunci(_integer(1), value)
      memref.store(value, ref, [index])

    _scatter(store, ref, index, value, keep)

  def add_to(
    self, ref: Ref, index: jax.Array, value: jax.Array, keep: jax.Array
  ) -> None:
    """`ref[index] += value` where `keep`, int32, is not 0.

    In global memory, int32, for all blocks at once: sums of integers do not depend
    on the order.
    """

    def add(ref: Value, index: Value, value: Value, predicate: Value) -> None:
      address = llvm.ptrtoint(_integer(64), _address(ref, index, _i32()))
      # One instruction, no branch.
      llvm.inline_asm(
        ir.Type.parse("!llvm.void"),
        [predicate, address, value],
        "@$0 red.relaxed.gpu.global.add.s32 [$1], $2;",
        "b,l,r,~{memory}",
        has_side_effects=True,
      )

    _scatter(add, ref, index, value, keep)

  def gather_rows(self, ref: Ref, start: jax.Array, width: int) -> jax.Array:
    """`[128, W]` float32: `ref[start : start + W]`; starts are multiples of 4."""
    layout = by_row(4)

    @plgpu.inline_mgpu(
      arg_types=(plgpu.RefType(), ROW),
      return_type=plgpu.ShapeDtypeStruct(
        (THREADS, width), jnp.float32, layout=layout
      ),
    )
    def run(ctx: Any, ref: Any, start: Any) -> Any:
      del ctx
      index, begin = ir.IndexType.get(), _as_index(_scalar(start))
      quad = ir.VectorType.get((4,), ir.F32Type.get())
      tiled = layout.to_mgpu()
      registers = np.empty(tiled.registers_shape((THREADS, width)), object)
      for i in range(width // 4):
        offset = arith.addi(begin, arith.constant(index, 4 * i))
        registers.reshape(-1)[i] = vector.load(quad, ref, [offset])
      return mosaic.FragmentedArray(
        _registers=registers, _layout=tiled, _is_signed=None
      )

    return run(ref, start)

  def reciprocal(self, x: jax.Array) -> jax.Array:
    """An approximate inverse; of any shape, as are the next four."""
    return _assembly("rcp.approx.ftz.f32", x)

  def scale(self, x: jax.Array, factor: float) -> jax.Array:
    """`x * factor`, rounded before anything is added to it, as XLA does."""
    word = int(np.float32(factor).view(np.uint32))
    return _assembly("mul.rn.f32", x, immediate=f"0f{word:08X}")

  def divide(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """`x / y`, as XLA rounds it."""
    return _assembly("div.full.f32", x, y)

  def sqrt(self, x: jax.Array) -> jax.Array:
    """A square root, as XLA rounds it."""
    return _assembly("sqrt.approx.f32", x)

  def log1p(self, x: jax.Array) -> jax.Array:
    """`log(1 + x)`, by the function that XLA calls."""
    return _elementwise(math_dialect.log1p, x)

  def is_less(self, x: jax.Array, y: jax.Array) -> jax.Array:
    """int32: 1 where x < y. No operand may be -0.0, which would be less than 0.0.

    Two infinities differ by NaN, whose sign is 0 here.
    """
    bits = lax.bitcast_convert_type(x - y, jnp.int32)
    return lax.shift_right_logical(bits, jnp.int32(31))


def _scatter(
  write: Callable[[Value, Value, Value, Any], None],
  ref: Ref,
  index: jax.Array,
  value: jax.Array,
  keep: jax.Array | None,
) -> None:
  rows = [index, value] if keep is None else [index, value, keep]

  @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), *[ROW] * len(rows)))
  def run(ctx: Any, ref: Any, *rows: Any) -> None:
    del ctx
    index, value, *keep = map(_scalar, rows)
    predicate = None
    if keep:
      predicate = arith.cmpi(arith.CmpIPredicate.ne, keep[0], _int32(0))
    write(ref, _as_index(index), value, predicate)

  run(ref, *rows)


def _store_if(predicate: Value, ref: Value, index: Value, value: Value) -> None:
  """`ref[index] = value` where the predicate holds: one instruction, no branch."""
  element = ir.MemRefType(ref.type).element_type
  if element == _integer(1):
    flag = arith.trunci(element, value)
    element, value = _integer(8), arith.extui(_integer(16), flag)
  elif value.type != element:
    raise ValueError(f"expected a value of {element}, got {value.type}")
  bits = mosaic.utils.bitwidth(element)
  if isinstance(element, ir.FloatType):
    value = arith.bitcast(_integer(bits), value)
  is_shared = mosaic.utils.is_smem_ref(ref)
  space, pointer, width = (
    ("shared", "r", 32) if is_shared else ("global", "l", 64)
  )
  address = llvm.ptrtoint(_integer(width), _address(ref, index, element))
  llvm.inline_asm(
    ir.Type.parse("!llvm.void"),
    [predicate, address, value],
    f"@$0 st.{space}.b{bits} [$1], $2;",
    f"b,{pointer},{ {8: 'h', 16: 'h', 32: 'r'}[bits] },~{{memory}}",
    has_side_effects=True,
  )


def _address(ref: Value, index: Value, element: Any) -> Value:
  """A pointer to an element of a vector in memory."""
  offset = arith.index_cast(_integer(64), index)
  pointer = mosaic.utils.memref_ptr(ref)
  return mosaic.utils.getelementptr(pointer, [offset], element)


def _assembly(
  name: str, *arrays: jax.Array, immediate: str | None = None
) -> jax.Array:
  """One instruction of PTX on every element; a constant is its last operand."""
  names = [f"${i + 1}" for i in range(len(arrays))]
  operands = ", ".join([*names, *([immediate] if immediate else [])])
  constraints = ",".join(["=f", *["f"] * len(arrays)])

  def run(*values: Value) -> Value:
    return llvm.inline_asm(
      ir.F32Type.get(),
      list(values),
      f"{name} $0, {operands};",
      constraints,
      has_side_effects=False,
    )

  return _elementwise(run, *arrays)


def _elementwise(
  function: Callable[..., Value], *arrays: jax.Array
) -> jax.Array:
  """A function of scalars on every element of arrays of one shape and dtype."""
  shape, dtype = arrays[0].shape, arrays[0].dtype
  layout = ROW if len(shape) == 1 else by_row(4)

  @plgpu.inline_mgpu(
    arg_types=(layout,) * len(arrays),
    return_type=plgpu.ShapeDtypeStruct(shape, dtype, layout=layout),
  )
  def run(ctx: Any, *fragments: Any) -> Any:
    del ctx
    registers = np.empty(fragments[0].registers.shape, object)
    for place, register in np.ndenumerate(fragments[0].registers):
      kind = ir.VectorType(register.type)
      out = llvm.mlir_undef(kind)
      for i in range(kind.shape[0]):
        values = [_element(x.registers[place], i) for x in fragments]
        out = vector.insert(
          function(*values),
          out,
          dynamic_position=[],
          static_position=_position(i),
        )
      registers[place] = out
    return mosaic.FragmentedArray(
      _registers=registers,
      _layout=fragments[0].layout,
      _is_signed=_is_signed(dtype),
    )

  return run(*(plgpu.layout_cast(x, layout) for x in arrays))


def _row_type(dtype: Any) -> Any:
  return plgpu.ShapeDtypeStruct((THREADS,), dtype, layout=ROW)


def _row_of(value: Value, dtype: Any) -> Any:
  """The array in which this thread holds a value."""
  layout = ROW.to_mgpu()
  registers = np.empty(layout.registers_shape((THREADS,)), object)
  if value.type == _integer(1):
    value = arith.extui(_i32(), value)
  registers.flat[0] = vector.broadcast(
    ir.VectorType.get((1,), value.type), value
  )
  return mosaic.FragmentedArray(
    _registers=registers, _layout=layout, _is_signed=_is_signed(dtype)
  )


def _is_signed(dtype: Any) -> bool | None:
  return True if jnp.issubdtype(dtype, jnp.integer) else None


def _scalar(row: Any) -> Value:
  """What this thread holds of a `[128]` array."""
  return _element(row.registers.flat[0], 0)


def _element(register: Value, i: int) -> Value:
  return vector.extract(
    register, dynamic_position=[], static_position=_position(i)
  )


def _position(i: int) -> Any:
  return ir.DenseI64ArrayAttr.get([i])


def _thread() -> Value:
  return arith.index_cast(
    _i32(), gpu_dialect.thread_id(gpu_dialect.Dimension.x)
  )


def _as_index(value: Value) -> Value:
  return arith.index_cast(ir.IndexType.get(), value)


def _integer(bits: int) -> Any:
  return ir.IntegerType.get_signless(bits)


def _i32() -> Any:
  return _integer(32)


def _int32(value: int) -> Value:
  return arith.constant(_i32(), value)
