# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The rows of a run on the disk: metrics.jsonl and TensorBoard."""

import contextlib
import json
import os
import pathlib
import time
from typing import Any

import board as board_lib
import config as config_lib
import jax
import report as report_lib
import tensorboardX


class MetricsLog:
  """Appends rows to metrics.jsonl and TensorBoard, and shows progress.

  Args:
    config: the settings.
    last_step: rows of later steps, and half-written rows, are cut off first.

  Attributes:
    rows: all rows, those of earlier processes too.
    progress: the bar, which the caller tells what is done beside training.
  """

  def __init__(self, config: config_lib.Config, last_step: int):
    out = pathlib.Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    path = out / "metrics.jsonl"
    self.rows = _read_rows(path, last_step)
    self._file = path.open("a")
    self._board = tensorboardX.SummaryWriter(
      str(out / "tensorboard"), purge_step=last_step + 1
    )
    self.progress = report_lib.Progress(config, last_step)
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
    self.progress.show(row)

  def add(self, row: dict[str, Any]) -> None:
    """Adds a row; `kind` and `step` of it are required."""
    self.settle()
    self._write(row)
    self.restart_clock()

  def sync(self) -> None:
    """Returns when everything added is on the disk."""
    self.settle()
    self._file.flush()
    os.fsync(self._file.fileno())
    self._board.flush()

  def restart_clock(self) -> None:
    """Keeps the time since the last step out of the next step's."""
    self._clock = time.perf_counter()

  def close(self) -> None:
    """Closes the files; a full disk was reported by an earlier write."""
    self.progress.close()
    for part in (self._file, self._board):
      with contextlib.suppress(OSError):
        part.close()

  def _write(self, row: dict[str, Any]) -> None:
    self.rows.append(row)
    self._file.write(json.dumps(row) + "\n")
    board_lib.add_row(self._board, row)


def _read_rows(path: pathlib.Path, last_step: int) -> list[dict[str, Any]]:
  """The rows up to a step; the file is cut after them."""
  if not path.exists():
    return []
  rows, length = [], 0
  with path.open("r+b") as file:
    for line in file:
      if not line.endswith(b"\n"):
        break
      row = json.loads(line)
      if row["step"] > last_step:
        break
      rows.append(row)
      length += len(line)
    file.truncate(length)
  return rows
