# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Meshes of GPUs that are not here, and what the tests of their kernels need."""

import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxroute.kernels.gpu import device

H100 = "NVIDIA H100 80GB HBM3"

needs_kernels = pytest.mark.skipif(
  device.too_old() is not None, reason=str(device.too_old())
)
"""Skips where this version of JAX has no such kernels."""


def abstract(
  size: int = 1,
  axis_type: AxisType = AxisType.Auto,
  kind: str = H100,
  platform: str = "gpu",
) -> AbstractMesh:
  """A mesh with one axis, "data", of devices of a kind."""
  gpu = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
  return AbstractMesh(
    (size,), ("data",), axis_types=(axis_type,), abstract_device=gpu
  )


def export(function, *args) -> str:
  """The program of a function for CUDA, as text.

  Args:
    function: is traced anew, so that nothing is cached of another mesh.
    *args: arrays, or abstract ones.
  """
  exported = jax.export.export(
    jax.jit(lambda *args: function(*args)), platforms=["cuda"]
  )(*args)
  return exported.mlir_module()
