# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checkpoints of any state: what is kept, and what is not continued from."""

import os

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
  assert sorted(os.listdir(saved / "checkpoints")) == ["2", "3"]
  assert checkpoints.last_step == 3
  jax.tree.map(
    np.testing.assert_array_equal, checkpoints.restore(_shapes()), _state(3)
  )
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
