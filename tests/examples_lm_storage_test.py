# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A run in a bucket, which a folder stands in for: nothing lies beside it."""

import json
import pathlib

import config as config_lib
import lock
import metrics_log
import numpy as np
import pytest
import report as report_lib
import results
import storage
import yardsticks
from etils import epath

dirfs = pytest.importorskip("fsspec.implementations.dirfs")
local_files = pytest.importorskip("fsspec.implementations.local")
pytestmark = pytest.mark.any_jax

OUT = "gs://bucket/run"


@pytest.fixture
def bucket(tmp_path, monkeypatch):
  """A folder that stands in for all buckets; the current one is empty."""
  folder = tmp_path / "buckets"
  (folder / "bucket").mkdir(parents=True)
  local = local_files.LocalFileSystem(auto_mkdir=True)

  class Buckets(dirfs.DirFileSystem):
    protocol = "gs"

    def _join(self, path):
      return super()._join(str(path).removeprefix("gs://"))

  buckets = Buckets(path=str(folder), fs=local)
  backend = type(epath.Path("gs://b/c")._backend)
  monkeypatch.setattr(backend, "fs", lambda self, path: buckets)
  here = tmp_path / "here"
  here.mkdir()
  monkeypatch.chdir(here)
  for cached in (storage._stand_in, storage._sent):
    cached.cache_clear()
  yield folder / "bucket" / "run"
  assert not list(here.iterdir())


def _row(step):
  return {"kind": "train", "step": step, "loss": 0.5, "seconds": None}


def test_metrics_are_copied_when_a_checkpoint_needs_them(bucket):
  config = config_lib.Config(out=OUT, steps=6)
  storage.check(OUT)
  log = metrics_log.MetricsLog(config, 0)
  for step in (1, 2):
    log.add(_row(step))
  end = log.sync()
  log.add(_row(3))
  log.close()
  rows = (bucket / "metrics.jsonl").read_text().splitlines()
  assert [json.loads(r)["step"] for r in rows] == [1, 2]
  assert list((bucket / "tensorboard").glob("events*"))
  # Another machine finds nothing but the bucket.
  storage._stand_in.cache_clear()
  storage._sent.cache_clear()
  log = metrics_log.MetricsLog(config, 2, end)
  assert [r["step"] for r in log.rows] == [1, 2]
  log.add(_row(3))
  assert log.sync()["bytes"] > end["bytes"]
  log.close()
  assert [r["step"] for r in report_lib.read_rows(OUT)] == [1, 2, 3]


def test_results_are_copied(bucket, monkeypatch):
  monkeypatch.setattr(yardsticks, "yardsticks", lambda *_: {})
  monkeypatch.setattr(
    report_lib, "summarize", lambda rows, tokens: {"steps": 1}
  )
  monkeypatch.setattr(
    results.figures_lib,
    "write_figures",
    lambda rows, out: (out / "loss.png").write_bytes(b"png"),
  )
  storage.local(OUT).mkdir(exist_ok=True)
  results.write(config_lib.Config(out=OUT), None, [], "Written.", 0)
  found = sorted(p.name for p in bucket.iterdir())
  assert found == ["loss.png", "sample.txt", "summary.json"]
  assert (bucket / "sample.txt").read_text() == "Written."


def test_a_bucket_has_no_locks_and_is_told_for_a_run(bucket, capsys):
  for _ in range(2):
    with lock.claim(OUT):
      assert (bucket / lock.NAME).exists()
      assert "a bucket has no locks" in capsys.readouterr().err


def test_a_bucket_that_cannot_be_reached_is_refused(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)

  def fail(self, path):
    raise ImportError("Please install gcsfs")

  monkeypatch.setattr(type(epath.Path("gs://b/c")._backend), "fs", fail)
  with pytest.raises(
    config_lib.SetupError,
    match="--out=gs://bucket/run cannot be reached: .*gcsfs. A bucket needs `pip",
  ):
    storage.check(OUT)
  assert not list(tmp_path.iterdir())


def test_a_folder_of_this_machine_is_itself(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert storage.local("a/b") == pathlib.Path("a/b")
  assert storage.absolute("a/b") == tmp_path / "a" / "b"
  np.savez(storage.fetch(str(tmp_path), "scores.npz"), x=1)
  storage.publish(str(tmp_path))
  assert [p.name for p in tmp_path.iterdir()] == ["scores.npz"]
