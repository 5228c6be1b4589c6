# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What runs on a GPU, where there is none: it says so, and is ready."""

import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_suite
import pytest

pytestmark = pytest.mark.any_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]


def _run(*command, **environment):
  environment = {"PYTHONPATH": str(ROOT), **environment}
  return subprocess.run(
    command,
    capture_output=True,
    cwd=ROOT,
    env=os.environ | environment,
    text=True,
  )


@pytest.mark.cpu("it shows what happens without a GPU")
def test_the_suite_refuses_to_run_without_a_gpu(tmp_path):
  out = tmp_path / "suite.json"
  done = _run(
    "bash", "benchmarks/gpu_suite.sh", str(out), PYTHON=sys.executable
  )
  assert done.returncode == 1
  assert "expected a GPU that JAX finds, got none" in done.stderr
  assert "jax[cuda13]" in done.stderr
  assert not out.exists()
  done = _run(sys.executable, "benchmarks/gpu.py", "--tables=routing")
  assert done.returncode == 1
  assert "expected a GPU, found cpu. Give --target" in done.stderr + done.stdout


def test_the_tests_that_it_runs_are_there():
  assert [path for path in gpu_suite.OWN if not (ROOT / path).exists()] == []
  marked = gpu_suite.marked_files()
  assert {"tests/system/gpu_test.py", "tests/experts_api_test.py"} < {*marked}
  assert "tests/system/gpu_suite_test.py" not in marked


TABLES = """
import json, sys
sys.path.insert(0, "benchmarks")
import gpu
from absl import flags
flags.FLAGS(["gpu.py"])
tables = gpu.all_tables()
assert list(tables) == gpu._TABLES.value
titles = [table.title for group in tables.values() for table in group]
bars = [(bar.title, bar.name, bar.against) for bar in gpu.bars()]
names = {t.title: list(t.candidates()) for t in tables["routing"][2:]}
print(json.dumps([titles, bars, names]))
"""


def test_every_bar_is_of_rows_that_are_measured():
  done = _run(sys.executable, "-c", TABLES)
  assert done.returncode == 0, done.stderr
  titles, bars, names = json.loads(done.stdout.splitlines()[-1])
  assert len(set(titles)) == len(titles)
  assert {title for title, _, _ in bars} <= set(titles)
  of_routing = [bar for bar in bars if bar[0] in names]
  assert len(of_routing) == 3
  for title, name, against in of_routing:
    assert {name, against or name} <= set(names[title])


@pytest.mark.parametrize(
  "part, words",
  (
    (dict(code=0, seconds=1, passed=3), []),
    (dict(code=0, seconds=1, passed=0), ["x: no test ran"]),
    (dict(code=2, seconds=1, passed=3), ["x ended with code 2"]),
    (dict(code=None, seconds=160, passed=3), ["x was ended after 160 s"]),
  ),
)
def test_a_part_that_did_not_end_well_is_named(part, words):
  assert gpu_suite.failures({"x": part}) == words


def test_times_that_were_not_taken_are_named():
  parts = {"times": dict(code=0, seconds=1, tables={})}
  assert gpu_suite.failures(parts) == ["times: nothing was measured"]


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
  code = (
    "import subprocess; subprocess.run('echo started; sleep 60', shell=True)"
  )
  log = tmp_path / "log"
  part = gpu_suite.Part(["-c", code], log)
  # Before, Python is not ready to be interrupted.
  while "started" not in log.read_text():
    time.sleep(0.1)
  found = part.finish(0.0)
  assert found["code"] is None
  assert found["seconds"] < 20
  assert any("KeyboardInterrupt" in line for line in found["tail"])


# What conftest.py asks of JAX for a CPU, and what it leaves alone elsewhere.
SWITCH = """
import json, os, sys
os.environ["JAX_PLATFORMS"] = sys.argv[1]
os.environ.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
os.environ["XLA_FLAGS"] = ""
sys.path.insert(0, "tests")
import conftest, jax
print(json.dumps([
  os.environ["XLA_FLAGS"].strip(),
  jax.config.jax_default_matmul_precision,
  jax.config.jax_compilation_cache_dir,
  jax.config.read("jax_disable_most_optimizations"),
]))
"""


def test_an_accelerator_gets_neither_fake_devices_nor_fewer_optimizations():
  def switched(platform):
    done = _run(sys.executable, "-c", SWITCH, platform)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

  flags, precision, cache, is_quick = switched("cpu")
  assert flags == "--xla_force_host_platform_device_count=8"
  assert precision is None and is_quick
  assert cache.startswith(sys.prefix)
  assert switched("cuda") == ["", "highest", None, False]


SKIPS = """
import jax
from pytest import mark
@mark.devices(8)
def test_eight(): assert len(jax.devices()) == 8
@mark.devices(9)
def test_nine(): pass
@mark.gpu
def test_gpu(): pass
@mark.cpu("of its sizes")
def test_cpu(): pass
"""


@pytest.mark.cpu("it counts a CPU's devices")
def test_what_needs_more_devices_is_skipped_with_the_reason(tmp_path):
  # Beside the conftest.py of the project, without a file in the checkout.
  (tmp_path / "conftest.py").symlink_to(ROOT / "tests" / "conftest.py")
  (tmp_path / "skips_test.py").write_text(SKIPS)
  done = _run(
    *(sys.executable, "-m", "pytest", "-c", str(ROOT / "setup.cfg")),
    *("--rootdir", str(tmp_path), "-p", "no:cacheprovider", str(tmp_path)),
  )
  assert "2 passed, 2 skipped" in done.stdout, done.stdout
  assert "needs 9 devices, found 8" in done.stdout
  assert "needs a GPU, found ['cpu']" in done.stdout
