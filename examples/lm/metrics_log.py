# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The rows of a run on the disk: metrics.jsonl and TensorBoard.

A checkpoint holds where metrics.jsonl ended when it was saved, and a checksum
of the file up to there: a run is only continued with the rows it had. Of several
processes, the first writes.
"""

import contextlib
import hashlib
import os
import pathlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import board as board_lib
import config as config_lib
import jax
import report as report_lib
import storage
import strict_json
import tensorboardX


class MetricsLog:
  """Appends rows to metrics.jsonl and TensorBoard, and shows progress.

  Args:
    config: the settings.
    last_step: the step that the run continues from.
    end: what `sync` returned then; what was written since is cut off.

  Attributes:
    rows: all rows, those of earlier processes too.

  Raises:
    SetupError: if the rows up to there are not what they were.
  """

  def __init__(
    self,
    config: config_lib.Config,
    last_step: int,
    end: dict[str, Any] | None = None,
  ):
    out = storage.local(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path = storage.fetch(config.out, "metrics.jsonl")
    text = _read(path, config, last_step, end or {"bytes": 0})
    self.rows = [report_lib.parse_row(line) for line in text.splitlines()]
    missing = _missing_steps(self.rows, last_step)
    if missing:
      print(
        f"{path} lacks {len(missing)} of the {last_step} steps so far. Table and"
        " figures are without them.",
        file=sys.stderr,
      )
    self._out = config.out
    self._written, self._sha256 = len(text), hashlib.sha256(text)
    self._file = path.open("ab")
    self._board = tensorboardX.SummaryWriter(
      str(out / "tensorboard"), purge_step=last_step + 1
    )
    self._progress = report_lib.Progress(config, last_step)
    self._pending = None
    self._clock = None

  def add_step(self, step: int, report: dict[str, Any]) -> None:
    """Adds a training step, which may still be running; settles the last one.

    The device so always has its next step before the last one is waited for.
    """
    self.settle()
    self._pending = step, report

  def settle(self) -> None:
    """Waits for the step that was added last, and writes its row."""
    if self._pending is None:
      return
    step, report = self._pending
    self._pending = None
    report = jax.device_get(report)
    before, self._clock = self._clock, time.perf_counter()
    row = report_lib.train_row(step, report, before and self._clock - before)
    self._write(row)
    self._progress.show(row)

  def add(self, row: dict[str, Any]) -> None:
    """Adds a row; `kind` and `step` of it are required."""
    self.settle()
    self._write(row)
    self.restart_clock()

  def sync(self) -> dict[str, Any]:
    """Returns when everything added is on the disk: where metrics.jsonl ends."""
    self.settle()
    self._file.flush()
    os.fsync(self._file.fileno())
    self._board.flush()
    storage.publish(self._out)
    return {"bytes": self._written, "sha256": self._sha256.hexdigest()}

  @contextlib.contextmanager
  def doing(self, step: int, text: str) -> Iterator[None]:
    """Says what is done after a step beside training, for as long as it takes."""
    with self._progress.doing(step, text):
      yield

  def restart_clock(self) -> None:
    """Keeps the time since the last step out of the next step's."""
    self._clock = time.perf_counter()

  def close(self) -> None:
    """Closes the files; a full disk was reported by an earlier write."""
    self._progress.close()
    for part in (self._file, self._board):
      with contextlib.suppress(OSError):
        part.close()

  def _write(self, row: dict[str, Any]) -> None:
    self.rows.append(row)
    line = strict_json.dumps(row).encode() + b"\n"
    self._file.write(line)
    self._written += len(line)
    self._sha256.update(line)
    board_lib.add_row(self._board, row)


class Follower:
  """What the other processes have for a log: it keeps pace and writes nothing.

  Its methods are those of `MetricsLog` that all processes call.
  """

  def __init__(self):
    self._pending = None

  def add_step(self, step: int, report: dict[str, Any]) -> None:
    """Waits for the last step."""
    del step
    self.settle()
    self._pending = report

  def settle(self) -> None:
    """Waits for the step that was added last."""
    jax.block_until_ready(self._pending)

  def sync(self) -> None:
    """Waits for the step that was added last; there is nothing to write."""
    self.settle()

  @contextlib.contextmanager
  def doing(self, step: int, text: str) -> Iterator[None]:
    """Shows nothing."""
    del step, text
    yield

  def restart_clock(self) -> None:
    """There is no clock."""

  def close(self) -> None:
    """There is no file."""


def _read(
  path: pathlib.Path,
  config: config_lib.Config,
  last_step: int,
  end: dict[str, Any],
) -> bytes:
  """The file as it was at the checkpoint; what follows is cut off."""
  length, start_anew = end["bytes"], "--resume=false to start the run anew"
  if length and not path.exists():
    if last_step >= config.steps:
      raise config_lib.SetupError(
        f"{path} is missing, with all rows of a run that is finished. Put it"
        f" back from a copy, or {start_anew}."
      )
    return b""
  path.touch()
  text = path.read_bytes()
  if length and hashlib.sha256(text[:length]).hexdigest() != end["sha256"]:
    raise config_lib.SetupError(
      f"{path} is not as it was when step {last_step} was saved:"
      f" {_difference(text, last_step)}. Put it back from a copy; or delete it"
      f" to continue without the rows so far; or {start_anew}."
    )
  os.truncate(path, length)
  return text[:length]


def _difference(text: bytes, last_step: int) -> str:
  """What is wrong with the rows of a file up to a step."""
  rows = []
  for number, line in enumerate(text.splitlines(), start=1):
    try:
      row = report_lib.parse_row(line)
      if row["step"] > last_step:
        break
      rows.append({"kind": row["kind"], "step": row["step"]})
    except (ValueError, TypeError, KeyError, AttributeError):
      return f"line {number} is broken"
  missing = _missing_steps(rows, last_step)
  if missing:
    return f"it lacks {len(missing)} steps, the first is {missing[0]}"
  return "it was changed"


def _missing_steps(rows: list[dict[str, Any]], last_step: int) -> list[int]:
  steps = {row["step"] for row in rows if row["kind"] == "train"}
  return sorted(set(range(1, last_step + 1)) - steps)
