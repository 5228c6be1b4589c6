# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The folder of a run, which one run at a time writes to."""

import contextlib
import errno
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
from checkpoint import saving
from config import SetupError

try:
  import fcntl
except ImportError:  # Windows has no such locks.
  fcntl = None

# A folder with this file is the folder of a run.
NAME = "run.lock"


@contextlib.contextmanager
def claim(out: pathlib.Path) -> Iterator[None]:
  """Makes the folder, and keeps other runs out of it.

  The lock is the system's and is gone with the process, however that ends. Of
  several processes of one run, the first holds it.

  Args:
    out: the folder of the run.

  Raises:
    SetupError: if it cannot be written to, or another run is using it.
  """
  if jax.process_index() > 0:
    yield
    return
  with saving("opening the folder", out):
    out.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(out / NAME, os.O_RDWR | os.O_CREAT, 0o666)
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
    print(
      f"The folder of the run cannot be locked here ({error.strerror}): take"
      " care that no other run uses it.",
      file=sys.stderr,
    )
  return True
