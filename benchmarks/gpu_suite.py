# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs tests and measurements on a GPU, each for so long; see gpu_suite.sh."""

import concurrent.futures
import contextlib
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import gpu_report

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Seconds of the tests, which run at the same time, and of the measurements.
TESTS_LIMIT, TIMES_LIMIT = 155, 160
# Processes of both runs of tests: compiling, on one core, takes most of their time.
_CORES = os.cpu_count() or 1
KERNELS_WORKERS, OWN_WORKERS = max(_CORES // 3, 1), max(2 * _CORES // 3, 1)
# What a layer and a step are made of; but experts as no GPU takes them.
NOT_OWN = "tiled or ragged_dot"
OWN = tuple(
  f"tests/{name}_test.py"
  for name in (
    "routing_api",
    "routing_weights",
    "routing_bias_histogram",
    "routing_float_keys",
    "scores",
    "dispatch_api",
    "dispatch_permute",
    "experts_api",
    "experts_batched",
    "experts_transforms",
    "layer",
    "layer_local_moe",
    "losses",
    "step",
    "dual_rules",
  )
)
PROBE = """
import importlib.metadata, json, jax
device = jax.devices()[0]
assert device.platform == "gpu", f"found {device.platform}"
packages = "jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax"
versions = {}
for name in packages:
  try:
    versions[name] = importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    pass
print(json.dumps(dict(
  name=device.device_kind, compute_capability=device.compute_capability,
  runtime=device.client.platform_version, **versions,
)))
"""


def environment() -> dict[str, str]:
  """Of what runs: the checkout, on the GPU, of which no process takes all memory."""
  return os.environ | {
    "JAX_PLATFORMS": "cuda",
    "PYTHONPATH": str(ROOT),
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  }


def device() -> dict[str, Any]:
  """The GPU, its driver, and the versions of packages.

  Raises:
    SystemExit: if there is no GPU that JAX finds.
  """
  probe = subprocess.run(
    [sys.executable, "-c", PROBE],
    capture_output=True,
    cwd=ROOT,
    env=environment(),
    text=True,
  )
  if probe.returncode:
    errors = [x for x in probe.stderr.splitlines() if "Error: " in x]
    reason = errors[-1] if errors else probe.stderr.strip()[-200:]
    raise SystemExit(
      "gpu_suite: expected a GPU that JAX finds, got none"
      f" ({reason}). Run it where `nvidia-smi` shows one, in a Python with JAX's"
      " CUDA plugin: pip install 'jax[cuda13]'."
    )
  found = json.loads(probe.stdout.splitlines()[-1])
  with contextlib.suppress(OSError):
    query = [
      "nvidia-smi",
      "--query-gpu=driver_version,clocks.max.sm,power.limit",
    ]
    answer = subprocess.run(
      [*query, "--format=csv,noheader"], capture_output=True, text=True
    )
    found["driver, clock, power"] = answer.stdout.strip()
  return found | {"python": sys.version.split()[0], "cores": os.cpu_count()}


class Part:
  """A command that runs, with all that it starts, until `finish`.

  Args:
    command: the arguments of Python.
    log: where what it prints goes; None to print it.
  """

  def __init__(self, command: Sequence[str], log: pathlib.Path | None = None):
    self._log, self._start = log, time.monotonic()
    # What a shell starts in the background ignores interrupts, and what that starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
      self._process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment(),
        start_new_session=True,
        stderr=subprocess.STDOUT,
        stdout=stack.enter_context(log.open("w")) if log else None,
      )

  def finish(self, limit: float) -> dict[str, Any]:
    """Waits for it, or ends it.

    Args:
      limit: seconds from its begin.

    Returns:
      Its exit `code`, None if it was ended; its `seconds`; and unless the code is
      0, the last lines of its log as `tail`.
    """
    code = None
    try:
      left = limit - (time.monotonic() - self._start)
      code = self._process.wait(max(left, 0))
    except subprocess.TimeoutExpired:
      # pytest writes down on an interrupt what it has.
      self._process.send_signal(signal.SIGINT)
      with contextlib.suppress(subprocess.TimeoutExpired):
        self._process.wait(15)
    # A kernel that hangs ends with its process.
    with contextlib.suppress(ProcessLookupError):
      os.killpg(self._process.pid, signal.SIGKILL)
    self._process.wait()
    seconds = round(time.monotonic() - self._start, 1)
    found: dict[str, Any] = dict(code=code, seconds=seconds)
    if self._log and code != 0:
      text = self._log.read_text(errors="replace")
      found["tail"] = text.splitlines()[-40:]
    return found


