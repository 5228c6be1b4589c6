# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Bytes to train on: a folder of text, or one file of anything.

Every tenth file of a folder, or the last tenth of a single file, is held out
for validation. Batches are a pure function of seed and step.
"""

import dataclasses
import hashlib
import os
import pathlib
import sysconfig
from collections.abc import Iterator

import lock
import numpy as np
from config import Config, SetupError

_HELD_OUT = 10
# Some of these are not installed everywhere; pydoc_data is one huge string.
_NOT_LIBRARY = {
  "dist-packages",
  "idlelib",
  "lib2to3",
  "pydoc_data",
  "site-packages",
  "test",
  "tests",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Corpus:
  """Bytes to train on and bytes held out.

  Attributes:
    train: `[bytes]` uint8.
    validation: `[bytes]` uint8.
    sha256: the digest of both, which a resumed run must find again.
    description: one line for the log.
  """

  train: np.ndarray
  validation: np.ndarray
  sha256: str
  description: str

  def batch(
    self, config: Config, step: int, rows: slice = slice(None)
  ) -> np.ndarray:
    """`[batch_size, seq_len + 1]` uint8: random windows, by seed and step.

    Args:
      config: the settings.
      step: of training.
      rows: those to return; a process needs those of its devices only.
    """
    rng = np.random.default_rng((config.seed, step))
    last = len(self.train) - config.seq_len
    starts = rng.integers(0, last, config.batch_size)
    return _windows(self.train, starts[rows], config.seq_len)

  def validation_batches(self, config: Config) -> np.ndarray:
    """`[batches, batch_size, seq_len + 1]` uint8: evenly spaced windows.

    The windows cover all held-out bytes, unless `eval_batches` are fewer than
    that takes; they overlap where they would not fill the last batch.
    """
    size = config.batch_size * config.seq_len
    count = min(config.eval_batches, -(-len(self.validation) // size))
    last = len(self.validation) - config.seq_len - 1
    starts = np.linspace(0, last, count * config.batch_size).astype(np.int64)
    windows = _windows(self.validation, starts, config.seq_len)
    return windows.reshape(count, config.batch_size, -1)


def load(config: Config) -> Corpus:
  """Reads and splits the corpus.

  Args:
    config: `data`, `data_bytes` and `seq_len` of it are used.

  Returns:
    A `Corpus`.

  Raises:
    SetupError: if there is nothing to read, or too little.
  """
  root = pathlib.Path(config.data or sysconfig.get_paths()["stdlib"])
  if os.path.isdir(root):
    files, notes = _read_folder(root, config)
  else:
    files, notes = [_read_file(root, config.data_bytes)], ""
  train, validation = _split(files)
  for purpose, part in (("train", train), ("validate", validation)):
    if len(part) <= config.seq_len:
      raise SetupError(
        f"--data={root} leaves {len(part)} bytes to {purpose} on, expected more"
        f" than --seq_len={config.seq_len}.{notes} Give a larger corpus, or a"
        " smaller --seq_len."
      )
  return Corpus(
    train=np.frombuffer(train, np.uint8),
    validation=np.frombuffer(validation, np.uint8),
    sha256=hashlib.sha256(train + b"\0" + validation).hexdigest(),
    description=(
      f"{root}: {len(files):,} files, {len(train):,} bytes to train on,"
      f" {len(validation):,} held out.{notes}"
    ),
  )


def _read_folder(root: pathlib.Path, config: Config) -> tuple[list[bytes], str]:
  """Reads the text files below a folder, in order, and notes what it skipped."""
  files, left, binary, unreadable = [], config.data_bytes, 0, []
  out = os.path.realpath(config.out)
  if out == os.path.realpath(root):
    raise SetupError(
      f"--out={config.out} is --data={root}, to which a run would add files."
      " Choose another --out."
    )
  for path in _walk(root, out, unreadable, library=not config.data):
    if left <= 0:
      break
    try:
      text = _head(path, left)
    except OSError as error:
      unreadable.append(error)
      continue
    if b"\0" in text:
      binary += 1
      continue
    files.append(text)
    left -= len(text)
  skipped = {"binary": binary, "unreadable": len(unreadable)}
  parts = [f"{count} {kind}" for kind, count in skipped.items() if count]
  return files, f" Skipped {' and '.join(parts)} files." if parts else ""


def _walk(
  root: pathlib.Path, out: str, unreadable: list[OSError], *, library: bool
) -> Iterator[pathlib.Path]:
  """Yields the files below a folder that are not hidden; sources of a library.

  The folders of runs are left out, `out` and others: they change. The errors of
  folders that cannot be read are added to `unreadable`.
  """
  top = os.path.realpath(root)
  for folder, folders, names in os.walk(top, onerror=unreadable.append):
    if lock.NAME in names or folder == out:
      folders[:] = []
      continue
    folders[:] = sorted(
      f
      for f in folders
      if not f.startswith(".") and not (library and f in _NOT_LIBRARY)
    )
    for name in sorted(names):
      path = pathlib.Path(folder, name)
      wanted = not name.startswith(".") and (
        not library or path.suffix == ".py"
      )
      # Reading a pipe would wait forever.
      if wanted and path.is_file():
        yield path


def _read_file(path: pathlib.Path, limit: int) -> bytes:
  # A pipe is read only once, and a device may have no end.
  if os.path.exists(path) and not os.path.isfile(path):
    raise SetupError(
      f"--data={path} is neither a file nor a folder. Give a file, or a folder"
      " of text files."
    )
  try:
    return _head(path, limit)
  except OSError as error:
    raise SetupError(
      f"--data={path} cannot be read: {error.strerror}. Give a file, or a"
      " folder of text files."
    ) from error


def _head(path: pathlib.Path, limit: int) -> bytes:
  with path.open("rb") as file:
    # Python allocates what it is told to read.
    return file.read(min(limit, os.fstat(file.fileno()).st_size))


def _split(files: list[bytes]) -> tuple[bytes, bytes]:
  """Holds out every tenth file, or the last tenth of the only one."""
  if len(files) <= 1:
    text = b"".join(files)
    cut = len(text) - len(text) // _HELD_OUT
    return text[:cut], text[cut:]
  # Fewer than ten files hold out their last.
  first = min(_HELD_OUT, len(files)) - 1
  validation = files[first::_HELD_OUT]
  train = [f for i, f in enumerate(files) if (i - first) % _HELD_OUT]
  return b"".join(train), b"".join(validation)


def _windows(text: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
  return text[starts[:, None] + np.arange(seq_len + 1)]
