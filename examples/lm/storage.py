# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The folder of a run: on this machine, or in a bucket (gs://).

A bucket holds whole objects and takes no further lines. What the first process
writes for a folder there is written to one of this machine, and copied: metrics
at every checkpoint, the rest at the end. Checkpoints go there directly.
"""

import atexit
import functools
import os
import pathlib
import shutil
import tempfile

from config import SetupError
from etils import epath


def is_remote(out: str | os.PathLike[str]) -> bool:
  """Whether a folder is in a bucket."""
  return "://" in os.fspath(out)


def absolute(out: str | os.PathLike[str]) -> epath.Path:
  """The folder by its full name."""
  return epath.Path(out if is_remote(out) else os.path.abspath(out))


def check(out: str) -> None:
  """Raises SetupError if a bucket cannot be reached."""
  if not is_remote(out):
    return
  try:
    epath.Path(out).exists()
  # What a client of a cloud raises has no common type.
  except Exception as error:
    reason = str(error).strip().split("\n")[0]
    raise SetupError(
      f"--out={out} cannot be reached: {type(error).__name__}: {reason}. A bucket"
      " needs `pip install gcsfs`, and credentials that may write to it."
    ) from error


def local(out: str | os.PathLike[str]) -> pathlib.Path:
  """Where this machine writes what belongs into a folder."""
  if not is_remote(out):
    return pathlib.Path(out)
  return _stand_in(os.fspath(out))


def fetch(out: str, name: str) -> pathlib.Path:
  """The path of a file of a run on this machine, of what the bucket has of it."""
  path, there = local(out) / name, epath.Path(out) / name
  if is_remote(out):
    path.unlink(missing_ok=True)
    if there.exists():
      path.write_bytes(there.read_bytes())
  return path


def publish(out: str | os.PathLike[str]) -> None:
  """Copies to a bucket what was written here since the last time."""
  if not is_remote(out):
    return
  folder, sent = local(out), _sent(os.fspath(out))
  for path in sorted(p for p in folder.rglob("*") if p.is_file()):
    state = path.stat().st_size, path.stat().st_mtime_ns
    if sent.get(path) != state:
      there = epath.Path(out) / path.relative_to(folder).as_posix()
      there.parent.mkdir(parents=True, exist_ok=True)
      with path.open("rb") as source, there.open("wb") as target:
        shutil.copyfileobj(source, target)
      sent[path] = state


@functools.cache
def _stand_in(out: str) -> pathlib.Path:
  """The folder of this machine for one in a bucket; gone with the process."""
  del out
  folder = tempfile.mkdtemp(prefix="run-")
  atexit.register(shutil.rmtree, folder, ignore_errors=True)
  return pathlib.Path(folder)


@functools.cache
def _sent(out: str) -> dict[pathlib.Path, tuple[int, int]]:
  """File to its size and time when it was copied."""
  del out
  return {}
