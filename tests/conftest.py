# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What every test stands on: eight CPU devices, strict promotion, one compile cache.

With JAX_PLATFORMS=cuda or tpu the tests run on that device, compiled as users
compile; a test of several devices or of a CPU's programs is skipped there. One
that hangs, or breaks the device for its process, ends the process: under
pytest-xdist another takes the tests that are left.
"""

import collections
import faulthandler
import os
import pathlib
import sys

# Read once, when jax makes its clients, so set before jax is imported.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if os.environ["JAX_PLATFORMS"] != "tpu":
  # The TPU compiler works without a TPU, but looks for one unless told not to.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
  os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
  os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
if os.environ["JAX_PLATFORMS"] in ("", "cpu"):
  os.environ["XLA_FLAGS"] = " ".join(
    (
      os.environ.get("XLA_FLAGS", ""),
      "--xla_force_host_platform_device_count=8",
    )
  )
  # All workers, and the programs that tests start, share what they compile. They
  # inherit the environment.
  os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(pathlib.Path(sys.prefix) / "jax_cache")
  )
  os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
  # Most programs here are small, and take longer to optimize than to run.
  os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
else:
  # An accelerator rounds the factors of a float32 product unless told not to.
  os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
  # Several workers share its memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import hypothesis
import jax
import jax.numpy as jnp
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a shape compiles, which no deadline survives; and a test
# that fails does so in every run.
hypothesis.settings.register_profile(
  "jaxroute", deadline=None, derandomize=True
)
hypothesis.settings.load_profile("jaxroute")


def pytest_addoption(parser):
  """Adds the options by which a run leaves tests out, or compiles as users do."""
  parser.addoption(
    "--all",
    action="store_true",
    help="run all, the long tables too that are marked `long`; wins over --second",
  )
  parser.addoption(
    "--second",
    action="store_true",
    help="leave out what is marked `any_jax`: it ran on another version of JAX",
  )
  parser.addoption(
    "--optimize",
    action="store_true",
    help="compile what is marked `optimized` as users do, by XLA's default",
  )


def pytest_collection_modifyitems(config, items):
  """Deselects by the options."""
  if config.getoption("all"):
    return
  unwanted = {"long"}
  if config.getoption("second"):
    unwanted.add("any_jax")
  kept, left_out = [], []
  for item in items:
    is_unwanted = any(map(item.get_closest_marker, unwanted))
    (left_out if is_unwanted else kept).append(item)
  items[:] = kept
  config.hook.pytest_deselected(items=left_out)


def pytest_terminal_summary(terminalreporter):
  """Prints the seconds of every file, of setting up and of all its tests."""
  seconds = collections.Counter()
  for reports in terminalreporter.stats.values():
    for report in reports:
      if hasattr(report, "duration") and hasattr(report, "location"):
        seconds[report.location[0]] += report.duration
  terminalreporter.section("seconds by file")
  for name, spent in seconds.most_common():
    if spent >= 1:
      terminalreporter.write_line(f"{spent:8.1f}  {name}")
  terminalreporter.write_line(f"{seconds.total():8.1f}  in all, of all workers")


@pytest.fixture
def key() -> jax.Array:
  """A random key, the same in every run and every test."""
  return jax.random.key(0)


@pytest.fixture(autouse=True, scope="module")
def _programs_of_a_file(request):
  """Compiles a file's programs as its marker says, and frees them at its end.

  Of thousands of programs, XLA's CPU compiler may die.
  """
  is_optimized = request.config.getoption("optimize") and any(
    mark.name == "optimized" for mark in request.node.iter_markers()
  )
  name = "jax_disable_most_optimizations"
  before = jax.config.read(name)
  if is_optimized:
    jax.config.update(name, False)
  yield
  jax.config.update(name, before)
  jax.clear_caches()


@pytest.fixture(autouse=True)
def _strict_dtype_promotion(request):
  mode = "strict"
  if request.node.get_closest_marker("implicit_promotion"):
    mode = "standard"
  with jax.numpy_dtype_promotion(mode):
    yield


@pytest.fixture(autouse=True)
def _device_is_there_for_the_next_test():
  if jax.default_backend() == "cpu":
    yield
    return
  # Blocked in a kernel, Python would not run a handler of its own.
  faulthandler.dump_traceback_later(100, exit=True, file=sys.__stderr__)
  yield
  faulthandler.cancel_dump_traceback_later()
  try:
    jax.block_until_ready(jnp.zeros(1) + 1)
  except jax.errors.JaxRuntimeError:
    os._exit(1)


def pytest_runtest_setup(item):
  """Skips a test that needs another device than there is, or more of them."""
  there = [device.platform for device in jax.devices()]
  for platform in ("gpu", "tpu"):
    if item.get_closest_marker(platform) and platform not in there:
      pytest.skip(
        f"needs a {platform.upper()}, found {sorted(set(there))}; where there is"
        " one, set JAX_PLATFORMS to it"
      )
  cpu = item.get_closest_marker("cpu")
  if cpu and "cpu" not in there:
    pytest.skip(f"of a CPU alone: {cpu.args[0]}")
  needed = item.get_closest_marker("devices")
  if needed and len(there) < needed.args[0]:
    pytest.skip(f"needs {needed.args[0]} devices, found {len(there)}")
