# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What `jax.lax.ragged_all_to_all` means, where XLA has none: on a CPU."""

import jax
import jax.numpy as jnp
import pytest

from jaxroute.parallel import all_to_all


def emulated(operand, output, from_, sent, to, taken, *, axis_name):
  """The exchange by an all-gather: every device picks what is sent to it."""
  del taken  # what is sent says it
  size, me = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

  def gather(x):
    return jax.lax.all_gather(x, axis_name)

  # Of all slices, `[P, slices]`, those that are sent to this device.
  from_, sent, to = (
    gather(x).reshape(size, size, -1)[:, me].reshape(-1)
    for x in (from_, sent, to)
  )
  row = jnp.arange(output.shape[0], dtype=jnp.int32)
  is_in = (row[:, None] >= to[None]) & (row[:, None] < (to + sent)[None])
  which = jnp.argmax(is_in, axis=1)
  index = jnp.clip(from_[which] + row - to[which], 0, len(operand) - 1)
  peer = which // (len(to) // size)
  found = gather(operand)[peer, index]
  return jnp.where(jnp.any(is_in, axis=1)[:, None], found, output)


@pytest.fixture
def emulated_ragged(monkeypatch):
  """Lets devices of a CPU have the ragged exchange."""
  monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated)
  monkeypatch.setattr(all_to_all, "_no_ragged", lambda mesh: None)
