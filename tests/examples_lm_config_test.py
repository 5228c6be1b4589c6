# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Settings of the main job: which are refused, and which a run is known by."""

import dataclasses
import subprocess
import sys

import config as config_lib
import lm_runs
import pytest
import train as train_lib

pytestmark = pytest.mark.any_jax

CONFIG = config_lib.Config(
  batch_size=4, seq_len=32, model_size=32, num_heads=2, num_experts=8
)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"steps": 0}, "--steps must be at least 1, got 0"),
    ({"num_layers": 1}, "--num_layers must be at least 2"),
    ({"rule": "magic"}, "--rule must be one of none, sign, .* got 'magic'"),
    ({"score_fn": "relu"}, "--score_fn must be one of"),
    ({"top_k": 9}, "--top_k must be in"),
    ({"rate": float("inf")}, "--rate must be finite"),
    ({"mesh": "2"}, "--mesh must be DATA,EXPERT, two positive integers"),
    ({"mesh": "3,1"}, "--batch_size=4 must be divisible by"),
    ({"mesh": "1,3"}, "--num_experts=8 must be divisible by the 3"),
    ({"num_heads": 32}, "--num_heads=32 must divide --model_size=32"),
  ],
)
def test_an_impossible_setting_is_named(change, message):
  with pytest.raises(config_lib.SetupError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_a_run_is_known_by_what_its_steps_depend_on():
  identity = CONFIG.identity()
  for name in ("out", "steps", "mesh", "eval_every", "save_every", "resume"):
    assert name not in identity
  for name in ("rule", "rate", "seed", "data", "num_experts"):
    assert identity[name] == getattr(CONFIG, name)
  assert identity["decay_steps"] == CONFIG.steps


def test_more_devices_than_there_are_is_named(tmp_path):
  corpus = lm_runs.write_corpus(tmp_path)
  config = dataclasses.replace(
    CONFIG,
    batch_size=16,
    mesh="16,1",
    data=str(corpus),
    out=str(tmp_path / "o"),
  )
  with pytest.raises(config_lib.SetupError, match="needs 16 devices, found 8"):
    train_lib.train(config)
  assert not (tmp_path / "o").exists()


def test_errors_come_without_a_traceback(tmp_path):
  out, missing = tmp_path / "o", tmp_path / "none"
  done = subprocess.run(
    [sys.executable, lm_runs.SCRIPT, f"--data={missing}", f"--out={out}"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith(f"train.py: --data={missing}")
  assert "Traceback" not in done.stderr
