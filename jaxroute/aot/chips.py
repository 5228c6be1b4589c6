# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Chips that programs are compiled for, and meshes of them."""

import dataclasses
import math
import re
from collections.abc import Mapping

import jax
import numpy as np
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType

from jaxroute.aot import gpu, tpu

# The GPUs of a node reach each other at full rate.
_GPUS_PER_NODE = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One of JAX's devices: a chip, or one of the two of a chip of TPU7x.

  All but `hbm_bytes` is what the vendor promises at best.

  Attributes:
    platform: "tpu" or "cuda".
    flops: FLOP/s of dense bfloat16 products.
    hbm_bytes: that one program may take.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s, one way: of one link between neighbours for a TPU,
      of all links together for a GPU.
    ring: along a dimension of the slice the links of a TPU close to a ring if its
      size is a multiple of this.
    per_chip: devices that share the links of a chip.
    largest: sizes of the largest slice of a TPU that can be had, in order.
    example: a topology of them.
  """

  platform: str
  flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  ring: int = 1
  per_chip: int = 1
  largest: tuple[int, ...] = ()
  example: str

  @property
  def link(self) -> str:
    """What the links are called."""
    return "ICI" if self.platform == "tpu" else "NVLink"


def _gpu(name: str, flops: float, link_bandwidth: float) -> Chip:
  return Chip(
    platform="cuda",
    flops=flops,
    hbm_bytes=gpu.TARGETS[name]["device_memory_size"],
    hbm_bandwidth=gpu.TARGETS[name]["memory_bandwidth"],
    link_bandwidth=link_bandwidth,
    example=f"{name}:8",
  )


# TPUs: https://docs.cloud.google.com/tpu/docs/v5e, /v5p, /v6e and /tpu7x, where the
# bandwidth of the interconnect is given for a chip, all links, both ways; when
# links close to a ring is in https://jax-ml.github.io/scaling-book/tpus. The
# compiler of jax 0.12.0 refuses programs of more than `hbm_bytes`.
# GPUs: https://www.nvidia.com/en-us/data-center/h100 and /hgx, whose FLOP/s are
# with sparsity, twice the dense ones, and whose NVLink is both ways.
CHIPS = {
  "v5e": Chip(
    platform="tpu",
    flops=197e12,
    hbm_bytes=15.75 * 2**30,
    hbm_bandwidth=819e9,
    link_bandwidth=400e9 / 4 / 2,
    ring=16,
    largest=(16, 16),
    example="v5e:4x4",
  ),
  "v5p": Chip(
    platform="tpu",
    flops=459e12,
    hbm_bytes=95.73 * 2**30,
    hbm_bandwidth=2765e9,
    link_bandwidth=1200e9 / 6 / 2,
    ring=4,
    largest=(16, 16, 24),
    example="v5p:4x4x4",
  ),
  "v6e": Chip(
    platform="tpu",
    flops=918e12,
    hbm_bytes=31.24 * 2**30,
    hbm_bandwidth=1638e9,
    link_bandwidth=800e9 / 4 / 2,
    ring=16,
    largest=(16, 16),
    example="v6e:16x16",
  ),
  "tpu7x": Chip(
    platform="tpu",
    flops=2307e12 / 2,
    hbm_bytes=94.74 * 2**30,
    hbm_bandwidth=7380e9 / 2,
    link_bandwidth=1200e9 / 6 / 2,
    ring=4,
    per_chip=2,
    largest=(16, 24, 24),
    example="tpu7x:4x4x4",
  ),
  "h100": _gpu("h100", flops=1979e12 / 2, link_bandwidth=900e9 / 2),
  "b200": _gpu("b200", flops=4500e12 / 2, link_bandwidth=1800e9 / 2),
}
"""Chip by the name that a topology begins with."""


def chip(topology: str) -> Chip:
  """The chip of a topology.

  Args:
    topology: as for `devices`.

  Returns:
    The chip.

  Raises:
    ValueError: if no such chip is known.
  """
  name = topology.partition(":")[0]
  if name not in CHIPS:
    examples = ", ".join(repr(chip.example) for chip in CHIPS.values())
    raise ValueError(
      "`topology` must be a chip, and how many lie along every dimension, as in"
      f" {examples}, got {topology!r}."
    )
  return CHIPS[name]


def missing(topology: str) -> str:
  """Why nothing can be compiled for a topology here, and how to mend it; or ""."""
  platform = chip(topology).platform
  return tpu.missing() if platform == "tpu" else gpu.missing()


def devices(topology: str) -> list[jax.Device]:
  """Chips that are not here, to compile for.

  Args:
    topology: such as "v6e:16x16", "v5p:8x16x16", or "h100:8" for as many GPUs of
      one node.

  Returns:
    Its devices; two for every chip of TPU7x.

  Raises:
    ValueError: if the topology is not known here, or not to the compiler.
    RuntimeError: if the compiler is not installed; with how to get it.
  """
  kind = chip(topology)
  if why := missing(topology):
    raise RuntimeError(why)
  name, colon, shape = topology.partition(":")
  if kind.platform == "cuda":
    if not re.fullmatch(r"[1-8]" if colon else "", shape):
      raise ValueError(
        f"`topology` must be of 1 to {_GPUS_PER_NODE} GPUs of one node, as in"
        f" '{name}:{_GPUS_PER_NODE}', got {topology!r}."
      )
    return gpu.devices(name, int(shape or 1))
  sizes = _slice(topology)
  tpu.prepare()
  try:
    # A host has 2 x 2 chips unless told otherwise.
    alone = math.prod(sizes) == 1
    options = {"chips_per_host_bounds": [1, 1, 1]} if alone else {}
    found = topologies.get_topology_desc(
      platform="tpu", topology_name=topology, **options
    )
  except (ValueError, jax.errors.JaxRuntimeError) as error:
    raise ValueError(
      f"`topology` must be a slice that the compiler knows, as {kind.example!r},"
      f" got {topology!r}: {error}"
    ) from error
  return list(found.devices)


def _slice(topology: str) -> list[int]:
  """Sizes of a slice. The compiler takes some that do not exist, or dies of them."""
  kind, text = chip(topology), topology.partition(":")[2]
  is_written = re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", text)
  sizes = [int(size) for size in text.split("x")] if is_written else []
  fits = len(sizes) == len(kind.largest) and all(
    size <= most for size, most in zip(sorted(sizes), kind.largest, strict=True)
  )
  if not fits:
    largest = "x".join(map(str, kind.largest))
    raise ValueError(
      f"`topology` must be a slice of {len(kind.largest)} dimensions, at most"
      f" {largest}, as {kind.example!r}, got {topology!r}."
    )
  return sizes


def parse_mesh(text: str, number: int) -> dict[str, int]:
  """Axes of a mesh and their sizes.

  Args:
    text: such as "data=16,expert=16", of these two names; "" for one axis,
      "expert".
    number: of devices.

  Returns:
    Name to size.

  Raises:
    ValueError: if the text is of another form, or its devices another number.
  """
  text = text or f"expert={number}"
  sizes = dict(re.findall(r"(data|expert)=(\d+)(?:,|$)", text))
  if ",".join(f"{name}={size}" for name, size in sizes.items()) != text:
    raise ValueError(
      "`mesh` must be of the axes data and expert and their sizes, each once, as"
      f" in 'data=16,expert=16', got {text!r}."
    )
  mesh = {name: int(size) for name, size in sizes.items()}
  if math.prod(mesh.values()) != number:
    raise ValueError(
      f"`mesh` must have as many devices as the topology, {number}, got {text!r},"
      f" which has {math.prod(mesh.values())}."
    )
  return mesh


def make_mesh(
  devices: list[jax.Device], sizes: Mapping[str, int]
) -> jax.sharding.Mesh:
  """A mesh of Auto axes, laid over the links as `jax.make_mesh` does.

  Args:
    devices: all of a topology.
    sizes: of the axes.

  Returns:
    The mesh.
  """
  shape = tuple(sizes.values())
  if devices[0].platform == "tpu":
    grid = mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  else:
    grid = np.array(devices).reshape(shape)
  return jax.sharding.Mesh(
    grid, tuple(sizes), axis_types=(AxisType.Auto,) * len(shape)
  )
