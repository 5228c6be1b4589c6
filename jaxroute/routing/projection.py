# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The router's projection: tokens to float32 logits."""

import jax
import jax.numpy as jnp

from jaxroute import checks


def project(
  tokens: jax.Array,
  router_weight: jax.Array,
  token_mask: jax.Array | None = None,
) -> jax.Array:
  """Logits in float32, whatever the dtype of the tokens.

  Args:
    tokens: `[T, D]` floating point.
    router_weight: `[D, E]`. The router projection.
    token_mask: `[T]` bool. Padding counts as 0, so that no NaN in it, times a
      zero cotangent, reaches the gradient of `router_weight`.

  Returns:
    `[T, E]` float32.

  Raises:
    ValueError: if a shape or dtype does not fit.
  """
  check_tokens(tokens)
  checks.check_array(
    "router_weight",
    router_weight,
    "[D, E]",
    "floating point",
    "Its rows are the features of a token.",
    D=tokens.shape[1],
  )
  checks.check_mask(token_mask, tokens.shape[0])
  if token_mask is not None:
    zero = jnp.zeros((), tokens.dtype)
    tokens = jnp.where(token_mask[:, None], tokens, zero)
  if tokens.dtype not in (jnp.bfloat16, jnp.float16):
    tokens = tokens.astype(jnp.float32)
  # Narrow tokens stay narrow: a TPU multiplies bfloat16 by float32 in 3 passes,
  # float32 by float32 in 6, with the same products.
  return jax.lax.dot_general(
    tokens,
    router_weight.astype(jnp.float32),
    dimension_numbers=(((1,), (0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def check_tokens(tokens: jax.Array) -> None:
  """Raises ValueError unless `tokens` are `[T, D]` floating point."""
  fix = "Flatten batch and sequence into T, and embed integer tokens first."
  checks.check_array("tokens", tokens, "[T, D]", "floating point", fix)
