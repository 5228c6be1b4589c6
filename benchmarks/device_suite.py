# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs tests and measurements on an accelerator, each for so long, and reports them."""

import concurrent.futures
import contextlib
import dataclasses
import datetime
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gpu_report

ROOT = pathlib.Path(__file__).resolve().parents[1]
PROBE = """
import importlib.metadata, json, jax
device = jax.devices()[0]
assert device.platform == {platform!r}, f"found {{device.platform}}"
versions = {{}}
for name in {packages!r}:
  try:
    versions[name] = importlib.metadata.version(name)
  except importlib.metadata.PackageNotFoundError:
    pass
print(json.dumps(dict(
  name=device.device_kind, count=jax.device_count(),
  compute_capability=getattr(device, "compute_capability", None),
  runtime=device.client.platform_version, **versions,
)))
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tests:
  """A run of pytest.

  Attributes:
    choice: its arguments, which choose.
    workers: processes, as compiling, on one core, takes most of their time.
    left_out: what the choice leaves out, in words.
  """

  choice: Sequence[str]
  workers: int
  left_out: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Suite:
  """What a kind of accelerator is tried by.

  Attributes:
    name: of the script, for messages.
    platform: what JAX calls the device.
    environment: of what runs there.
    tests_environment: of tests alone.
    packages: whose versions are reported.
    needs: where it runs, and how to get what is missing.
    tests: name to run of tests; all run at the same time.
    tests_limit: seconds for them.
    times: the script that measures; it takes --json and --seconds.
    times_limit: seconds for it, of which it gets to know all but the last 25.
    describe: what else to report of the device.
  """

  name: str
  platform: str
  environment: Mapping[str, str]
  packages: Sequence[str]
  needs: str
  tests: Mapping[str, Tests]
  tests_limit: float
  times: str
  times_limit: int
  tests_environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
  describe: Callable[[], dict[str, str]] = dict

  def variables(self) -> dict[str, str]:
    """Of a process on the device, which imports the checkout."""
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    here = {"PYTHONPATH": os.pathsep.join(path)}
    return os.environ | here | dict(self.environment)

  def device(self) -> dict[str, Any]:
    """The device, its runtime, and the versions of packages.

    Raises:
      SystemExit: if there is no such device that JAX finds.
    """
    code = PROBE.format(platform=self.platform, packages=self.packages)
    probe = subprocess.run(
      [sys.executable, "-c", code],
      capture_output=True,
      cwd=ROOT,
      env=self.variables(),
      text=True,
    )
    if probe.returncode:
      errors = [x for x in probe.stderr.splitlines() if "Error: " in x]
      reason = errors[-1] if errors else probe.stderr.strip()[-200:]
      raise SystemExit(
        f"{self.name}: expected a {self.platform.upper()} that JAX finds, got none"
        f" ({reason}). {self.needs}"
      )
    found = json.loads(probe.stdout.splitlines()[-1]) | self.describe()
    return found | {"python": sys.version.split()[0], "cores": os.cpu_count()}

  def run_tests(self, scratch: pathlib.Path) -> dict[str, dict[str, Any]]:
    """All runs of tests, by name, at the same time."""

    def run(name):
      tests, xml = self.tests[name], scratch / f"{name}.xml"
      part = Part(
        pytest_command(tests.choice, tests.workers, xml),
        self.variables() | dict(self.tests_environment),
        scratch / f"{name}.log",
      )
      found = part.finish(self.tests_limit) | gpu_report.read_junit(xml)
      return found | (dict(left_out=tests.left_out) if tests.left_out else {})

    with concurrent.futures.ThreadPoolExecutor() as pool:
      return dict(zip(self.tests, pool.map(run, self.tests), strict=True))

  def run_times(self, scratch: pathlib.Path) -> dict[str, Any]:
    """The measurements, whose tables are printed as they come."""
    report = scratch / "times.json"
    seconds = f"--seconds={self.times_limit - 25}"
    part = Part([self.times, f"--json={report}", seconds], self.variables())
    found = part.finish(self.times_limit)
    if report.exists():
      found |= json.loads(report.read_text())
    return found


class Part:
  """A command that runs, with all that it starts, until `finish`.

  Args:
    command: the arguments of Python.
    environment: its variables.
    log: where what it prints goes; None to print it.
  """

  def __init__(
    self,
    command: Sequence[str],
    environment: Mapping[str, str],
    log: pathlib.Path | None = None,
  ):
    self._log, self._start = log, time.monotonic()
    # What a shell starts in the background ignores interrupts, and what that starts.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
      signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
      self._process = subprocess.Popen(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
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
        self._process.wait(10)
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


def marked_files(platform: str) -> list[str]:
  """The files with tests marked by the name of a platform.

  Others cannot be collected everywhere.
  """
  mark = re.compile(
    rf"^(@|pytestmark = )pytest\.mark\.{platform}$", re.MULTILINE
  )
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
    late = [bar["what"] for bar in part.get("bars", ()) if bar["value"] is None]
    if late:
      found.append(f"{name}: not measured: {'; '.join(late)}")
  return found


def run(suite: Suite, out: pathlib.Path) -> None:
  """Runs all of a suite, prints the tables, and writes down what was found.

  Args:
    suite: what to run.
    out: the file of the report, in JSON, which is written after every part. Logs go
      to a folder beside it.

  Raises:
    SystemExit: at the end, if a part failed.
  """
  # In the background a shell has its children ignore interrupts, and theirs.
  signal.signal(signal.SIGINT, signal.default_int_handler)
  start = time.monotonic()
  now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
  report: dict[str, Any] = dict(date=now, device=suite.device(), parts={})

  def save():
    report["seconds"] = round(time.monotonic() - start, 1)
    report["failures"] = failures(report["parts"])
    out.write_text(json.dumps(report, indent=1))

  print(f"{now}: {report['device']}\n", flush=True)
  logs = out.with_suffix(".logs")
  logs.mkdir(exist_ok=True)
  report["parts"] |= suite.run_tests(logs)
  save()
  print(gpu_report.tests_table(report["parts"]), flush=True)
  for name, part in report["parts"].items():
    if "tail" in part:
      print(f"{name}:", *part["tail"], sep="\n  ", flush=True)
  report["parts"]["times"] = suite.run_times(logs)
  save()
  print(f"{out}: {report['seconds']:.0f} s in all")
  if report["failures"]:
    raise SystemExit(f"{suite.name}: failed: " + "; ".join(report["failures"]))
