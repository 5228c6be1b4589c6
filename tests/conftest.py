# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What every test stands on: eight CPU devices and strict promotion."""

import os

# Read once, when jax makes its clients, so set before jax is imported. Programs
# here are small, and take longer to optimize than to run.
os.environ["XLA_FLAGS"] = " ".join(
  (
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_llvm_disable_expensive_passes=true",
  )
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The TPU compiler works without a TPU, but looks for one unless told not to.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import hypothesis
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a shape compiles, which no deadline survives; and a test
# that fails does so in every run.
hypothesis.settings.register_profile(
  "jaxroute", deadline=None, derandomize=True
)
hypothesis.settings.load_profile("jaxroute")


@pytest.fixture
def key() -> jax.Array:
  """A random key, the same in every run and every test."""
  return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _release_programs():
  """Frees what a file compiled: of thousands of programs, a compiler may die."""
  yield
  jax.clear_caches()


@pytest.fixture(autouse=True)
def _strict_dtype_promotion(request):
  mode = "strict"
  if request.node.get_closest_marker("implicit_promotion"):
    mode = "standard"
  with jax.numpy_dtype_promotion(mode):
    yield


def pytest_runtest_setup(item):
  """Skips a test marked `gpu` or `tpu` where there is none."""
  for platform in ("gpu", "tpu"):
    if item.get_closest_marker(platform):
      found = {device.platform for device in jax.devices()}
      if platform not in found:
        pytest.skip(
          f"needs a {platform.upper()}, found {sorted(found)}; where there is"
          " one, set JAX_PLATFORMS to it"
        )
