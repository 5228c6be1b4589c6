# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Text that a model writes: from which windows, and how it is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sample as sample_lib

pytestmark = pytest.mark.any_jax


class _Successor:
  """Says that the next byte is one more than the sum of the first and last."""

  def apply(self, variables, tokens):
    del variables
    assert tokens.shape == (1, 5) and tokens.dtype == jnp.uint8
    following = tokens[:, 0] + tokens[:, -1] + 1
    logits = jax.nn.one_hot(following.astype(jnp.int32), 256) * 1e3
    # What it says of the other positions is not to be used.
    return jnp.zeros((1, 5, 256)).at[:, -1].set(logits)


def test_a_byte_follows_the_window_before_it(key):
  prompt = np.array([250, 1, 2, 3, 4], np.uint8)
  found = sample_lib.generate(_Successor(), {}, jnp.asarray(prompt), key)
  expected = [*prompt]
  for _ in range(sample_lib.LENGTH):
    expected.append(np.uint8((int(expected[-5]) + int(expected[-1]) + 1) % 256))
  assert found.dtype == jnp.uint8
  np.testing.assert_array_equal(found, expected[5:])


def test_any_bytes_can_be_shown():
  text = np.frombuffer("é\x1b[2J\r".encode() + b"\xff\tx\n", np.uint8)
  shown = sample_lib.describe(text, text[:2])
  _, prompt, last, heading, written, *_ = shown.split("\n")
  assert prompt == "é\ufffd[2J\ufffd\ufffd\tx" and last == ""
  assert written == "é"
  assert "11 bytes that were held out" in shown
  assert "2 that the model writes" in heading
