# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What PTX instructions compute, as NumPy does, lane by lane.

Approximations (`ex2.approx`, `rcp.approx`) are as exact as NumPy's float32 here, and
so differ from a GPU's in their last bits. A fused product passes through float64.
"""

import functools
from collections.abc import Callable

import numpy as np

DTYPES = {
  "pred": np.bool_,
  "b8": np.uint8,
  "u8": np.uint8,
  "s8": np.int8,
  "b16": np.uint16,
  "u16": np.uint16,
  "s16": np.int16,
  "f16": np.float16,
  "bf16": np.uint16,
  "b32": np.uint32,
  "u32": np.uint32,
  "s32": np.int32,
  "f32": np.float32,
  "f16x2": np.uint32,
  "bf16x2": np.uint32,
  "b64": np.uint64,
  "u64": np.uint64,
  "s64": np.int64,
  "f64": np.float64,
}
# What a GPU makes where a result is no number; a CPU makes another.
NAN = np.array(0x7FFFFFFF, np.uint32).view(np.float32)
CANONICAL_NAN = {
  "add",
  "sub",
  "mul",
  "div",
  "fma",
  "max",
  "min",
  "rcp",
  "sqrt",
  "rsqrt",
  "ex2",
  "lg2",
}
# Python's integers have no width.
_WIDER = {
  np.int16: np.int32,
  np.uint16: np.uint32,
  np.int32: np.int64,
  np.uint32: np.uint64,
  np.int64: object,
  np.uint64: object,
}
_TINY = np.finfo(np.float32).tiny


def _flush(x: np.ndarray) -> np.ndarray:
  return np.where(np.abs(x) < _TINY, np.copysign(np.float32(0), x), x)


def _round_down(x: np.ndarray) -> np.ndarray:
  """float64 to the float32 that is not above."""
  near = x.astype(np.float32)
  below = np.nextafter(near, np.float32(-np.inf))
  return np.where(near.astype(np.float64) > x, below, near)


def _fma(parts: list[str]) -> Callable[..., np.ndarray]:
  def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    exact = a.astype(np.float64) * b + c.astype(np.float64)
    return _round_down(exact) if "rm" in parts else exact.astype(np.float32)

  return fma


def _shift(x: np.ndarray, by: np.ndarray, left: bool) -> np.ndarray:
  """Shifts by as much as the width or more leave the sign, or 0."""
  bits = x.dtype.itemsize * 8
  by = by.astype(np.int64)
  within = np.minimum(by, bits - 1).astype(x.dtype)
  shifted = np.left_shift(x, within) if left else np.right_shift(x, within)
  is_sign_kept = not left and x.dtype.kind == "i"
  return (
    shifted if is_sign_kept else np.where(by >= bits, x.dtype.type(0), shifted)
  )


def _funnel_left(
  low: np.ndarray, high: np.ndarray, by: np.ndarray
) -> np.ndarray:
  both = (high.astype(np.uint64) << np.uint64(32)) | low
  return ((both << (by & 31).astype(np.uint64)) >> np.uint64(32)).astype(
    np.uint32
  )


def _funnel_right(
  low: np.ndarray, high: np.ndarray, by: np.ndarray
) -> np.ndarray:
  both = (high.astype(np.uint64) << np.uint64(32)) | low
  return (both >> (by & 31).astype(np.uint64)).astype(np.uint32)


def _extract(x: np.ndarray, first: np.ndarray, count: np.ndarray) -> np.ndarray:
  """`bfe`: so many bits, from one on; the last is the sign if there are signs."""
  width = x.dtype.itemsize * 8
  above = (width - first.astype(np.int64) - count).astype(x.dtype)
  # Shifts of signed numbers to the right repeat the sign.
  return (x << above) >> (width - count.astype(np.int64)).astype(x.dtype)


def _multiply(parts: list[str], dtype: type) -> Callable[..., np.ndarray]:
  if "wide" in parts:
    return lambda a, b: a.astype(_WIDER[dtype]) * b.astype(_WIDER[dtype])
  if "hi" in parts:
    wide, bits = _WIDER[dtype], np.dtype(dtype).itemsize * 8
    return lambda a, b: (
      (a.astype(wide) * b.astype(wide)) >> np.array(bits).astype(wide)
    ).astype(dtype)
  return np.multiply


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  if a.dtype.kind == "f":
    return a / b
  quotient = np.abs(a.astype(np.int64)) // np.abs(b.astype(np.int64))
  return (quotient * np.sign(a) * np.sign(b)).astype(a.dtype)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return (a - _divide(a, b) * b).astype(a.dtype)


def _count_leading_zeros(x: np.ndarray) -> np.ndarray:
  x = x.astype(np.uint32)
  return np.where(
    x == 0, 32, 31 - np.floor(np.log2(np.maximum(x, 1).astype(np.float64)))
  ).astype(np.uint32)


def operation(
  parts: list[str], dtype: type
) -> Callable[..., np.ndarray] | None:
  """The function of an instruction that computes one register from others.

  Args:
    parts: of its name.
    dtype: of its operands.

  Returns:
    Of arrays of that type; None if it is not known.
  """
  is_float = dtype in (np.float32, np.float64, np.float16)
  largest, least = np.maximum, np.minimum
  if is_float:
    has_nan = "NaN" in parts
    largest = _of_zeros(np.maximum if has_nan else np.fmax, np.add)
    least = _of_zeros(
      np.minimum if has_nan else np.fmin, lambda a, b: -(-a + -b)
    )
  simple: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": _multiply(parts, dtype),
    "mul24": np.multiply,
    "div": _divide,
    "rem": _remainder,
    "fma": _fma(parts),
    "mad": lambda a, b, c: _multiply(parts, dtype)(a, b) + c,
    "neg": np.negative,
    "abs": np.abs,
    "not": np.logical_not if dtype is np.bool_ else np.invert,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "bfe": _extract,
    "shl": lambda a, b: _shift(a, b, left=True),
    "shr": lambda a, b: _shift(a, b, left=False),
    "popc": lambda x: np.bitwise_count(x).astype(np.uint32),
    "clz": _count_leading_zeros,
    "rcp": lambda x: _flush(np.float32(1) / x),
    "sqrt": np.sqrt,
    "rsqrt": lambda x: np.float32(1) / np.sqrt(x),
    "ex2": lambda x: _flush(np.exp2(x)),
    "lg2": np.log2,
    "selp": lambda a, b, p: np.where(p, a, b),
    "mov": lambda a: a,
    "max": lambda *x: functools.reduce(largest, x),
    "min": lambda *x: functools.reduce(least, x),
  }
  if parts[0] == "shf":
    return _funnel_left if parts[1] == "l" else _funnel_right
  return simple.get(parts[0])


def _of_zeros(
  function: Callable[..., np.ndarray], of_zeros: Callable[..., np.ndarray]
) -> Callable[..., np.ndarray]:
  """A function but where both operands are 0: there -0.0 is less than 0.0."""
  return lambda a, b: np.where(
    (a == 0) & (b == 0), of_zeros(a, b), function(a, b)
  )


def compare(how: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
  """What `setp` finds."""
  unordered = np.zeros(np.broadcast_shapes(a.shape, b.shape), bool)
  if a.dtype.kind == "f":
    unordered = np.isnan(a) | np.isnan(b)
  if how in ("num", "nan"):
    return unordered if how == "nan" else ~unordered
  plain = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
  }
  if how in plain:
    return plain[how](a, b) & ~unordered
  # Those that end in "u" hold for NaN, too.
  return (
    plain[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how[:-1])](
      a, b
    )
    | unordered
  )


def convert(parts: list[str], x: np.ndarray) -> np.ndarray:
  """What `cvt` makes of an array of the last type of its name."""
  to = DTYPES[parts[-2]]
  if "sat" in parts:
    return np.where(np.isnan(x), np.float32(0), np.clip(x, 0, 1)).astype(to)
  if x.dtype.kind == "f" and np.dtype(to).kind in "iu" and "bf16" not in parts:
    rounded = np.rint(x) if "rni" in parts else np.trunc(x)
    return rounded.astype(np.int64).astype(to)
  return x.astype(to)


def to_bfloat16(x: np.ndarray) -> np.ndarray:
  """Bits of the nearest bfloat16 of float32, the even one of two."""
  bits = x.view(np.uint32).astype(np.uint64)
  rounded = (
    bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))
  ) >> np.uint64(16)
  return np.where(np.isnan(x), 0x7FFF, rounded).astype(np.uint32)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
  """float32 of the bits of bfloat16."""
  return (bits.astype(np.uint32) << 16).view(np.float32)
