# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Which exchange a layer works by, on each kind of mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute.parallel import shards
from jaxroute.types import Partition

pytestmark = pytest.mark.any_jax


def _partition(**kwargs):
  return Partition(
    token_axes=("data", "expert"), expert_axis="expert", **kwargs
  )


@pytest.mark.devices(8)
@pytest.mark.parametrize(
  ("partition", "shape", "expected"),
  (
    (None, (2, 4), None),
    (Partition(token_axes="data"), (2, 4), None),
    (Partition(token_axes="data", expert_axis="expert"), (2, 4), "all_gather"),
    (_partition(exchange="all_gather"), (2, 4), "all_gather"),
    (_partition(exchange="equal"), (2, 4), "equal"),
    # A device that has all experts sends its tokens nowhere, unless it is to drop.
    (_partition(exchange="equal"), (8, 1), None),
    (_partition(exchange="equal", drop=True), (8, 1), "equal"),
  ),
)
def test_the_exchange_of_a_mesh(partition, shape, expected):
  devices = np.array(jax.devices()[:8]).reshape(shape)
  with jax.set_mesh(jax.sharding.Mesh(devices, ("data", "expert"))):
    assert shards.exchange_of(jnp.zeros((16, 4)), partition) == expected


def test_an_exchange_needs_a_mesh():
  with pytest.raises(ValueError, match=r"jax\.set_mesh"):
    shards.exchange_of(jnp.zeros((16, 4)), _partition())
