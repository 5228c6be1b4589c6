# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rows in expert order, added to their tokens and read from them, in VMEM on TPU.

A row is moved by its token's number. Where XLA gathers rows from HBM one by one,
each waits for the memory; here the rows of a block come in one copy, and the
tokens of a slice of D stay in VMEM from the first block to the last. There a
token is `[D / 128, 128]`, which one instruction reads or writes for every 1,024
of D, whatever its number. In a block of rows, `[R, D]`, eight rows share a
register; they are laid out anew on their way.

Rows that belong to no expert have the number T, of a token that is not returned,
or is 0.

  kernel | grid | stays in VMEM | a step reads | and writes
  `add` | [slices of D, blocks of rows] | sums, float32 | rows | sums, at the end
  `take` | the same | tokens, float32 | nothing more | weighted tokens
  `multiply` | the same | tokens, float32 | rows | products

The slice of the tokens is in VMEM twice, as float32 and as it is in HBM.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref

_LANES = device.LANES
# One register of float32 for a token.
_TOKEN = device.SUBLANES, _LANES
_SLICE = device.SUBLANES * _LANES
ROWS = 512
"""Rows of a block."""

# Rows whose numbers are read ahead of those before being stored.
_UNROLL = 16
# What tokens may take of VMEM: v5p and v7x have 64 MiB, v5e and v6e 128.
_TOKEN_BYTES = 50 * 2**20
_SPARE_BYTES = 8 * 2**20


def unsupported(
  num_tokens: Any, num_rows: Any, width: int, dtype: Any
) -> str | None:
  """Says why the kernels cannot move these rows.

  Args:
    num_tokens: T.
    num_rows: N.
    width: D.
    dtype: of the rows and tokens.

  Returns:
    The reason, for an error message; None if they can.
  """
  dtype = jnp.dtype(dtype)
  if dtype not in (jnp.bfloat16, jnp.float32):
    return f"the TPU kernel takes bfloat16 and float32, got {dtype}"
  if width % _SLICE:
    return f"the TPU kernel takes a D in multiples of {_SLICE}, got {width}"
  if not isinstance(num_rows, int) or num_rows < ROWS:
    return f"the TPU kernel takes {ROWS} rows or more, got {num_rows}"
  most = _TOKEN_BYTES // ((4 + dtype.itemsize) * _SLICE) - _UNROLL
  if num_tokens > most:
    return f"the TPU kernel takes {most} tokens of {dtype}, got {num_tokens}"
  return None


