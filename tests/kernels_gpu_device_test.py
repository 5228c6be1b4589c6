# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Which GPU a program is for, and whether the kernels run there."""

import gpu_mesh
import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxroute.kernels.gpu import device


def _on(kind, function, platform="gpu"):
  mesh = gpu_mesh.abstract(kind=kind, platform=platform)
  with jax.sharding.use_abstract_mesh(mesh):
    return function()


@pytest.mark.parametrize(
  ("kind", "capability"),
  (
    ("NVIDIA H100 80GB HBM3", (9, 0)),
    ("NVIDIA H100 PCIe", (9, 0)),
    ("NVIDIA H200", (9, 0)),
    ("NVIDIA GH200 480GB", (9, 0)),
    ("NVIDIA B200", (10, 0)),
    ("NVIDIA GB200", (10, 0)),
    ("NVIDIA B300 SXM6 AC", (10, 3)),
    ("NVIDIA A100-SXM4-80GB", None),
    ("NVIDIA L4", None),
    ("NVIDIA GeForce RTX 5090", None),
    ("AMD Instinct MI300X", None),
    ("TPU v6 lite", None),
    ("H100", None),
    ("", None),
  ),
)
def test_the_name_of_a_device_tells_its_capability(kind, capability):
  assert _on(kind, device.capability) == capability


@pytest.mark.parametrize("kind", (gpu_mesh.H100, "NVIDIA B200"))
def test_hopper_and_blackwell_have_the_kernels(kind):
  assert _on(kind, device.unavailable) == device.too_old()


@pytest.mark.parametrize(
  "kind", ("NVIDIA A100-SXM4-80GB", "NVIDIA L4", "AMD Instinct MI300X")
)
def test_others_have_not(kind):
  assert "no NVIDIA GPU" in _on(kind, device.unavailable)


def test_a_tpu_has_not():
  assert _on("TPU v6 lite", device.capability, "tpu") is None
  assert "no NVIDIA GPU" in _on("TPU v6 lite", device.unavailable, "tpu")


def test_without_a_mesh_it_is_the_default_device():
  assert device.capability() is None  # A CPU.
  assert device.unavailable() == "the program is for no NVIDIA GPU"
  # A mesh that does not say what it is of leaves it at that.
  mesh = AbstractMesh((2,), ("data",))
  with jax.sharding.use_abstract_mesh(mesh):
    assert device.capability() is None


class _Gpu:
  platform = "gpu"

  def __init__(self, compute_capability):
    self.compute_capability = compute_capability


@pytest.mark.parametrize(
  ("reported", "capability", "words"),
  (
    ("9.0", (9, 0), None),
    ("10.3", (10, 3), None),
    ("10", (10, 0), None),
    ("8.0", (8, 0), "9.x or 10.x is needed, got 8.0"),
    ("8.9", (8, 9), "got 8.9"),
    ("12.0", (12, 0), "got 12.0"),
    ("gfx942", None, "no NVIDIA GPU"),
  ),
)
def test_a_gpu_that_is_here_reports_it(
  monkeypatch, reported, capability, words
):
  monkeypatch.setattr(jax, "devices", lambda: [_Gpu(reported)])
  assert device.capability() == capability
  if words:
    assert words in device.unavailable()
  else:
    assert device.unavailable() == device.too_old()


def test_an_abstract_device_wins_over_the_default(monkeypatch):
  monkeypatch.setattr(jax, "devices", lambda: [_Gpu("9.0")])
  cpu = AbstractDevice(device_kind="cpu", num_cores=None, platform="cpu")
  mesh = AbstractMesh((1,), ("data",), abstract_device=cpu)
  with jax.sharding.use_abstract_mesh(mesh):
    assert device.capability() is None


@pytest.mark.parametrize(
  ("version", "is_old"),
  (((0, 10, 2), True), ((0, 11, 0), False), ((0, 12, 0), False)),
)
def test_versions_of_jax_that_have_such_kernels(monkeypatch, version, is_old):
  monkeypatch.setattr(jax, "__version_info__", version)
  assert bool(device.too_old()) == is_old
  if is_old:
    assert "jax 0.11 or newer" in device.too_old()
