# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rows moved by the kernels for TPU, interpreted, against NumPy.

Operands are small integers, whose sums are exact in float32.
"""

import jax.numpy as jnp
import numpy as np

from jaxroute.kernels.tpu import rows as kernel

T, N, D = 199, 600, 2048


def _integers(seed, *shape):
  values = np.random.default_rng(seed).integers(-3, 4, size=shape)
  return values.astype(np.float32)


def _token():
  """`[N]`: three rows of every token, but for rows of none, T."""
  token = np.repeat(np.arange(T), 3)
  token = np.append(np.random.default_rng(0).permutation(token), [T, T, T])
  token[-50:] = T
  return token.astype(np.int32)


def test_add():
  token, rows, weights = _token(), _integers(0, N, D), _integers(1, N)
  expected = np.zeros((T + 1, D), np.float32)
  np.add.at(expected, token, rows * weights[:, None])
  first = _integers(2, T)
  expected[:T] += first[:, None]
  rows[-50:] = np.nan
  actual = kernel.add(
    jnp.asarray(rows, jnp.bfloat16),
    jnp.asarray(token),
    jnp.asarray(weights),
    num_tokens=T,
    dtype=jnp.float32,
    first=jnp.asarray(first),
    interpret=True,
  )
  np.testing.assert_array_equal(actual, expected[:T])


def test_add_without_weights():
  token, rows = _token(), _integers(0, N, D)
  expected = np.zeros((T + 1, D), np.float32)
  np.add.at(expected, token, rows)
  actual = kernel.add(
    jnp.asarray(rows),
    jnp.asarray(token),
    None,
    num_tokens=T,
    dtype=jnp.bfloat16,
    interpret=True,
  )
  np.testing.assert_array_equal(actual, jnp.asarray(expected[:T], jnp.bfloat16))


def test_take_and_multiply():
  token, rows, weights = _token(), _integers(0, N, D), _integers(1, N)
  tokens = _integers(2, T, D)
  taken = np.vstack([tokens, np.zeros_like(tokens[:1])])[token]
  operands = jnp.asarray(tokens, jnp.bfloat16), jnp.asarray(token)
  copies = kernel.take(
    *operands, jnp.asarray(weights), dtype=jnp.float32, interpret=True
  )
  np.testing.assert_array_equal(copies, taken * weights[:, None])
  products = kernel.multiply(
    operands[0], jnp.asarray(rows), operands[1], interpret=True
  )
  expected = (taken * rows).sum(1)
  np.testing.assert_array_equal(products[token < T], expected[token < T])


def test_what_it_cannot_move_is_said():
  def reason(t=8192, n=65536, d=2048, dtype=jnp.bfloat16):
    return kernel.unsupported(t, n, d, dtype)

  assert reason() is None
  assert reason(d=7168) is None
  assert "got 1536" in reason(d=1536)
  assert "got 511" in reason(n=511)
  assert "8517 tokens of bfloat16, got 8518" in reason(t=8518)
  assert "6384 tokens of float32, got 8192" in reason(dtype=jnp.float32)
  assert "float16" in reason(dtype=jnp.float16)
