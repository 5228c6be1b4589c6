# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The folder of a run, which one run at a time writes to."""

import contextlib
import errno
import os
import sys
from collections.abc import Iterator

import hosts
import storage
from checkpoint import saving
from config import SetupError

try:
  import fcntl
except ImportError:  # Windows has no such locks.
  fcntl = None

# A folder with this file is the folder of a run.
NAME = "run.lock"


@contextlib.contextmanager
def claim(out: str | os.PathLike[str]) -> Iterator[None]:
  """Makes the folder, and keeps other runs out of it.

  The lock is the system's and is gone with the process, however that ends. Of
  several processes of one run, the first holds it. A bucket has no locks.

  Args:
    out: the folder of the run.

  Raises:
    SetupError: if it cannot be written to, or another run is using it.
  """
  if not hosts.is_first():
    yield
    return
  folder, descriptor = storage.absolute(out), None
  with saving("opening the folder", out):
    folder.mkdir(parents=True, exist_ok=True)
    if storage.is_remote(out):
      (folder / NAME).write_text("")
    else:
      descriptor = os.open(folder / NAME, os.O_RDWR | os.O_CREAT, 0o666)
  if descriptor is None:
    _say_unlocked("a bucket has no locks")
    yield
    return
  try:
    if not _lock(descriptor):
      raise SetupError(
        f"--out={out} is in use by another run. Wait until it ends, or stop it,"
        " or choose another --out."
      )
    yield
  finally:
    os.close(descriptor)


def _lock(descriptor: int) -> bool:
  """Locks a file until it is closed; False if another process has locked it."""
  try:
    if fcntl is None:
      raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    _say_unlocked(error.strerror or str(error))
  return True


def _say_unlocked(why: str) -> None:
  print(
    f"The folder of the run cannot be locked here ({why}): take care that no other"
    " run uses it.",
    file=sys.stderr,
  )
