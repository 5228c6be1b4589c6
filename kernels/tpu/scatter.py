# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Scatters K numbers of a token into a row of E on TPU, by comparisons.

The gradient of the routing weights reaches the chosen logits only. XLA's
scatter handles one number at a time, and its comparisons would have K on lanes.
Here experts are on sublanes and 128 tokens on lanes, where an index is compared
with 1024 elements at once.

Under a softmax over all experts the gradient reaches every logit. It is
computed where the numbers are scattered: one pass over the logits, whose
softmax is computed again.

A grid block is up to 8 columns of 128 tokens, and a tile is up to 128 experts
of a column, `[experts, tokens]`. If 128 divides E, logits are `[tokens,
experts]` in memory, and tiles are transposed on their way in and out. If not,
XLA stores the experts first, and tiles are moved as they are.

  stage | function | layout | reads | writes
  load a tile | `_Tile.load` | [experts, 128] | `logits` | its result
  scatter | `_scatter_tile` | [experts, 128] | `expert_idx`, `values` |
    its result
  store a tile | `_Tile.store` | [experts, 128] | its argument | the output
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref

_LANES = device.LANES
# A grid block has at most this many columns, and this many numbers of
# [tokens, experts]. Two blocks are read and two are written at a time, within
# VMEM's 16 MiB.
_MAX_COLUMNS = 8
_MAX_BLOCK_SIZE = 4096 * _LANES


@functools.partial(
  jax.jit, static_argnames=("num_experts", "dtype", "interpret")
)
def scatter(
  expert_idx: jax.Array,
  values: jax.Array,
  *,
  num_experts: int,
  dtype: jax.typing.DTypeLike,
  interpret: Any = False,
) -> jax.Array:
  """Returns `out` with `out[t, expert_idx[t, k]] = values[t, k]`, 0 elsewhere.

  Args:
    expert_idx: `[T, K]` int32, distinct within a token.
    values: `[T, K]` float32.
    num_experts: E; static.
    dtype: of the result; static.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[T, E]`. No gradient is defined.
  """
  t, _ = values.shape
  if t == 0:
    return jnp.zeros((0, num_experts), dtype)
  inputs = _Inputs(expert_idx=expert_idx.T, values=values.T)
  out = jax.ShapeDtypeStruct((t, num_experts), dtype)
  return _call(_scatter_kernel, inputs, out, interpret)


@functools.partial(
  jax.jit, static_argnames=("multiplier", "soft_cap", "interpret")
)
def softmax_gradient(
  logits: jax.Array,
  expert_idx: jax.Array,
  d_log_scores: jax.Array,
  *,
  multiplier: float,
  soft_cap: float | None,
  interpret: Any = False,
) -> jax.Array:
  """Computes the gradient to the logits of K log scores out of their softmax.

  With s the softmax of all experts and d the gradient to log(s), which is 0 for
  experts that were not chosen, it is `d - s * sum(d)`, times the slope of
  multiplier and cap. A chosen score may be too small for float32.

  Args:
    logits: `[T, E]` floating point. Those that are NaN or -inf get 0.
    expert_idx: `[T, K]` int32, distinct within a token.
    d_log_scores: `[T, K]` float32. The gradient to the logarithms of the softmax
      at `expert_idx`.
    multiplier: what the logits are multiplied by before the softmax; static.
    soft_cap: as in `jaxroute.RouterConfig`; static.
    interpret: what `pallas_call` takes; static.

  Returns:
    `[T, E]`, the dtype of `logits`.
  """
  t, _ = logits.shape
  if t == 0:
    return logits
  inputs = _Inputs(
    expert_idx=expert_idx.T,
    values=d_log_scores.T,
    total=jnp.sum(d_log_scores, axis=1)[None],
    logits=logits,
  )
  kernel = functools.partial(_softmax_gradient_kernel, multiplier, soft_cap)
  return _call(kernel, inputs, logits, interpret)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class _Inputs:
  """What a kernel reads, a grid block of tokens at a time.

  Attributes:
    expert_idx: `[K, T]` int32. The chosen experts.
    values: `[K, T]` float32. What is scattered.
    total: `[1, T]` float32. The sum of `values`; None without a softmax.
    logits: `[T, E]`, or `[E, T]` if tiles are not transposed; None without a
      softmax.
  """

  expert_idx: Ref
  values: Ref
  total: Ref = None
  logits: Ref = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Tile:
  """Some experts of a column.

  Attributes:
    experts: slice of the experts.
    tokens: slice of a grid block's tokens.
    transposes: whether memory is `[tokens, experts]`, and a tile its transpose.
  """

  experts: pl.Slice
  tokens: pl.Slice
  transposes: bool

  def load(self, ref: Ref) -> jax.Array:
    """Reads the tile, `[experts, tokens]` float32."""
    if self.transposes:
      return ref[self.tokens, self.experts].astype(jnp.float32).T
    return ref[self.experts, self.tokens].astype(jnp.float32)

  def store(self, ref: Ref, values: jax.Array) -> None:
    """Writes the tile from `values`, `[experts, tokens]`."""
    values = values.astype(ref.dtype)
    if self.transposes:
      ref[self.tokens, self.experts] = values.T
    else:
      ref[self.experts, self.tokens] = values


