# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Meshes of TPUs that are not here."""

from jax.sharding import AbstractDevice, AbstractMesh, AxisType


def abstract(
  size: int, axis_type: AxisType, kind: str = "TPU v6 lite"
) -> AbstractMesh:
  """A mesh with one axis, "data", of devices of a kind."""
  tpu = AbstractDevice(device_kind=kind, num_cores=1, platform="tpu")
  return AbstractMesh(
    (size,), ("data",), axis_types=(axis_type,), abstract_device=tpu
  )