@functools.partial(
  jax.jit, static_argnames=("num_tokens", "dtype", "interpret")
)
def add(
  rows: jax.Array,
  token: jax.Array,
  weights: jax.Array | None,
  *,
  num_tokens: int,
  dtype: Any,
  first: jax.Array | None = None,
  interpret: Any = False,
) -> jax.Array:
  """Sums the rows of every token, by weight, in the order of the rows.

  Args:
    rows: `[N, D]`, not `unsupported`.
    token: `[N]` int32. The token of every row; T for none.
    weights: `[N]` float32; None for 1.
    num_tokens: T; static.
    dtype: of the result; static. Sums are float32.
    first: `[T]` float32. What all sums of a token begin with; None for 0.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[T, D]`. A row of no token is not read.
  """
  n, d = rows.shape
  size = _token_rows(num_tokens)
  if first is None:
    first = jnp.zeros(num_tokens, jnp.float32)
  first = jnp.pad(first, (0, size - num_tokens))
  numbers = [_pad(token, num_tokens)]
  if weights is not None:
    numbers.append(_pad(weights, 0))
  return _call(
    _add_kernel,
    name="jaxroute_add_rows",
    numbers=numbers,
    operands=[first, rows],
    in_specs=[
      pl.BlockSpec((size,), lambda j, i: (0,), memory_space=pltpu.SMEM),
      _row_spec(),
    ],
    out_specs=_token_spec(num_tokens),
    out_shape=_like(rows, (num_tokens, d), dtype),
    scratch=[pltpu.VMEM((size, *_TOKEN), jnp.float32)],
    grid=(d // _SLICE, pl.cdiv(n, ROWS)),
    interpret=interpret,
  )


@functools.partial(jax.jit, static_argnames=("dtype", "interpret"))
def take(
  tokens: jax.Array,
  token: jax.Array,
  weights: jax.Array,
  *,
  dtype: Any,
  interpret: Any = False,
) -> jax.Array:
  """Copies every row's token, by the weight.

  Args:
    tokens: `[T, D]`.
    token: `[N]` int32. The token of every row; T for none, which is 0.
    weights: `[N]` float32, finite for a row of no token.
    dtype: of the result; static.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[N, D]`, `weights * tokens[token]`.
  """
  (t, d), n = tokens.shape, token.shape[0]
  return _call(
    _take_kernel,
    name="jaxroute_take_rows",
    numbers=[_pad(token, t), _pad(weights, 0)],
    operands=[_in_hbm(tokens, interpret)],
    in_specs=[_token_spec(t)],
    out_specs=_row_spec(),
    out_shape=_like(tokens, (n, d), dtype),
    scratch=[pltpu.VMEM((_token_rows(t), *_TOKEN), jnp.float32)],
    grid=(d // _SLICE, pl.cdiv(n, ROWS)),
    interpret=interpret,
  )


@functools.partial(jax.jit, static_argnames=("interpret",))
def multiply(
  tokens: jax.Array,
  rows: jax.Array,
  token: jax.Array,
  *,
  interpret: Any = False,
) -> jax.Array:
  """Multiplies every row with its token.

  Args:
    tokens: `[T, D]`.
    rows: `[N, D]`, not `unsupported`.
    token: as in `take`.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[N]` float32, the sums of `rows * tokens[token]`; anything for a row of no
    token.
  """
  (t, d), n = tokens.shape, rows.shape[0]
  slices = d // _SLICE
  products = _call(
    _multiply_kernel,
    name="jaxroute_multiply_rows",
    numbers=[_pad(token, t)],
    operands=[_in_hbm(tokens, interpret), rows],
    in_specs=[_token_spec(t), _row_spec()],
    out_specs=pl.BlockSpec((None, 1, ROWS), lambda j, i: (j, 0, i)),
    out_shape=_like(rows, (slices, 1, n), jnp.float32),
    scratch=[pltpu.VMEM((_token_rows(t), *_TOKEN), jnp.float32)],
    grid=(slices, pl.cdiv(n, ROWS)),
    interpret=interpret,
  )
  return jnp.sum(products[:, 0], axis=0)


def _in_hbm(tokens: jax.Array, interpret: Any) -> jax.Array:
  """Tokens that XLA does not keep in VMEM, where the kernel needs the space."""
  if interpret:
    return tokens
  return pltpu.with_memory_space_constraint(tokens, pltpu.HBM)


def _token_rows(num_tokens: int) -> int:
  """T and the token that is none, rounded up to what a loop covers."""
  return pl.cdiv(num_tokens + 1, _UNROLL) * _UNROLL


def _pad(x: jax.Array, value: Any) -> jax.Array:
  """Numbers of rows, for whole blocks of them."""
  return jnp.pad(x, (0, -x.shape[0] % ROWS), constant_values=value)


def _like(x: jax.Array, shape: tuple[int, ...], dtype: Any) -> Any:
  """The shape of a result that varies over the mesh axes of an operand."""
  varying = jax.typeof(x).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=varying)


def _row_spec() -> pl.BlockSpec:
  return pl.BlockSpec((ROWS, _SLICE), lambda j, i: (i, j))


def _token_spec(size: int) -> pl.BlockSpec:
  return pl.BlockSpec(
    (size, _SLICE),
    lambda j, i: (0, j),
    # It changes a few times in all, and two of it may not fit.
    pipeline_mode=pl.Buffered(1),
  )


def _for_each_row(count: int, body: Any) -> None:
  """Calls a function of a row's number for all rows, in order."""

  def some(i, _):
    for k in range(_UNROLL):
      body(i * _UNROLL + k)

  lax.fori_loop(0, count // _UNROLL, some, None)


def _add_kernel(token: Ref, *refs: Ref) -> None:
  """Adds a block of rows to the tokens, and writes them after the last."""
  *weights, first, rows, out, unpacked, sums = refs
  i, count = pl.program_id(1), sums.shape[0]

  @pl.when(i == 0)
  def _():

    def start(t):
      sums[t] = jnp.full(_TOKEN, first[t])

    _for_each_row(count, start)

  unpacked[...] = rows[...].astype(jnp.float32).reshape(unpacked.shape)

  def add_row(r):
    row = unpacked[r]
    if weights:
      row *= weights[0][r]
    sums[token[r]] += row

  _for_each_row(ROWS, add_row)

  def write(some, size):
    out[some, :] = sums[some].reshape(size, _SLICE).astype(out.dtype)

  @pl.when(i == pl.num_programs(1) - 1)
  def _():
    _for_some_tokens(out.shape[0], write)


def _take_kernel(
  token: Ref,
  weights: Ref,
  tokens: Ref,
  out: Ref,
  unpacked: Ref,
  all_tokens: Ref,
) -> None:
  """Writes the weighted tokens of a block of rows."""
  _unpack(tokens, all_tokens)

  def take_row(r):
    unpacked[r] = all_tokens[token[r]] * weights[r]

  _for_each_row(ROWS, take_row)
  out[...] = unpacked[...].reshape(out.shape).astype(out.dtype)


def _multiply_kernel(
  token: Ref,
  tokens: Ref,
  rows: Ref,
  out: Ref,
  unpacked: Ref,
  all_tokens: Ref,
) -> None:
  """Writes the products of a block of rows and their tokens."""
  _unpack(tokens, all_tokens)

  def take_row(r):
    unpacked[r] = all_tokens[token[r]]

  _for_each_row(ROWS, take_row)
  product = unpacked[...].reshape(rows.shape) * rows[...].astype(jnp.float32)
  by_lane = product[:, :_LANES]
  for begin in range(_LANES, _SLICE, _LANES):
    by_lane += product[:, begin : begin + _LANES]
  # A number for each lane, where a column of them would take a register for eight.
  out[...] = jnp.sum(by_lane.T, axis=0, keepdims=True)


def _unpack(tokens: Ref, all_tokens: Ref) -> None:
  """Lays a slice of the tokens out anew, in its first step, with 0 for none."""
  count = tokens.shape[0]

  def unpack(some, size):
    values = tokens[some, :].astype(jnp.float32)
    all_tokens[some] = values.reshape(size, *_TOKEN)

  @pl.when(pl.program_id(1) == 0)
  def _():
    _for_some_tokens(count, unpack)
    for t in range(count, all_tokens.shape[0]):
      all_tokens[t] = jnp.zeros(_TOKEN, jnp.float32)


def _for_some_tokens(count: int, body: Any) -> None:
  """Calls a function of some tokens' slice and number, until it had all."""
  whole = count // _UNROLL

  def some(k, _):
    body(pl.ds(pl.multiple_of(k * _UNROLL, _UNROLL), _UNROLL), _UNROLL)

  lax.fori_loop(0, whole, some, None)
  if rest := count % _UNROLL:
    body(pl.ds(whole * _UNROLL, rest), rest)


def _call(
  kernel: Any,
  *,
  name: str,
  numbers: list[jax.Array],
  operands: list[jax.Array],
  in_specs: list[pl.BlockSpec],
  interpret: Any,
  scratch: Any = (),
  **kwargs: Any,
) -> Any:
  """A call of a kernel whose first operands are numbers of every row."""
  number_spec = pl.BlockSpec(
    (ROWS,), lambda j, i: (i,), memory_space=pltpu.SMEM
  )
  return pl.pallas_call(
    kernel,
    in_specs=[number_spec] * len(numbers) + in_specs,
    scratch_shapes=[pltpu.VMEM((ROWS, *_TOKEN), jnp.float32), *scratch],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
      vmem_limit_bytes=_TOKEN_BYTES + _SPARE_BYTES,
    ),
    interpret=interpret,
    name=name,
    **kwargs,
  )(*numbers, *operands)
