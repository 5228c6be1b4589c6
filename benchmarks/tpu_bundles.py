# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The bundles that the TPU compiler schedules for a kernel, loops counted out.

A core issues one bundle of operations a cycle. The compiler's own estimate of a
kernel takes a loop about once, and leaves out what depends on data; here the
bundles of a loop count as often as it runs, and those under a condition as often
as it holds, which the caller says. Waits for memory are not counted.
"""

import dataclasses
import re
from collections.abc import Sequence

# A branch is taken after so many bundles more.
_DELAY_SLOTS = 4
_BUNDLE = re.compile(r"\s*(0x[0-9a-f]+|0)\s+(?:(?:L|P|C)\w)?\s*:[\s>]*\{")
_BRANCH = re.compile(r"sbr\.rel \([^)]*\) target = \$region(\d+)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder %\S+, (\d+) /\* loop exit test")
_REGION = re.compile(r"(?:Start|Start/End empty) region (\d+)")


@dataclasses.dataclass(frozen=True)
class _Span:
  """Bundles from `start` up to `end` that run `times` for once around them."""

  start: int
  end: int
  times: float


def count(text: str, conditions: Sequence[float]) -> float:
  """How many bundles a kernel issues.

  Args:
    text: the compiler's final bundles of the kernel.
    conditions: how often, of the steps of the grid, each condition of the body
      holds, in the order of the program.

  Returns:
    Bundles, over the whole grid.

  Raises:
    ValueError: if the kernel has another number of conditions, or a loop whose
      number of iterations is not constant.
  """
  spans, skips, size = _read(text)
  # The first of the branches skips the whole body, in the steps in which the
  # pipeline fills and drains.
  if len(skips) != 1 + len(conditions):
    raise ValueError(
      f"expected {len(skips) - 1} conditions of the kernel, got {len(conditions)}"
    )
  for (start, end), times in zip(skips[1:], conditions, strict=True):
    spans.append(_Span(start, end, times))
  total = 0.0
  for address in range(size):
    times = 1.0
    for span in spans:
      if span.start <= address < span.end:
        times *= span.times
    total += times
  return total


def _read(text: str) -> tuple[list[_Span], list[tuple[int, int]], int]:
  """Loops, what branches skip, and the number of bundles."""
  branches: list[tuple[int, int]] = []
  exits: list[tuple[int, int]] = []
  regions: dict[int, int] = {}
  address = 0
  for line in text.splitlines():
    if found := _BUNDLE.match(line):
      address = int(found[1], 16)
    branches += [(address, int(x)) for x in _BRANCH.findall(line)]
    exits += [(address, int(x)) for x in _EXIT.findall(line)]
    regions |= {int(x): address for x in _REGION.findall(line)}
  loops, skips = [], []
  for branch, region in branches:
    target, after = regions[region], branch + _DELAY_SLOTS + 1
    if target > branch:
      skips.append((after, target))
      continue
    # Of several tests in it, the loop's own is the last before its end.
    tests = [n for at, n in exits if target <= at <= branch]
    if not tests:
      raise ValueError(f"the loop at bundle {target} has no constant end")
    loops.append(_Span(target, after, tests[-1]))
  return loops, skips, address + 1
