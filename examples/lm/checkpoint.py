# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checkpoints of a whole `TrainState`: the last two, each complete or absent.

Beside the state lie the settings of the run and the number of this format, so
that a run is never continued with other settings, nor from arrays of another
structure.
"""

import contextlib
import errno
import json
import logging
import os
import pathlib
import re
import shutil
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from config import SetupError

# To be raised whenever the structure of what is saved changes.
FORMAT = 2


class SaveError(OSError):
  """A save failed, on a full disk say; shown without a traceback."""


class Checkpoints:
  """The checkpoints of one run.

  Args:
    out: the folder of the run.
    identity: the settings, JSON-like, that a run can only be resumed with.
  """

  def __init__(self, out: pathlib.Path, identity: dict[str, Any]):
    self._out = out
    self._folder = out.absolute() / "checkpoints"
    self._identity = identity
    with saving("preparing the folder of checkpoints", out), _quiet():
      self._manager = ocp.CheckpointManager(
        self._folder,
        options=ocp.CheckpointManagerOptions(
          max_to_keep=2,
          # A killed process may have left a checkpoint half written.
          cleanup_tmp_directories=True,
          enable_async_checkpointing=False,
        ),
      )

  @property
  def last_step(self) -> int:
    """The step of the newest checkpoint, 0 if there is none."""
    return self._manager.latest_step() or 0

  def clear(self) -> None:
    """Deletes all checkpoints."""
    for step in self._manager.all_steps():
      self._manager.delete(step)

  def check(self) -> None:
    """Raises SetupError if the newest checkpoint cannot be continued from."""
    if not self.last_step:
      return
    with _quiet():
      restored = self._manager.restore(
        self.last_step,
        args=ocp.args.Composite(settings=ocp.args.JsonRestore()),
      )
    saved = restored["settings"]
    found = saved.pop("format", None)
    if found != FORMAT:
      raise SetupError(
        f"--out={self._out} holds checkpoints"
        f" {'without a format' if found is None else f'of format {found}'},"
        f" expected format {FORMAT}: another version of this program wrote them."
        " Choose another --out, or --resume=false to delete that run."
      )
    differing = [
      f"--{name}: {saved.get(name)!r} there, {self._identity.get(name)!r} here"
      for name in sorted(saved.keys() | self._identity.keys())
      if saved.get(name) != self._identity.get(name)
    ]
    if differing:
      raise SetupError(
        f"--out={self._out} holds a run with other settings"
        f" ({'; '.join(differing)}). Choose another --out, or --resume=false to"
        " delete that run."
      )

  def restore(self, shapes: Any) -> Any:
    """The state of the newest checkpoint; there must be one.

    Args:
      shapes: the `jaxroute.TrainState` to expect, `jax.ShapeDtypeStruct`s for
        its arrays; their shardings say where the arrays are put.

    Returns:
      A `jaxroute.TrainState`.
    """
    with _quiet():
      restored = self._manager.restore(
        self.last_step,
        args=ocp.args.Composite(state=ocp.args.StandardRestore(shapes)),
      )
    return restored["state"]

  def save(self, step: int, state: Any) -> None:
    """Saves, and deletes all but the last two.

    Args:
      step: the step that the state is of.
      state: a `jaxroute.TrainState`.

    Raises:
      SaveError: if it cannot be written. Earlier checkpoints are as they were.
    """
    if step == self.last_step:
      return
    try:
      with saving(f"saving step {step}", self._out), _quiet():
        self._write(step, state)
    except BaseException:
      for part in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
        shutil.rmtree(part, ignore_errors=True)
      raise

  def _write(self, step: int, state: Any) -> None:
    # The array store prints at length if the disk turns out full halfway.
    needed = sum(x.nbytes for x in jax.tree.leaves(state)) + 2**16
    if shutil.disk_usage(self._folder).free < needed:
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        settings=ocp.args.JsonSave({"format": FORMAT} | self._identity),
      ),
    )


def saved_settings(out: pathlib.Path) -> dict[str, Any]:
  """The settings in the newest checkpoint of a folder that shows any, else {}.

  Args:
    out: the folder of a run.
  """
  found = (out / "checkpoints").glob("*/settings/metadata")
  of_step = {int(p.parts[-3]): p for p in found if p.parts[-3].isdecimal()}
  for step in sorted(of_step, reverse=True):
    with contextlib.suppress(OSError, ValueError):
      return json.loads(of_step[step].read_text())
  return {}


@contextlib.contextmanager
def saving(doing: str, out: pathlib.Path) -> Iterator[None]:
  """Turns what a full or read-only disk raises into a `SaveError`.

  Args:
    doing: what fails then.
    out: the folder of the run.
  """
  try:
    yield
  except SaveError:
    raise
  # The array store raises a ValueError that quotes the system's error.
  except (OSError, ValueError) as error:
    found = re.search(r"([^:]+) \[os_error_code", str(error))
    if not isinstance(error, OSError) and not found:
      raise
    reason = found[1].strip() if found else getattr(error, "strerror", None)
    raise SaveError(
      f"{doing} in --out={out} failed: {reason or error}. Earlier checkpoints"
      " are intact; put that right (free space, say) and run the same command"
      " again."
    ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the log of the checkpointer, which repeats what it raises."""
  logger = logging.getLogger("absl")
  level = logger.level
  logger.setLevel(logging.CRITICAL)
  try:
    yield
  finally:
    logger.setLevel(level)
