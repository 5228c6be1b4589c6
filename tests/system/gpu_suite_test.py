# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What runs on a GPU or TPU, where there is none: it says so, and is ready."""

import json
import os
import pathlib
import subprocess
import sys
import time

import device_suite
import gpu_suite
import pytest
import tpu_suite

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


@pytest.mark.cpu("it shows what happens without an accelerator")
@pytest.mark.parametrize(
  ("platform", "needs", "script"),
  (
    (
      "GPU",
      "jax[cuda13]",
      ["benchmarks/gpu.py", "--tables=routing"],
    ),
    ("TPU", "jax[tpu]", ["benchmarks/tpu.py"]),
  ),
)
def test_the_suite_refuses_to_run_without_the_device(
  platform, needs, script, tmp_path
):
  out = tmp_path / "suite.json"
  suite = f"benchmarks/{platform.lower()}_suite.sh"
  done = _run("bash", suite, str(out), PYTHON=sys.executable)
  assert done.returncode == 1
  assert f"expected a {platform} that JAX finds, got none" in done.stderr
  assert needs in done.stderr
  assert not out.exists()
  done = _run(sys.executable, *script)
  assert done.returncode == 1
  words = {
    "GPU": "expected a GPU, found cpu. Give --target",
    "TPU": "--dry_run",
  }
  assert words[platform] in done.stderr + done.stdout


def test_the_tests_that_it_runs_are_there():
  assert [path for path in gpu_suite.OWN if not (ROOT / path).exists()] == []
  marked = device_suite.marked_files("gpu")
  assert {"tests/system/gpu_test.py", "tests/experts_api_test.py"} < {*marked}
  assert "tests/system/gpu_suite_test.py" not in marked
  assert "tests/system/tpu_test.py" in tpu_suite.SUITE.tests["kernels"].choice


def test_times_on_a_tpu_are_tried_without_one(tmp_path):
  report = tmp_path / "tpu.json"
  done = _run(
    *(sys.executable, "benchmarks/tpu.py", "--dry_run", f"--json={report}"),
    *("--cases=E=64 K=6 softmax", "--candidates=plain,sort,project fused"),
  )
  assert done.returncode == 0, done.stderr
  *experts, rows = json.loads(report.read_text())["tables"].values()
  assert [row["name"] for row in rows] == ["plain", "sort", "project fused"]
  assert all(row["us"] > 0 for row in [*experts[0], *experts[1], *rows[:2]])
  assert "needs the logits" in rows[2]["error"]


# Run apart, for it defines flags.
CYCLES = """
import sys
sys.path.insert(0, "benchmarks")
import tpu
assert tpu.generation_of("TPU v6 lite") == "v6e"
rows = [dict(name="plain", us=70.0), dict(name="jaxroute", us=7.0)]
rows.append(dict(name="sort", error="late"))
print(tpu.cycles_table(1000, 1.75, dict(plain=100.0, jaxroute=10.0), "V3", rows))
"""


def test_cycles_stand_beside_times():
  done = _run(sys.executable, "-c", CYCLES)
  assert done.returncode == 0, done.stderr
  # 70 us are 122,500 cycles of 1.75 GHz, and these are 122.5 for each token.
  assert "| plain | 100 | 122.5 | 1.225 | 70 | 1 |  |" in done.stdout
  assert "| jaxroute | 10 | 12.25 | 1.225 | 7 | 0.1 |  |" in done.stdout
  assert "| sort | - | - | - | - | - | late |" in done.stdout


TABLES = """
import json, sys, types
sys.path.insert(0, "benchmarks")
import gpu
from absl import flags
flags.FLAGS(["gpu.py"])
tables = gpu.all_tables()
assert list(tables) == gpu._TABLES.value
titles = [table.title for group in tables.values() for table in group]
h100, h200 = (types.SimpleNamespace(device_kind=kind) for kind in ("H100", "H200"))
bars = [(bar.title, bar.name, bar.against) for bar in gpu.bars(h100)]
assert {gpu.COPY} == {b.against for b in {*gpu.bars(h100)} - {*gpu.bars(h200)}}
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
  assert device_suite.failures({"x": part}) == words


def test_times_that_were_not_taken_are_named():
  parts = {"times": dict(code=0, seconds=1, tables={})}
  assert device_suite.failures(parts) == ["times: nothing was measured"]
  bars = [dict(what="a", value=1.0), dict(what="b", value=None)]
  parts = {"times": dict(code=0, seconds=1, tables={"t": []}, bars=bars)}
  assert device_suite.failures(parts) == ["times: not measured: b"]


def test_what_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
  code = (
    "import subprocess; subprocess.run('echo started; sleep 60', shell=True)"
  )
  log = tmp_path / "log"
  part = device_suite.Part(["-c", code], os.environ, log)
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
os.environ.pop("TPU_ACCELERATOR_TYPE", None)
sys.path.insert(0, "tests")
import conftest, jax
print(json.dumps([
  os.environ["XLA_FLAGS"].strip(),
  jax.config.jax_default_matmul_precision,
  jax.config.jax_compilation_cache_dir,
  jax.config.read("jax_disable_most_optimizations"),
  os.environ.get("TPU_ACCELERATOR_TYPE"),
]))
"""


def test_an_accelerator_gets_neither_fake_devices_nor_fewer_optimizations():
  def switched(platform):
    done = _run(sys.executable, "-c", SWITCH, platform)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])

  flags, precision, cache, is_quick, absent = switched("cpu")
  assert flags == "--xla_force_host_platform_device_count=8"
  assert precision is None and is_quick and absent == "v5litepod-4"
  assert cache.startswith(sys.prefix)
  assert switched("cuda") == ["", "highest", None, False, "v5litepod-4"]
  # One that is there says itself what it is.
  assert switched("tpu") == ["", "highest", None, False, None]


SKIPS = """
import jax
from pytest import mark
@mark.devices(8)
def test_eight(): assert len(jax.devices()) == 8
@mark.devices(9)
def test_nine(): pass
@mark.gpu
def test_gpu(): pass
@mark.tpu
def test_tpu(): pass
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
  assert "2 passed, 3 skipped" in done.stdout, done.stdout
  assert "needs 9 devices, found 8" in done.stdout
  for platform in ("GPU", "TPU"):
    assert f"needs a {platform}, found ['cpu']" in done.stdout
