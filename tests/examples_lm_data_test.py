# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What is trained on, what is held out, and what is refused."""

import dataclasses
import os

import config as config_lib
import data as data_lib
import lock
import numpy as np
import pytest

pytestmark = pytest.mark.any_jax

CONFIG = config_lib.Config(batch_size=4, seq_len=32)


def test_batches_are_a_function_of_seed_and_step(tmp_path):
  (tmp_path / "text").write_bytes(np.random.default_rng(0).bytes(5000))
  config = dataclasses.replace(CONFIG, data=str(tmp_path / "text"))
  corpus = data_lib.load(config)
  batch = corpus.batch(config, 3)
  assert batch.shape == (4, 33) and batch.dtype == np.uint8
  np.testing.assert_array_equal(batch, data_lib.load(config).batch(config, 3))
  assert np.any(batch != corpus.batch(config, 4))
  reseeded = dataclasses.replace(config, seed=1)
  assert np.any(batch != corpus.batch(reseeded, 3))


def test_every_tenth_file_is_held_out(tmp_path):
  for i in range(20):
    (tmp_path / f"{i:02d}").write_bytes(bytes([65 + i]) * 40)
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "binary").write_bytes(b"\0" * 40)
  (tmp_path / ".hidden").write_bytes(b"hidden")
  (tmp_path / "loop").symlink_to(tmp_path / "nothing")
  corpus = data_lib.load(dataclasses.replace(CONFIG, data=str(tmp_path)))
  assert bytes(corpus.validation) == b"J" * 40 + b"T" * 40
  assert len(corpus.train) == 18 * 40
  assert "Skipped 1 binary files." in corpus.description


def test_the_tail_of_a_single_file_is_held_out(tmp_path):
  path = tmp_path / "any"
  path.write_bytes(bytes(range(200)) * 2)
  config = dataclasses.replace(CONFIG, data=str(path))
  corpus = data_lib.load(config)
  assert bytes(corpus.validation) == bytes(range(160, 200))
  windows = corpus.validation_batches(config)
  assert windows.shape == (1, 4, 33)
  assert windows[0, 0, 0] == 160 and windows[0, -1, -1] == 199


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda path: None, "cannot be read: No such file"),
    (lambda path: path.mkdir(), "leaves 0 bytes to train on"),
    (lambda path: path.write_bytes(b""), "leaves 0 bytes to train on"),
    (
      lambda path: path.write_bytes(b"a" * 300),
      "leaves 30 bytes to validate on, expected more than --seq_len=32",
    ),
    (lambda path: os.mkfifo(path), "is neither a file nor a folder"),
    (lambda path: path.symlink_to("/dev/zero"), "is neither a file nor"),
    (lambda path: path.symlink_to(path), "cannot be read: Too many levels"),
    (lambda path: path.symlink_to("nothing"), "cannot be read: No such file"),
  ],
  ids=[
    "missing",
    "empty_folder",
    "empty_file",
    "too_short",
    "pipe",
    "device",
    "loop",
    "broken_link",
  ],
)
def test_an_unusable_corpus_is_named(tmp_path, make, message):
  path = tmp_path / "corpus"
  make(path)
  with pytest.raises(config_lib.SetupError, match=f"--data={path} {message}"):
    data_lib.load(dataclasses.replace(CONFIG, data=str(path)))


def test_the_folders_of_runs_are_no_corpus(tmp_path):
  for i in range(3):
    (tmp_path / f"{i}").write_bytes(b"text" * 40)
  out = tmp_path / "runs" / "a"
  config = dataclasses.replace(CONFIG, data=str(tmp_path), out=str(out))
  before = data_lib.load(config).sha256
  # One's own folder, before it has a lock and after; and another's.
  for folder, name in ((out, "log"), (out, lock.NAME), (out.parent, "b/log")):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"row" * 99)
    (out.parent / "b").mkdir(exist_ok=True)
    (out.parent / "b" / lock.NAME).touch()
    assert data_lib.load(config).sha256 == before
  with pytest.raises(config_lib.SetupError, match="--out=.* is --data="):
    data_lib.load(dataclasses.replace(config, out=str(tmp_path / "x" / "..")))


def test_any_data_bytes_are_as_many_as_there_are(tmp_path):
  (tmp_path / "text").write_bytes(b"text" * 400)
  for data in (tmp_path, tmp_path / "text"):
    config = dataclasses.replace(CONFIG, data=str(data), data_bytes=10**30)
    corpus = data_lib.load(config)
    assert len(corpus.train) + len(corpus.validation) == 1600
