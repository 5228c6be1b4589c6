# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checkpoints of any state: what is kept, and what is not continued from."""

import errno
import os
import shutil

import checkpoint as checkpoint_lib
import config as config_lib
import jax
import jax.numpy as jnp
import numpy as np
import pytest


def _state(step):
  return {"bias": jnp.full(3, step, jnp.float32), "load": jnp.arange(3)}


def _shapes():
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
    _state(0),
  )


@pytest.fixture
def saved(tmp_path):
  """The folder of a run that saved its steps 1, 2 and 3."""
  checkpoints = checkpoint_lib.Checkpoints(tmp_path, {"seed": 0})
  assert checkpoints.last_step == 0
  checkpoints.check()
  for step in (1, 2, 3):
    checkpoints.save(step, _state(step))
  return tmp_path


def test_the_last_two_are_kept_and_the_last_is_restored(saved):
  # A killed process leaves such a folder behind.
  (saved / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()
  checkpoints = checkpoint_lib.Checkpoints(saved, {"seed": 0})
  checkpoints.check()
  assert checkpoints.last_step == 3
  jax.tree.map(
    np.testing.assert_array_equal, checkpoints.restore(_shapes()), _state(3)
  )
  checkpoints.save(4, _state(4))
  assert sorted(os.listdir(saved / "checkpoints")) == ["3", "4"]
  checkpoints.clear()
  assert checkpoints.last_step == 0


@pytest.mark.parametrize(
  "found, message",
  [
    (None, "holds checkpoints without a format, expected format"),
    (99, "holds checkpoints of format 99, expected format"),
  ],
)
def test_another_format_is_refused(tmp_path, monkeypatch, found, message):
  identity = {"seed": 0}
  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_lib, "FORMAT", found)
    checkpoint_lib.Checkpoints(tmp_path, identity).save(1, _state(1))
  checkpoints = checkpoint_lib.Checkpoints(tmp_path, identity)
  with pytest.raises(config_lib.SetupError, match=message) as error:
    checkpoints.check()
  assert "Choose another --out, or --resume=false" in str(error.value)


def test_other_settings_are_refused(saved):
  checkpoints = checkpoint_lib.Checkpoints(saved, {"seed": 1, "top_k": 2})
  with pytest.raises(
    config_lib.SetupError,
    match=r"\(--seed: 0 there, 1 here; --top_k: None there, 2 here\)",
  ):
    checkpoints.check()


def test_a_full_disk_is_found_before_anything_is_written(saved, monkeypatch):
  checkpoints = checkpoint_lib.Checkpoints(saved, {"seed": 0})
  usage = checkpoint_lib.shutil.disk_usage(saved)
  monkeypatch.setattr(
    checkpoint_lib.shutil, "disk_usage", lambda path: usage._replace(free=100)
  )
  with pytest.raises(
    checkpoint_lib.SaveError,
    match="saving step 4 in --out=.* failed: No space left on device",
  ):
    checkpoints.save(4, _state(4))
  assert sorted(os.listdir(saved / "checkpoints")) == ["2", "3"]


def _zero(data):
  return bytes(len(data))


def _flip(data):
  middle = len(data) // 2
  return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


