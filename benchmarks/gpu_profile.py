# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Time of a call on the device, kernel by kernel, by JAX's profiler.

A clock on the host also counts what the host takes to launch kernels; this
counts the kernels and copies themselves, from their begin to their end; of a
TPU whole programs.
"""

import collections
import dataclasses
import pathlib
import tempfile
import time
from collections.abc import Callable, Iterable
from typing import Any

import gpu_report
import jax
from jax.profiler import ProfileData

# A device, and the lines of its plane that show what it did once each: other lines
# show the same time again, by operation or by step.
_LINES = {"GPU": "Stream", "TPU": "XLA Modules"}
LEFT_OUT = "left out, for the time was up"
Candidates = dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]


@dataclasses.dataclass(frozen=True)
class Profile:
  """What one call does on the device, on average.

  Attributes:
    us: microseconds of all its launches.
    launches: kernels, copies and fills.
    kernels: name to (launches, microseconds), the longest first.
  """

  us: float
  launches: float
  kernels: dict[str, tuple[float, float]]


def of_call(call: Callable[..., Any], *args: Any, repeats: int = 10) -> Profile:
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
  for _ in range(3):
    out = call(*args)
  jax.block_until_ready(out)
  with tempfile.TemporaryDirectory() as folder:
    with jax.profiler.trace(folder):
      for _ in range(repeats):
        out = call(*args)
      jax.block_until_ready(out)
    (path,) = pathlib.Path(folder).rglob("*.xplane.pb")
    profile = from_planes(ProfileData.from_file(str(path)).planes, repeats)
  if not profile.kernels:
    raise RuntimeError(
      "expected kernels of a GPU or TPU in the profile, got none. On a GPU the"
      " profiler needs CUPTI, and that no other profiler runs."
    )
  return profile


def from_planes(planes: Iterable[Any], calls: int) -> Profile:
  """The mean over `calls` of what the streams of all GPUs did, or all TPUs.

  Of a TPU the programs are shown, whole, in place of kernels.

  Args:
    planes: of a `jax.profiler.ProfileData`.
    calls: what the profile holds of one after another.

  Returns:
    The `Profile`.
  """
  spent = collections.defaultdict(list)
  for plane in planes:
    for device, name in _LINES.items():
      if device in plane.name:
        for line in plane.lines:
          if line.name.startswith(name):
            for event in line.events:
              spent[event.name].append(event.duration_ns)
  kernels = {
    name: (len(ns) / calls, sum(ns) / calls / 1e3) for name, ns in spent.items()
  }
  longest_first = sorted(kernels.items(), key=lambda item: -item[1][1])
  return Profile(
    us=sum(us for _, us in kernels.values()),
    launches=sum(launches for launches, _ in kernels.values()),
    kernels=dict(longest_first),
  )


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
    rows.append(dict(name="all", error=_words(error)))
    save(table.title, rows)
  for name, (function, args) in candidates.items():
    row = dict(name=name)
    if time.monotonic() > deadline:
      row |= dict(error=LEFT_OUT)
    else:
      try:
        call = jax.jit(function).lower(*args).compile()
        row |= dataclasses.asdict(profile(call, *args))
        if table.flops:
          row |= dict(tflops=table.flops / row["us"] / 1e6)
      except Exception as error:
        row |= dict(error=_words(error))
    rows.append(row)
    save(table.title, rows)
  print(show(table.title, rows), flush=True)


def _words(error: Exception) -> str:
  return f"{type(error).__name__}: {error}".splitlines()[0][:300]
