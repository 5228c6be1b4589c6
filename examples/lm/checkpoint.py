# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checkpoints of a whole `TrainState`: the last two, each complete or absent.

Beside the state lie the settings of the run and the number of this format, so
that a run is never continued with other settings, nor from arrays of another
structure; and checksums of all of it, so that it is never continued from arrays
that the disk has changed. All processes write a checkpoint and read it, each
what its devices hold, and take the same one for damaged. The structure does not
depend on the mesh, so a run may go on with another.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import checksum
import hosts
import jax
import orbax.checkpoint as ocp
import storage
from config import SaveError, SetupError
from etils import epath

# To be raised whenever the structure of what is saved changes.
FORMAT = 3

_T = TypeVar("_T")


class Checkpoints:
  """The checkpoints of one run; all processes call everything.

  Args:
    out: the folder of the run, the same in all processes.
    identity: the settings, JSON-like, that a run can only be resumed with.

  Attributes:
    log_end: what was saved with the state that was restored, None if none was.
  """

  def __init__(self, out: str | os.PathLike[str], identity: dict[str, Any]):
    self._out = out
    self._folder = storage.absolute(out) / "checkpoints"
    self._set_aside = storage.absolute(out) / "damaged_checkpoints"
    self._identity = identity
    # Step to what is wrong with its checkpoint.
    self._damage: dict[int, str] = {}
    self.log_end = None
    self._manager = self._open()

  @property
  def last_step(self) -> int:
    """The step of the newest checkpoint not found damaged, 0 if there is none."""
    steps = set(self._manager.all_steps()) - self._damage.keys()
    return max(steps, default=0)

  def clear(self) -> None:
    """Deletes all checkpoints."""
    with saving("deleting checkpoints", self._out), _quiet():
      for step in self._manager.all_steps():
        self._manager.delete(step)
    if hosts.is_first():
      self._set_aside.rmtree(missing_ok=True)

  def check(self) -> None:
    """Raises SetupError if the newest checkpoint cannot be continued from."""
    if self.last_step:
      self._newest_whole(self._settings)

  def restore(self, shapes: Any) -> Any:
    """The state of the newest checkpoint that is whole; there must be one.

    Damaged ones are moved out of the way, which a message says.

    Args:
      shapes: the `jaxroute.TrainState` to expect, `jax.ShapeDtypeStruct`s for
        its arrays; their shardings say where the arrays are put.

    Returns:
      A `jaxroute.TrainState`.

    Raises:
      SetupError: if none is whole, or the settings are others.
    """

    def read(step: int) -> tuple[Any, dict[str, Any]]:
      settings = self._settings(step)
      with _same_damage():
        state = self._read_state(step, shapes)
      with _same_damage():
        found = checksum.checksums(state)
        wrong = [k for k, v in settings["arrays"].items() if found.get(k) != v]
        if wrong:
          raise _DamagedError(f"not as they were saved: {', '.join(wrong[:3])}")
      return state, settings["log"]

    state, self.log_end = self._newest_whole(read)
    self._move_damaged()
    return state

  def save(self, step: int, state: Any, log_end: Any = None) -> None:
    """Saves, and deletes all but the last two.

    Args:
      step: the step that the state is of.
      state: a `jaxroute.TrainState`.
      log_end: JSON-like, where the log of the run ends.

    Raises:
      SaveError: if it cannot be written. Earlier checkpoints are as they were.
    """
    if step == self.last_step:
      return
    try:
      with saving(f"saving step {step}", self._out), _quiet():
        self._write(step, state, log_end)
    except BaseException:
      if hosts.is_first():
        with contextlib.suppress(OSError):
          for part in self._folder.glob(f"{step}.orbax-checkpoint-tmp*"):
            part.rmtree()
      raise

  def _write(self, step: int, state: Any, log_end: Any) -> None:
    # The array store prints at length if the disk turns out full halfway.
    needed = sum(x.nbytes for x in jax.tree.leaves(state)) + 2**16
    with hosts.together(), saving(f"saving step {step}", self._out):
      is_local = not storage.is_remote(self._out)
      if is_local and shutil.disk_usage(self._folder).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    settings = {
      "format": FORMAT,
      "step": step,
      "identity": self._identity,
      "log": log_end,
      "arrays": checksum.checksums(state),
    }
    settings["sha256"] = _digest(settings)
    self._manager.save(
      step,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        settings=ocp.args.JsonSave(settings),
      ),
    )

  def _open(self) -> ocp.CheckpointManager:
    options = ocp.CheckpointManagerOptions(
      max_to_keep=2,
      # A killed process may have left a checkpoint half written.
      cleanup_tmp_directories=True,
      enable_async_checkpointing=False,
      # Nothing is read here that could be damaged.
      lightweight_initialize=True,
    )
    with saving("preparing the folder of checkpoints", self._out), _quiet():
      if hosts.is_first():
        self._folder.mkdir(parents=True, exist_ok=True)
      return _Manager(self._folder, options=options)

  def _newest_whole(self, read: Callable[[int], _T]) -> _T:
    """What `read` makes of the newest step that it does not find damaged."""
    while step := self.last_step:
      with _quiet():
        try:
          return read(step)
        except _DamagedError as damage:
          self._damage[step] = str(damage)
        # Reads that failed side by side are reported when they are deleted.
        gc.collect()
    found = "; ".join(f"step {s}: {why}" for s, why in self._damage.items())
    raise SetupError(
      f"--out={self._out} holds no checkpoint that is whole ({found}). Put one"
      " back from a copy, or --resume=false to start the run anew."
    )

  def _read_state(self, step: int, shapes: Any) -> Any:
    """The state of a checkpoint, read where its shardings put it.

    The manager would wait for processes that have found theirs damaged.
    """
    handler = ocp.StandardCheckpointHandler()
    try:
      return handler.restore(
        self._folder / str(step) / "state",
        args=ocp.args.StandardRestore(shapes),
      )
    # What Orbax and the array store raise for a damaged file has no common type.
    except Exception as error:
      raise _unreadable("state", error) from error

  def _settings(self, step: int) -> dict[str, Any]:
    """What lies beside the state, if the run can be continued from it."""
    with _same_damage():
      settings = self._read_settings(step)
    found = settings.get("format")
    if found != FORMAT:
      raise SetupError(
        f"--out={self._out} holds checkpoints"
        f" {'without a format' if found is None else f'of format {found}'},"
        f" expected format {FORMAT}: another version of this program wrote them."
        " Choose another --out, or --resume=false to delete that run."
      )
    saved = settings["identity"]
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
    return settings

  def _read_settings(self, step: int) -> dict[str, Any]:
    path = self._folder / str(step) / "settings" / "metadata"
    try:
      settings = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
      raise _unreadable("settings", error) from error
    if not isinstance(settings, dict):
      raise _DamagedError("its settings are not as they were saved")
    digest, is_ours = (
      settings.pop("sha256", None),
      settings.get("format") == FORMAT,
    )
    # Formats before 3 had no digest.
    if digest != _digest(settings) and (digest or is_ours):
      raise _DamagedError("its settings are not as they were saved")
    if is_ours and settings["step"] != step:
      raise _DamagedError(f"it was saved as step {settings['step']}")
    return settings

  def _move_damaged(self) -> None:
    """Moves damaged checkpoints aside, whose steps will be saved again."""
    if not self._damage:
      return
    with hosts.together():
      if hosts.is_first():
        for step, why in self._damage.items():
          self._move(step, why)
    self._damage.clear()
    self._manager = self._open()

  def _move(self, step: int, why: str) -> None:
    with saving("moving a damaged checkpoint", self._out):
      self._set_aside.mkdir(exist_ok=True)
      (self._set_aside / str(step)).rmtree(missing_ok=True)
      (self._folder / str(step)).rename(self._set_aside / str(step))
    print(
      f"--out={self._out}: the checkpoint of step {step} is damaged ({why})."
      f" It is now in {self._set_aside}; the run continues from step"
      f" {self.last_step}.",
      file=sys.stderr,
    )


