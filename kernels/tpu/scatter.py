# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Puts K numbers of a token into a row of E on TPU: a scatter without scattering.

The gradient of the routing weights reaches the chosen logits only. XLA's scatter
takes one number after another, and its comparisons are in a layout with K on
lanes; here 128 tokens are on lanes and the experts on sublanes, where an index
is compared with 1024 elements at once. Tiles of 128 experts are transposed on
their way in and out, unless rows are so narrow that XLA stores the experts first.

Under a softmax over all experts the gradient reaches every logit. It is worked out
where the numbers are placed: one pass over the logits, whose softmax is taken anew.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device

_LANES = device.LANES
# Numbers in a block of [tokens, experts]: two in, two out, of VMEM's 16 MiB.
_BLOCK = 4096 * _LANES


@functools.partial(
  jax.jit, static_argnames=("num_experts", "dtype", "interpret")
)
def scatter(
  expert_idx: jax.Array,
  values: jax.Array,
  *,
  num_experts: int,
  dtype: jax.typing.DTypeLike,
  interpret: bool = False,
) -> jax.Array:
  """`out[t, expert_idx[t, k]] = values[t, k]`, 0 elsewhere.

  Args:
    expert_idx: `[T, K]` int32, distinct within a token.
    values: `[T, K]` float32.
    num_experts: E; static.
    dtype: of the result; static.
    interpret: whether to run in the interpreter.

  Returns:
    `[T, E]`. No gradient is defined.
  """
  t, _ = values.shape
  if t == 0:
    return jnp.zeros((0, num_experts), dtype)
  like = jax.ShapeDtypeStruct((t, num_experts), dtype)
  return _call(_scatter_kernel, [expert_idx.T, values.T], like, interpret)


@functools.partial(
  jax.jit, static_argnames=("multiplier", "soft_cap", "interpret")
)
def softmax_gradient(
  logits: jax.Array,
  expert_idx: jax.Array,
  scores: jax.Array,
  d_scores: jax.Array,
  *,
  multiplier: float,
  soft_cap: float | None,
  interpret: bool = False,
) -> jax.Array:
  """The gradient to the logits of K scores out of their softmax.

  With s the softmax of all experts and d the gradient to s, 0 where none was
  chosen, that is `s * (d - sum(s * d))`, times the slope of multiplier and cap.

  Args:
    logits: `[T, E]` floating point. Those that are NaN or -inf get 0.
    expert_idx: `[T, K]` int32, distinct within a token.
    scores: `[T, K]` float32. Softmax of the logits at `expert_idx`.
    d_scores: `[T, K]` float32. The gradient to `scores`.
    multiplier: of the logits, before the softmax; static.
    soft_cap: as in `jaxroute.RouterConfig`; static.
    interpret: whether to run in the interpreter.

  Returns:
    `[T, E]`, the dtype of `logits`.
  """
  t, _ = logits.shape
  if t == 0:
    return logits
  mean = jnp.sum(scores * d_scores, axis=1)[None]
  kernel = functools.partial(_softmax_kernel, multiplier, soft_cap)
  operands = [expert_idx.T, d_scores.T, mean]
  return _call(kernel, operands, logits, interpret, [logits])


def _call(kernel, operands, like, interpret, logits=()):
  """Calls a kernel for `like` `[T, E]`, with `[n, T]` operands and logits."""
  t, e = like.shape
  columns = min(8, max(1, _BLOCK // _LANES // e), pl.cdiv(t, _LANES))
  block = columns * _LANES
  transposed = e % _LANES != 0
  if transposed:
    logits = [x.T for x in logits]
    shape, whole = (e, t), pl.BlockSpec((e, block), lambda i: (0, i))
  else:
    shape, whole = (t, e), pl.BlockSpec((block, e), lambda i: (i, 0))
  rows = [pl.BlockSpec((x.shape[0], block), lambda i: (0, i)) for x in operands]
  out = pl.pallas_call(
    functools.partial(kernel, transposed),
    grid=(pl.cdiv(t, block),),
    in_specs=rows + [whole for _ in logits],
    out_specs=whole,
    out_shape=jax.ShapeDtypeStruct(
      shape,
      like.dtype,
      manual_axis_type=jax.typeof(operands[1]).manual_axis_type,
    ),
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    name="jaxroute_scatter",
  )(*operands, *logits)
  return out.T if transposed else out


def _scatter_kernel(transposed, idx_ref, values_ref, out_ref):
  for tokens in _columns(idx_ref):
    for experts in _tiles(transposed, out_ref):
      tile = _placed(experts, tokens, idx_ref, values_ref)
      _store(transposed, out_ref, experts, tokens, tile)


def _softmax_kernel(
  multiplier,
  soft_cap,
  transposed,
  idx_ref,
  d_ref,
  mean_ref,
  logits_ref,
  out_ref,
):
  def prepared(experts, tokens):
    """Logits, and their slope; -inf for those that have no softmax."""
    if transposed:
      x = logits_ref[experts, tokens].astype(jnp.float32)
    else:
      x = logits_ref[tokens, experts].astype(jnp.float32).T
    x = jnp.where(x < jnp.inf, x * multiplier, -jnp.inf)
    if soft_cap is None:
      return x, multiplier
    bent = jnp.tanh(x / soft_cap)
    slope = multiplier * (1.0 - bent * bent)
    return jnp.where(x == -jnp.inf, x, soft_cap * bent), slope

  for tokens in _columns(idx_ref):
    tiles = _tiles(transposed, out_ref)
    logits, slopes = zip(*(prepared(n, tokens) for n in tiles), strict=True)
    peak = _total(jnp.maximum, jnp.max, logits)
    peak = jnp.where(peak == -jnp.inf, 0.0, peak)
    scores = [jnp.exp(x - peak) for x in logits]
    total = _total(jnp.add, jnp.sum, scores)
    inverse = 1.0 / jnp.where(total == 0.0, 1.0, total)
    for experts, score, slope in zip(tiles, scores, slopes, strict=True):
      d = _placed(experts, tokens, idx_ref, d_ref) - mean_ref[:, tokens]
      tile = slope * (score * inverse) * d
      _store(transposed, out_ref, experts, tokens, tile)


def _total(join, reduce, tiles):
  return functools.reduce(
    join, [reduce(x, axis=0, keepdims=True) for x in tiles]
  )


def _columns(idx_ref):
  return [pl.ds(i, _LANES) for i in range(0, idx_ref.shape[1], _LANES)]


def _tiles(transposed, out_ref):
  """128 experts at a time."""
  e = out_ref.shape[0 if transposed else 1]
  return [pl.ds(i, min(_LANES, e - i)) for i in range(0, e, _LANES)]


def _placed(experts, tokens, idx_ref, values_ref):
  """The values of 128 tokens in the rows of some experts, 0 elsewhere."""
  shape = experts.size, _LANES
  expert = experts.start + lax.broadcasted_iota(jnp.int32, shape, 0)
  tile = jnp.zeros(shape, jnp.float32)
  for i in range(idx_ref.shape[0]):
    here = idx_ref[pl.ds(i, 1), tokens] == expert
    tile = jnp.where(here, values_ref[pl.ds(i, 1), tokens], tile)
  return tile


def _store(transposed, out_ref, experts, tokens, tile):
  tile = tile.astype(out_ref.dtype)
  if transposed:
    out_ref[experts, tokens] = tile
  else:
    out_ref[tokens, experts] = tile.T
