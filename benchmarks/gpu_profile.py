# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Time of a call on the device, kernel by kernel, by JAX's profiler.

A clock on the host also counts what the host takes to launch kernels; this
counts the kernels and copies themselves, from their begin to their end; of a
TPU whole programs.
"""

import collections
import dataclasses
import faulthandler
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import gpu_report
import jax
from jax.profiler import ProfileData

from jaxroute import ladder

# A device, and the lines of its plane that show what it did once each: other lines
# show the same time again, by operation or by step.
_LINES = {"GPU": "Stream", "TPU": "XLA Modules"}
_HANG_SECONDS = 90
LEFT_OUT = "left out, for the time was up"
Candidates = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Profile:
  """What one call does on the device, on average.

  Attributes:
    us: microseconds in which any of its launches runs.
    launches: kernels, copies and fills.
    kernels: name to (launches, microseconds), the longest first.
  """

  us: float
  launches: float
  kernels: dict[str, tuple[float, float]]


# Calls that are not counted take so long, for the clock of an idle GPU is slow.
_WARM_SECONDS, _MOST_WARM = 0.1, 500


def of_call(call: Callable[..., Any], *args: Any, repeats: int = 20) -> Profile:
  """Profiles `repeats` calls, after some that are not counted.

  Args:
    call: compiled, so that nothing else runs on the device meanwhile.
    *args: on the device.
    repeats: calls of which the mean is taken.

  Returns:
    The `Profile`.

  Raises:
    RuntimeError: if the profiler saw nothing on a GPU or a TPU.
  """
  for _ in range(2):
    start = time.monotonic()
    jax.block_until_ready(call(*args))
    seconds = max(time.monotonic() - start, 1e-6)
  warm = min(int(_WARM_SECONDS / seconds) + 1, _MOST_WARM)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(warm + repeats):
        out = call(*args)
      jax.block_until_ready(out)
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    planes = ProfileData.from_file(str(path)).planes
    profile = from_planes(planes, repeats, warm)
  if not profile.kernels:
    raise RuntimeError(
      "expected kernels of a GPU or TPU in the profile, got none. On a GPU the"
      " profiler needs CUPTI, and that no other profiler runs."
    )
  return profile


def from_planes(planes: Iterable[Any], calls: int, warm: int = 0) -> Profile:
  """The mean over `calls` of what the streams of all GPUs did, or all TPUs.

  Of a TPU the programs are shown, whole, in place of kernels.

  Args:
    planes: of a `jax.profiler.ProfileData`.
    calls: what the profile holds of one after another, and is counted.
    warm: calls before these.

  Returns:
    The `Profile`.
  """
  spans = collections.defaultdict(list)
  for plane in planes:
    for device, name in _LINES.items():
      if device in plane.name:
        for line in plane.lines:
          if line.name.startswith(name):
            for event in line.events:
              begin = event.start_ns
              spans[event.name].append((begin, begin + event.duration_ns))
  kernels, counted = {}, []
  for name, of_name in spans.items():
    of_name = sorted(of_name)[len(of_name) * warm // (warm + calls) :]
    ns = sum(end - begin for begin, end in of_name)
    kernels[name] = len(of_name) / calls, ns / calls / 1e3
    counted += of_name
  longest_first = sorted(kernels.items(), key=lambda item: -item[1][1])
  return Profile(
    us=_covered(counted) / calls / 1e3,
    launches=sum(launches for launches, _ in kernels.values()),
    kernels=dict(longest_first),
  )


def _covered(spans: Iterable[tuple[float, float]]) -> float:
  """The time in any of some spans: a kernel may begin before the last one ends."""
  total, reached = 0.0, float("-inf")
  for begin, end in sorted(spans):
    total += max(end - max(begin, reached), 0.0)
    reached = max(reached, end)
  return total


@dataclasses.dataclass(frozen=True)
class Table:
  """What is measured together.

  Attributes:
    title: what it is a table of.
    candidates: makes the functions and their arguments, the baseline first.
    flops: of useful work in a call, or 0.
  """

  title: str
  candidates: Callable[[], Candidates]
  flops: int = 0


def measure(
  table: Table,
  deadline: float,
  save: Callable[..., None],
  *,
  profile: Callable[..., Profile] | None = None,
  show: Callable[[str, gpu_report.Rows], str] = gpu_report.profile_table,
) -> None:
  """Measures and prints a table; what fails is a row that says so.

  Args:
    table: what to measure.
    deadline: of `time.monotonic`, after which nothing is begun.
    save: called with a title and its rows, after every row.
    profile: of a compiled function and its arguments; by default `of_call`.
    show: makes the text that is printed of title and rows.
  """
  profile = profile or of_call
  rows = []
  try:
    candidates = table.candidates()
  except Exception as error:
    candidates = {}
    rows.append(dict(name="all") | _failure(error))
    save(table.title, rows)
  for name, (function, args) in candidates.items():
    row = dict(name=name)
    if time.monotonic() > deadline:
      row |= dict(error=LEFT_OUT)
    else:
      try:
        call = jax.jit(function).lower(*args).compile()
        # A kernel that hangs ends this process, and leaves what was saved.
        faulthandler.dump_traceback_later(
          _HANG_SECONDS, exit=True, file=sys.__stderr__
        )
        row |= dataclasses.asdict(profile(call, *args))
        if table.flops:
          row |= dict(tflops=table.flops / row["us"] / 1e6)
      except Exception as error:
        row |= _failure(error)
      finally:
        faulthandler.cancel_dump_traceback_later()
      print(f"{name}: {row.get('us', row.get('error'))}", file=sys.stderr)
    rows.append(row)
    save(table.title, rows)
  print(show(table.title, rows), flush=True)


def check_all_measured(
  tables: dict[str, gpu_report.Rows], *, may_refuse: bool
) -> None:
  """Raises SystemExit if a row failed that was begun.

  Args:
    tables: what `measure` saved.
    may_refuse: whether an implementation may leave a row to another.
  """
  reasons = {
    row["error"]
    for rows in tables.values()
    for row in rows
    if "error" in row and not (may_refuse and row.get("refused"))
  }
  reasons -= {LEFT_OUT}
  if reasons:
    raise SystemExit("not all could be measured: " + "; ".join(reasons))


def _failure(error: Exception) -> dict[str, Any]:
  words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
  return dict(error=words, refused=isinstance(error, ladder.Refusal))