class _Manager(ocp.CheckpointManager):
  """Saves when it is told to: whether to stop is asked once a step, by `Stop`."""

  def reached_preemption(self, step: int) -> bool:
    del step
    return False


class _DamagedError(Exception):
  """A checkpoint is not what was saved; the text says in what way."""


def _unreadable(name: str, error: Exception) -> _DamagedError:
  reason = re.split(r" \[|\n", str(error).strip())[0][-100:]
  return _DamagedError(
    f"its {name} cannot be read: {type(error).__name__}: {reason}"
  )


@contextlib.contextmanager
def _same_damage() -> Iterator[None]:
  """Has all processes find the damage that any of them finds."""
  found = None
  try:
    yield
  except _DamagedError as error:
    found = error
  everyone = hosts.gather(None if found is None else str(found))
  if found is not None:
    raise found
  for i, why in enumerate(everyone):
    if why is not None:
      raise _DamagedError(f"{why}, in process {i}")


def _digest(settings: dict[str, Any]) -> str:
  text = json.dumps(settings, sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()


def saved_identity(out: str | os.PathLike[str]) -> dict[str, Any]:
  """The settings that the run in a folder was begun with, {} if it has none.

  Args:
    out: the folder of the run.
  """
  found = (epath.Path(out) / "checkpoints").glob("*/settings/metadata")
  of_step = {int(p.parts[-3]): p for p in found if p.parts[-3].isdecimal()}
  for step in sorted(of_step, reverse=True):
    # A file may be damaged in any way.
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
      settings = json.loads(of_step[step].read_bytes())
      if settings.pop("sha256") == _digest(settings):
        return settings["identity"]
  return {}


@contextlib.contextmanager
def saving(doing: str, out: str | os.PathLike[str]) -> Iterator[None]:
  """Turns what a disk raises into a `SaveError` or, if not full, a `SetupError`.

  Args:
    doing: what fails then.
    out: the folder of the run.
  """
  try:
    yield
  except (SaveError, SetupError):
    raise
  # The array store raises a ValueError that quotes the system's error.
  except (OSError, ValueError) as error:
    quoted = re.search(r"([^:]+) \[os_error_code='(\d+)'", str(error))
    if not isinstance(error, OSError) and not quoted:
      raise
    code = int(quoted[2]) if quoted else getattr(error, "errno", None)
    reason = quoted[1].strip() if quoted else getattr(error, "strerror", None)
    failed = f"{doing} in --out={out} failed: {reason or error}."
    if code in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
      raise SaveError(
        f"{failed} Earlier checkpoints are intact; put that right (free space,"
        " say) and run the same command again."
      ) from error
    named = getattr(error, "filename", None)
    raise SetupError(
      f"{failed} Expected a folder that this process may write to"
      f"{f', look at {named}' if named else ''}."
    ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Silences the logs of the checkpointer, which repeat what it raises."""
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  levels = [logger.level for logger in loggers]
  hook = sys.unraisablehook
  for logger in loggers:
    logger.setLevel(logging.CRITICAL)
  sys.unraisablehook = lambda unraisable: None
  try:
    yield
  finally:
    sys.unraisablehook = hook
    for logger, level in zip(loggers, levels, strict=True):
      logger.setLevel(level)