_DAMAGES = {
  "cut": lambda data: data[: len(data) // 2],
  "empty": lambda data: b"",
  "zero": _zero,
  "flip": _flip,
  "gone": None,
}
# What lies in a checkpoint, by the part of the path that does not change.
_SOME = ("settings/metadata", "state/_METADATA", "state/d/")


def _resume_damaged(saved, run, path, damage):
  """Damages a file of step 3 in a copy: the step restored, and its array."""
  shutil.rmtree(run, ignore_errors=True)
  shutil.copytree(saved, run)
  file = run / path.relative_to(saved)
  if damage is None:
    file.unlink()
  else:
    file.write_bytes(damage(file.read_bytes()))
  checkpoints = checkpoint_lib.Checkpoints(run, {"seed": 0})
  checkpoints.check()
  state = checkpoints.restore(_shapes())
  step = checkpoints.last_step
  jax.tree.map(np.testing.assert_array_equal, state, _state(step))
  return step


def _files(saved, parts):
  folder = saved / "checkpoints" / "3"
  files = sorted(p for p in folder.rglob("*") if p.is_file())
  return [p for p in files if any(part in str(p) for part in parts)]


# A read may fail after another of its checkpoint already has.
_LATE_READS = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


@_LATE_READS
@pytest.mark.parametrize("name", ["cut", "zero", "flip"])
def test_a_damaged_checkpoint_is_never_taken(saved, tmp_path, capfd, name):
  run, steps = tmp_path / "run", []
  for path in _files(saved, _SOME):
    steps.append(_resume_damaged(saved, run, path, _DAMAGES[name]))
    printed = capfd.readouterr().err
    if steps[-1] == 3:
      assert not printed
      continue
    assert f"--out={run}: the checkpoint of step 3 is damaged (" in printed
    assert printed.endswith("the run continues from step 2.\n")
    assert "Traceback" not in printed
    assert os.listdir(run / "damaged_checkpoints") == ["3"]
    assert os.listdir(run / "checkpoints") == ["2"]
  assert steps.count(2) >= 3


@_LATE_READS
@pytest.mark.long
def test_no_damage_of_any_file_is_taken_for_the_state(saved, tmp_path):
  steps = [
    _resume_damaged(saved, tmp_path / "run", path, damage)
    for path in _files(saved, [""])
    for damage in _DAMAGES.values()
  ]
  assert {2, 3} == set(steps) and len(steps) > 60


@_LATE_READS
def test_a_checkpoint_under_another_step_is_damaged(saved, capsys):
  shutil.copytree(saved / "checkpoints" / "3", saved / "checkpoints" / "4")
  checkpoints = checkpoint_lib.Checkpoints(saved, {"seed": 0})
  checkpoints.check()
  checkpoints.restore(_shapes())
  assert checkpoints.last_step == 3
  assert "step 4 is damaged (it was saved as step 3)" in capsys.readouterr().err
  # What was moved away leaves room for that step.
  checkpoints.save(4, _state(4), {"bytes": 7})
  again = checkpoint_lib.Checkpoints(saved, {"seed": 0})
  again.restore(_shapes())
  assert again.last_step == 4 and again.log_end == {"bytes": 7}


def test_what_one_process_finds_damaged_no_other_takes(
  saved, monkeypatch, capsys
):
  answers = iter([None, "its state cannot be read"])
  monkeypatch.setattr(
    checkpoint_lib.hosts, "gather", lambda mine: [mine, next(answers, None)]
  )
  checkpoints = checkpoint_lib.Checkpoints(saved, {"seed": 0})
  state = checkpoints.restore(_shapes())
  jax.tree.map(np.testing.assert_array_equal, state, _state(2))
  assert "(its state cannot be read, in process 1)" in capsys.readouterr().err
  assert os.listdir(saved / "damaged_checkpoints") == ["3"]


def test_without_a_whole_checkpoint_nothing_is_changed(saved):
  for step in ("2", "3"):
    shutil.rmtree(saved / "checkpoints" / step / "state")
  checkpoints = checkpoint_lib.Checkpoints(saved, {"seed": 0})
  checkpoints.check()
  with pytest.raises(
    config_lib.SetupError,
    match=r"no checkpoint that is whole \(step 3: its state .*; step 2: its"
    " state .*. Put one back from a copy, or --resume=false",
  ):
    checkpoints.restore(_shapes())
  assert sorted(os.listdir(saved / "checkpoints")) == ["2", "3"]


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.EIO])
def test_a_folder_that_cannot_be_used_is_not_a_full_disk(tmp_path, number):
  full = number == errno.EIO
  kind = checkpoint_lib.SaveError if full else config_lib.SetupError
  with pytest.raises(kind, match=f"trying in --out=.*: {os.strerror(number)}"):
    with checkpoint_lib.saving("trying", tmp_path):
      raise OSError(number, os.strerror(number), "file")