def marked_files() -> list[str]:
  """The files with tests marked `gpu`. Others cannot be collected everywhere."""
  mark = re.compile(r"^(@|pytestmark = )pytest\.mark\.gpu$", re.MULTILINE)
  return [
    path.relative_to(ROOT).as_posix()
    for path in sorted((ROOT / "tests").rglob("*_test.py"))
    if mark.search(path.read_text(encoding="utf-8"))
  ]


def pytest_command(
  choice: Sequence[str], workers: int, xml: pathlib.Path
) -> list[str]:
  """Tests in several processes; if one of them dies, another goes on."""
  return [
    *("-m", "pytest", "-c", "setup.cfg", "-q"),
    *("-p", "no:benchmark", "-p", "no:cacheprovider"),
    *("-n", str(workers), "--dist", "worksteal", f"--junitxml={xml}"),
    *choice,
  ]


def run_tests(scratch: pathlib.Path) -> dict[str, dict[str, Any]]:
  """Both runs of tests, by name, at the same time."""
  wanted = {
    "kernels": (["-m", "gpu", *marked_files()], KERNELS_WORKERS),
    "own tests": (
      ["-m", "not gpu", "-k", f"not ({NOT_OWN})", *OWN],
      OWN_WORKERS,
    ),
  }

  def run(name):
    choice, workers = wanted[name]
    xml = scratch / f"{name}.xml"
    command = pytest_command(choice, workers, xml)
    found = Part(command, scratch / f"{name}.log").finish(TESTS_LIMIT)
    return found | gpu_report.read_junit(xml)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    found = dict(zip(wanted, pool.map(run, wanted), strict=True))
  found["own tests"]["left_out"] = NOT_OWN
  return found


def run_times(scratch: pathlib.Path) -> dict[str, Any]:
  """The measurements, whose tables are printed as they come."""
  report = scratch / "times.json"
  seconds = f"--seconds={TIMES_LIMIT - 25}"
  command = ["benchmarks/gpu.py", f"--json={report}", seconds]
  found = Part(command).finish(TIMES_LIMIT)
  if report.exists():
    found |= json.loads(report.read_text())
  return found


def failures(parts: dict[str, dict[str, Any]]) -> list[str]:
  """Why the suite fails: a part that does not end well, or tests of which none ran."""
  found = []
  for name, part in parts.items():
    if part["code"] is None:
      found.append(f"{name} was ended after {part['seconds']:.0f} s")
    elif part["code"]:
      found.append(f"{name} ended with code {part['code']}")
    if part.get("passed") == 0:
      found.append(f"{name}: no test ran")
    if name == "times" and not part.get("tables"):
      found.append("times: nothing was measured")
  return found


def main() -> None:
  out = pathlib.Path(sys.argv[1]).absolute()
  # In the background a shell has its children ignore interrupts, and theirs.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  start = time.monotonic()
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  report: dict[str, Any] = dict(date=now, device=device(), parts={})

  def save():
    report["seconds"] = round(time.monotonic() - start, 1)
    report["failures"] = failures(report["parts"])
    out.write_text(json.dumps(report, indent=1))

  print(f"{now}: {report['device']}\n", flush=True)
  with tempfile.TemporaryDirectory() as scratch:
    report["parts"] |= run_tests(pathlib.Path(scratch))
    save()
    print(gpu_report.tests_table(report["parts"]), flush=True)
    for name, part in report["parts"].items():
      if "tail" in part:
        print(f"{name}:", *part["tail"], sep="\n  ", flush=True)
    report["parts"]["times"] = run_times(pathlib.Path(scratch))
    save()
  print(f"{out}: {report['seconds']:.0f} s in all")
  if report["failures"]:
    raise SystemExit("gpu_suite: failed: " + "; ".join(report["failures"]))


if __name__ == "__main__":
  main()
