# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Text that the model writes: it goes on from bytes that it has not trained on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from model import Transformer

from jaxroute.types import PyTree

LENGTH = 256  # bytes
TEMPERATURE = 0.7


def generate(
  model: Transformer,
  variables: PyTree,
  prompt: jax.Array,
  key: jax.Array,
  rows: int = 1,
) -> jax.Array:
  """Samples byte after byte, each from a window over the bytes before it.

  No collection is mutable, so no load is counted and no bias moves.

  Args:
    model: `[B, S]` bytes to `[B, S, 256]` logits of the next byte.
    variables: its parameters and the biases.
    prompt: `[S]` uint8. The first window; its size is that of all.
    key: of the samples.
    rows: how many times the same is written: the B of the model.

  Returns:
    `[LENGTH]` uint8.
  """

  def next_byte(window: jax.Array, key: jax.Array):
    windows = jnp.broadcast_to(window, (rows, *window.shape))
    logits: Any = model.apply(variables, windows)
    byte = jax.random.categorical(key, logits[0, -1] / TEMPERATURE)
    byte = byte.astype(jnp.uint8)
    return jnp.append(window[1:], byte), byte

  return jax.lax.scan(next_byte, prompt, jax.random.split(key, LENGTH))[1]


def describe(prompt: np.ndarray, text: np.ndarray) -> str:
  """Prompt and sample, to be printed.

  Args:
    prompt: `[S]` uint8.
    text: `[LENGTH]` uint8.
  """
  return (
    f"--- {len(prompt)} bytes that were held out\n{_decode(prompt)}\n"
    f"--- and {len(text)} that the model writes, at temperature {TEMPERATURE}\n"
    f"{_decode(text)}\n"
  )


def _decode(text: np.ndarray) -> str:
  """UTF-8, without what would move the cursor of a terminal."""
  decoded = text.tobytes().decode(errors="replace")
  return "".join(
    c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}"
    for c in decoded
  )