def _call(
  kernel: Callable[[bool, _Inputs, Ref], None],
  inputs: _Inputs,
  out: jax.Array | jax.ShapeDtypeStruct,
  interpret: Any,
) -> jax.Array:
  """Calls a kernel on all grid blocks of tokens, for `[T, E]` like `out`."""
  t, e = out.shape
  k = inputs.expert_idx.shape[0]
  columns = max(1, _MAX_BLOCK_SIZE // _LANES // e)
  columns = min(_MAX_COLUMNS, columns, pl.cdiv(t, _LANES))
  block_tokens = columns * _LANES
  transposes = e % _LANES == 0
  shape, logits = (t, e), inputs.logits
  logits_spec = pl.BlockSpec((block_tokens, e), lambda i: (i, 0))
  if not transposes:
    shape = (e, t)
    logits = None if logits is None else logits.T
    logits_spec = pl.BlockSpec((e, block_tokens), lambda i: (0, i))
  choices_spec = pl.BlockSpec((k, block_tokens), lambda i: (0, i))
  total_spec = pl.BlockSpec((1, block_tokens), lambda i: (0, i))
  call = pl.pallas_call(
    functools.partial(kernel, transposes),
    grid=(pl.cdiv(t, block_tokens),),
    in_specs=[
      _Inputs(
        expert_idx=choices_spec,
        values=choices_spec,
        total=None if inputs.total is None else total_spec,
        logits=None if logits is None else logits_spec,
      )
    ],
    out_specs=logits_spec,
    out_shape=jax.ShapeDtypeStruct(
      shape,
      out.dtype,
      manual_axis_type=jax.typeof(inputs.values).manual_axis_type,
    ),
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    name="jaxroute_scatter",
  )
  # Its indices would have 64 bits where those of the program have.
  with jax.enable_x64(False):
    result = call(dataclasses.replace(inputs, logits=logits))
  return result if transposes else result.T


def _scatter_kernel(transposes: bool, inputs: _Inputs, out_ref: Ref) -> None:
  """Writes the values of a grid block to `out_ref`, and 0 elsewhere."""
  for tiles in _tiles_by_column(transposes, inputs, out_ref):
    for tile in tiles:
      tile.store(out_ref, _scatter_tile(tile, inputs))


def _softmax_gradient_kernel(
  multiplier: float,
  soft_cap: float | None,
  transposes: bool,
  inputs: _Inputs,
  out_ref: Ref,
) -> None:
  """Writes the gradient to the logits of a grid block to `out_ref`."""
  for tiles in _tiles_by_column(transposes, inputs, out_ref):
    prepared = [
      _prepare_logits(multiplier, soft_cap, tile.load(inputs.logits))
      for tile in tiles
    ]
    logits, slopes = zip(*prepared, strict=True)
    max_logit = _reduce_experts(jnp.maximum, jnp.max, logits)
    # A token whose logits are all -inf would have -inf minus -inf.
    max_logit = jnp.where(max_logit == -jnp.inf, 0.0, max_logit)
    scores = [jnp.exp(x - max_logit) for x in logits]
    total = _reduce_experts(jnp.add, jnp.sum, scores)
    inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)
    for tile, score, slope in zip(tiles, scores, slopes, strict=True):
      d_total = score * (inverse * inputs.total[:, tile.tokens])
      tile.store(out_ref, slope * (_scatter_tile(tile, inputs) - d_total))


def _prepare_logits(
  multiplier: float, soft_cap: float | None, logits: jax.Array
) -> tuple[jax.Array, jax.Array | float]:
  """Returns logits for the softmax, -inf for NaN and inf, and their slope."""
  x = jnp.where(logits < jnp.inf, logits * multiplier, -jnp.inf)
  if soft_cap is None:
    return x, multiplier
  capped = jnp.tanh(x / soft_cap)
  slope = multiplier * (1.0 - capped * capped)
  return jnp.where(x == -jnp.inf, x, soft_cap * capped), slope


def _reduce_experts(
  combine: Callable[[jax.Array, jax.Array], jax.Array],
  reduce: Callable[..., jax.Array],
  tiles: Sequence[jax.Array],
) -> jax.Array:
  """Reduces the tiles of a column, `[experts, 128]`, to `[1, 128]`."""
  return functools.reduce(
    combine, [reduce(x, axis=0, keepdims=True) for x in tiles]
  )


def _tiles_by_column(
  transposes: bool, inputs: _Inputs, out_ref: Ref
) -> list[list[_Tile]]:
  """Lists the tiles of every column of a grid block."""
  e = out_ref.shape[1 if transposes else 0]
  experts = [pl.Slice(i, min(_LANES, e - i)) for i in range(0, e, _LANES)]
  tokens = [
    pl.Slice(i, _LANES) for i in range(0, inputs.expert_idx.shape[1], _LANES)
  ]
  return [
    [_Tile(experts=x, tokens=column, transposes=transposes) for x in experts]
    for column in tokens
  ]


def _scatter_tile(tile: _Tile, inputs: _Inputs) -> jax.Array:
  """Returns the values in a tile, 0 elsewhere."""
  shape = tile.experts.size, _LANES
  expert = tile.experts.start + lax.broadcasted_iota(jnp.int32, shape, 0)
  scattered = jnp.zeros(shape, jnp.float32)
  # [1, 128] of a choice to [experts, 128].
  for i in range(inputs.expert_idx.shape[0]):
    choice = pl.ds(i, 1)
    is_chosen = inputs.expert_idx[choice, tile.tokens] == expert
    value = inputs.values[choice, tile.tokens]
    scattered = jnp.where(is_chosen, value, scattered)
  return scattered
