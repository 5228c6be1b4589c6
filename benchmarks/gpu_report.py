# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tables in Markdown of what ran on a GPU, and the figures it is to reach."""

import collections
import dataclasses
import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any
from xml.etree import ElementTree

Rows = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Bar:
  """A ratio of times, or a time, and what it is to be.

  Attributes:
    title: of the table.
    name: of the row whose time is held.
    against: of the row it is compared with; None for the time itself.
    limit: of time / time against, or of the microseconds.
    faster: whether `limit` is the least of time against / time instead.
  """

  title: str
  name: str
  against: str | None
  limit: float
  faster: bool = False


def held(
  bars: Iterable[Bar], tables: Mapping[str, Rows]
) -> list[dict[str, Any]]:
  """Every bar with its value; None where a row was not measured.

  Args:
    bars: what is to be reached.
    tables: title to rows, of which those measured have `us`.

  Returns:
    Dicts of `what`, `bar`, `value` and `met`.
  """
  found = []
  for bar in bars:
    us = {
      row["name"]: row["us"]
      for row in tables.get(bar.title, ())
      if row.get("us")
    }
    one, other = us.get(bar.name), us.get(bar.against, 1.0)
    if bar.against and bar.against not in us:
      one = None
    value = met = None
    if one is not None:
      value = other / one if bar.faster else one / other
      met = value >= bar.limit if bar.faster else value <= bar.limit
    unit = f"x {bar.against}" if bar.against else "us"
    if bar.faster:
      unit = f"x as fast as {bar.against}"
    found.append(
      dict(
        what=f"{bar.title}: {bar.name}",
        bar=f"{'>=' if bar.faster else '<='} {bar.limit:g} {unit}",
        value=value,
        met=met,
      )
    )
  return found


def markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
  """A table, with a line of its own behind it."""
  lines = [columns, ["---"] * len(columns), *rows]
  cells = (" | ".join(c.replace("|", "/") for c in line) for line in lines)
  return "".join(f"| {line} |\n" for line in cells)


def profile_table(title: str, rows: Rows) -> str:
  """One line for a row: its time, against that of the first, and its kernels."""
  has_flops = any("tflops" in row for row in rows)
  columns = [title, "us", "launches", "x the first"]
  columns += ["TFLOP/s"] * has_flops + ["longest"]
  lines = []
  for row in rows:
    if "error" in row:
      blank = ["-"] * (len(columns) - 2)
      lines.append([row["name"], *blank, row["error"]])
      continue
    first = rows[0].get("us")
    ratio = f"{row['us'] / first:.3g}" if first else "-"
    flops = [f"{row['tflops']:.0f}"] if has_flops else []
    longest = "; ".join(
      f"{name[:40]} x{launches:g} {us:.1f}"
      for name, (launches, us) in [*row["kernels"].items()][:3]
    )
    us, launches = f"{row['us']:.1f}", f"{row['launches']:g}"
    lines.append([row["name"], us, launches, ratio, *flops, longest])
  return markdown(columns, lines)


def bars_table(bars: Rows) -> str:
  """What was to be reached, and what was."""
  lines = []
  for bar in bars:
    value = "not measured" if bar["value"] is None else f"{bar['value']:.3g}"
    met = {None: "-", True: "yes", False: "**no**"}[bar["met"]]
    lines.append([bar["what"], bar["bar"], value, met])
  return markdown(["bar", "wanted", "measured", "met"], lines)


def read_junit(path: pathlib.Path) -> dict[str, Any]:
  """What pytest's `--junitxml` says.

  Args:
    path: of the file; it may be missing, of a run that was ended.

  Returns:
    `passed`, a number; `failed`, the names to the first line of the reason; and
    `skipped`, the reasons to names.
  """
  passed, failed, skipped = 0, {}, collections.defaultdict(list)
  cases = ElementTree.parse(path).iter("testcase") if path.exists() else ()
  for case in cases:
    name = f"{case.get('classname', '').split('.')[-1]}::{case.get('name')}"
    wrong = [part for kind in ("failure", "error") for part in case.iter(kind)]
    reason = case.find("skipped")
    if wrong:
      message = wrong[0].get("message") or wrong[0].text or ""
      failed[name] = message.strip().split("\n")[0][:300]
    elif reason is not None:
      skipped[reason.get("message", "")].append(name)
    else:
      passed += 1
  return dict(passed=passed, failed=failed, skipped=dict(skipped))


def tests_table(parts: Mapping[str, Mapping[str, Any]]) -> str:
  """Parts with tests: how many passed; below it, what failed and was skipped."""
  lines, notes = [], []
  for name, part in parts.items():
    if "passed" not in part:
      continue
    skipped = sum(map(len, part["skipped"].values()))
    counts = [part["passed"], len(part["failed"]), skipped]
    lines.append([name, *map(str, counts), f"{part['seconds']:.0f}"])
    if "left_out" in part:
      notes.append(f"- left out of {name}, by name: {part['left_out']}")
    notes += [
      f"- failed: {test}: {why}" for test, why in part["failed"].items()
    ]
    notes += [
      f"- skipped, {reason}: {', '.join(tests)}"
      for reason, tests in part["skipped"].items()
    ]
  table = markdown(["tests", "passed", "failed", "skipped", "seconds"], lines)
  return table + "".join(f"{note}\n" for note in ["", *notes])
