# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How long collectives take at the rates of the links: an estimate, at best.

Links are taken to be full all the time, without latency. What TPUs exchange is
routed along one dimension of the slice after another, the shorter way round.
"""

import functools
from collections.abc import Mapping

import jax
import numpy as np

from jaxroute.aot import chips, collectives


def seconds(
  collective: collectives.Collective,
  mesh: jax.sharding.Mesh,
  chip: chips.Chip,
) -> float:
  """The time of a collective, if nothing else is on the links.

  Args:
    collective: of a program for `mesh`.
    mesh: of devices of `chip`.
    chip: of which devices.

  Returns:
    Seconds, of all `count`.
  """
  groups = _groups(collective.axes, mesh)
  sent = collective.sent(groups.shape[1])
  if chip.platform != "tpu":
    return sent / chip.link_bandwidth
  at = np.array([device.coords for device in mesh.devices.flat])
  size = at.max(axis=0) + 1
  if "all-to-all" in collective.op:
    to_each = collective.bytes / groups.shape[1]
    pairs = _busiest(mesh, collective.axes, chip.ring)
    return pairs * to_each / chip.link_bandwidth
  return sent / (_width(at[groups], size, chip) * chip.link_bandwidth)


def _groups(axes: tuple[str, ...], mesh: jax.sharding.Mesh) -> np.ndarray:
  """`[groups, devices of each]`: places in the mesh."""
  shape: Mapping[str, int] = dict(mesh.shape)
  ids = np.arange(mesh.size).reshape(tuple(shape.values()))
  order = [a for a in shape if a not in axes] + [a for a in shape if a in axes]
  ids = ids.transpose([list(shape).index(a) for a in order])
  return ids.reshape(-1, int(np.prod([shape[a] for a in axes])))


@functools.cache
def _busiest(
  mesh: jax.sharding.Mesh, axes: tuple[str, ...], ring: int
) -> float:
  """Of an all-to-all over axes, the pairs of devices on the busiest link."""
  at = np.array([device.coords for device in mesh.devices.flat])
  size = at.max(axis=0) + 1
  links = np.zeros((len(size), 2, size.prod()))
  for group in _groups(axes, mesh):
    source = np.repeat(at[group], len(group), axis=0)
    target = np.tile(at[group], (len(group), 1))
    for d, n in enumerate(size):
      away = target[:, d] - source[:, d]
      if _is_ring(n, ring):
        away = (away + n // 2) % n - n // 2
        # Of those that are as far both ways, half go the other one.
        turned = (away == -n / 2) & (source.sum(axis=1) % 2 == 0)
        away = np.where(turned, n // 2, away)
      for step in range(int(np.abs(away).max())):
        for sign in (0, 1):
          going = away > step if sign else -away > step
          where = np.ravel_multi_index(source[going].T, size)
          links[d, sign] += np.bincount(where, minlength=size.prod())
        moving = np.abs(away) > step
        source[moving, d] = (source[moving, d] + np.sign(away[moving])) % n
  return float(links.max())


def _width(at: np.ndarray, size: np.ndarray, chip: chips.Chip) -> float:
  """Links out of a device that a ring over its group may fill."""
  group = at[0]
  width = 0.0
  for d, n in enumerate(size):
    there = np.unique(group[:, d])
    if len(there) > 1:
      # Between those of a group others may lie, whose own groups share the links.
      gap = (there[-1] - there[0]) / (len(there) - 1)
      is_ring = _is_ring(n, chip.ring) and gap * len(there) == n
      width += (2 if is_ring else 1) / gap
  mine = len(group) / len(np.unique(group, axis=0))
  # What devices of one chip exchange takes no link.
  return width * mine / chip.per_chip if width else np.inf


def _is_ring(size: int, ring: int) -> bool:
  return size > 2 and size % ring == 0
