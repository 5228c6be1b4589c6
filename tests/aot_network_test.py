# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The time of collectives on links, held to formulae."""

import itertools
import types

import numpy as np
import pytest

from jaxroute.aot import chips, collectives, network

pytestmark = pytest.mark.any_jax

SIZE = 10**9


class Mesh:
  """A mesh over a slice, of devices of which only `coords` are known."""

  def __init__(self, slice_shape, sizes):
    places = itertools.product(*map(range, slice_shape))
    devices = np.empty(np.prod(slice_shape), object)
    for n, at in enumerate(places):
      devices[n] = types.SimpleNamespace(coords=at)
    self.devices = devices.reshape(tuple(sizes.values()))
    self.shape = sizes
    self.size = devices.size


def _seconds(op, mesh, axes, chip):
  collective = collectives.Collective(op, axes, "", 1, SIZE, False)
  return network.seconds(collective, mesh, chips.CHIPS[chip])


# On a ring of P an all-to-all takes P / 8 of its bytes on each link, on a line
# of P chips P / 4: half of half of all rows cross the middle.
@pytest.mark.parametrize(
  ("chip", "shape", "sizes", "links"),
  [
    ("v6e", (16, 16), dict(data=16, expert=16), 16 / 8),
    ("v6e", (16, 16), dict(expert=256), 16 / 8),
    ("v6e", (4, 4), dict(data=4, expert=4), 4 / 4),
    ("v5p", (8, 8, 8), dict(data=8, expert=64), 8 / 8),
    ("v5e", (8, 8), dict(data=8, expert=8), 8 / 4),
  ],
)
def test_an_all_to_all_takes_as_long_as_its_busiest_link(
  chip, shape, sizes, links
):
  rate = chips.CHIPS[chip].link_bandwidth
  found = _seconds("all-to-all", Mesh(shape, sizes), ("expert",), chip)
  assert found == pytest.approx(links * SIZE / rate, rel=0.1)


# A ring is filled both ways, and two dimensions at once.
@pytest.mark.parametrize(
  ("chip", "shape", "sizes", "axes", "links"),
  [
    ("v6e", (16, 16), dict(data=16, expert=16), ("data",), 2),
    ("v6e", (16, 16), dict(data=16, expert=16), ("data", "expert"), 4),
    ("v6e", (4, 4), dict(data=4, expert=4), ("data",), 1),
    ("v5p", (4, 4, 4), dict(data=16, expert=4), ("data",), 4),
    # Every second chip: two groups share the links of a ring.
    ("v6e", (16,), dict(data=8, expert=2), ("data",), 2 / 2),
  ],
)
def test_a_sum_fills_the_links_of_its_axes(chip, shape, sizes, axes, links):
  rate = chips.CHIPS[chip].link_bandwidth
  group = np.prod([sizes[a] for a in axes])
  found = _seconds("all-reduce", Mesh(shape, sizes), axes, chip)
  sent = 2 * (group - 1) / group * SIZE
  assert found == pytest.approx(sent / links / rate)
  gathered = _seconds("all-gather", Mesh(shape, sizes), axes, chip)
  assert gathered == pytest.approx(found / 2)


def test_the_gpus_of_a_node_reach_each_other_alike():
  mesh = Mesh((8,), dict(expert=8))
  found = _seconds("ragged-all-to-all", mesh, ("expert",), "h100")
  assert found == pytest.approx(7 / 8 * SIZE / 450e9)


def test_devices_of_one_chip_share_its_links():
  sizes = dict(data=4, expert=4)
  alone = _seconds("all-gather", Mesh((4, 4, 1), sizes), ("data",), "v5p")
  shared = _seconds("all-gather", Mesh((4, 4, 1), sizes), ("data",), "tpu7x")
  assert shared == pytest.approx(2 * alone)
