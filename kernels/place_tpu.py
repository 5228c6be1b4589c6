# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Puts K numbers of a token into a row of E on TPU: a scatter without scattering.

The gradient of the routing weights reaches the chosen logits only. XLA's scatter
takes one number after another, and its comparisons are in a layout with K on
lanes; here 128 tokens are on lanes and the experts on sublanes, where an index
is compared with 1024 elements at once. Tiles of 128 experts are transposed on
their way out, unless rows are so narrow that XLA stores the experts first.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

_LANES = 128
_BLOCK = 8 * _LANES


@functools.partial(
  jax.jit, static_argnames=("num_experts", "dtype", "interpret")
)
def place(
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
  t, k = values.shape
  if t == 0:
    return jnp.zeros((0, num_experts), dtype)
  block = min(_BLOCK, pl.cdiv(t, _LANES) * _LANES)
  transposed = num_experts % _LANES != 0
  chosen = pl.BlockSpec((k, block), lambda i: (0, i))
  if transposed:
    shape, spec = (
      (num_experts, t),
      pl.BlockSpec((num_experts, block), lambda i: (0, i)),
    )
  else:
    shape, spec = (
      (t, num_experts),
      pl.BlockSpec((block, num_experts), lambda i: (i, 0)),
    )
  out = pl.pallas_call(
    functools.partial(_kernel, transposed),
    grid=(pl.cdiv(t, block),),
    in_specs=[chosen, chosen],
    out_specs=spec,
    out_shape=jax.ShapeDtypeStruct(
      shape, dtype, manual_axis_type=jax.typeof(values).manual_axis_type
    ),
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
    name="jaxroute_place",
  )(expert_idx.T, values.T)
  return out.T if transposed else out


def _kernel(transposed, idx_ref, values_ref, out_ref):
  k, block = idx_ref.shape
  num_experts = out_ref.shape[0 if transposed else 1]
  for start in range(0, block, _LANES):
    tokens = pl.ds(start, _LANES)
    for first in range(0, num_experts, _LANES):
      n = min(_LANES, num_experts - first)
      expert = first + lax.broadcasted_iota(jnp.int32, (n, _LANES), 0)
      tile = jnp.zeros((n, _LANES), jnp.float32)
      for i in range(k):
        here = idx_ref[pl.ds(i, 1), tokens] == expert
        tile = jnp.where(here, values_ref[pl.ds(i, 1), tokens], tile)
      tile = tile.astype(out_ref.dtype)
      if transposed:
        out_ref[pl.ds(first, n), tokens] = tile
      else:
        out_ref[tokens, pl.ds(first, n)] = tile.T
