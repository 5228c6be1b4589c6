# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Medians of candidates that run in turn, and their table."""

import statistics
import time
from collections.abc import Callable, Mapping

import jax


def interleaved_medians(
  candidates: Mapping[str, Callable[[], object]], repeats: int
) -> dict[str, float]:
  """Median seconds of each candidate, called in turn `repeats` times.

  Args:
    candidates: name to a function of no arguments that returns arrays; the
      first call (compilation) is not timed.
    repeats: rounds.

  Returns:
    name to the median wall time, in seconds.
  """
  for call in candidates.values():
    jax.block_until_ready(call())
  times = {name: [] for name in candidates}
  for _ in range(repeats):
    for name, call in candidates.items():
      start = time.perf_counter()
      jax.block_until_ready(call())
      times[name].append(time.perf_counter() - start)
  return {name: statistics.median(t) for name, t in times.items()}


def print_table(
  title: str, medians: Mapping[str, float], baseline: str
) -> None:
  """Prints one line per candidate: milliseconds and ratio to the baseline."""
  print(f"\n{title}")
  print(f"  {'candidate':34s} {'ms':>9s} {'ratio':>7s}")
  for name, seconds in medians.items():
    ratio = seconds / medians[baseline]
    print(f"  {name:34s} {seconds * 1e3:9.3f} {ratio:7.3f}")
