# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rows on the disk: JSON whatever the loss, and whole or refused."""

import json
import math

import config as config_lib
import metrics_log
import pytest

pytestmark = pytest.mark.any_jax

STEP = 4


def _row(step):
  loss = {2: math.nan, 3: math.inf}.get(step, 0.5)
  return {"kind": "train", "step": step, "loss": loss, "seconds": None}


@pytest.fixture
def written(tmp_path):
  """Settings, the path of a log of six steps, and where it ended after four."""
  config = config_lib.Config(out=str(tmp_path), steps=6)
  log = metrics_log.MetricsLog(config, 0)
  for step in range(1, 7):
    log.add(_row(step))
    if step == STEP:
      end = log.sync()
  log.close()
  return config, tmp_path / "metrics.jsonl", end


def _refuse(name):
  raise AssertionError(f"{name} is no JSON")


def test_numbers_that_are_not_finite_are_null(written):
  config, path, end = written
  lines = path.read_text().splitlines()
  rows = [json.loads(line, parse_constant=_refuse) for line in lines]
  assert [row["loss"] for row in rows[:4]] == [0.5, None, None, 0.5]
  log = metrics_log.MetricsLog(config, STEP, end)
  log.close()
  assert math.isnan(log.rows[1]["loss"]) and math.isnan(log.rows[2]["loss"])
  assert log.rows[3] == _row(4)


def test_what_follows_the_checkpoint_is_cut_off(written):
  config, path, end = written
  text = path.read_bytes()
  path.write_bytes(text + b'{"kind": "tr')
  log = metrics_log.MetricsLog(config, STEP, end)
  assert [row["step"] for row in log.rows] == [1, 2, 3, 4]
  for step in (5, 6):
    log.add(_row(step))
  # The end is of the whole file, not of what this process has written.
  assert log.sync()["bytes"] == len(text)
  log.close()
  assert path.read_bytes() == text


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda lines: lines[:2], "it lacks 2 steps, the first is 3"),
    (lambda lines: lines[:1] + lines[2:], "it lacks 1 steps, the first is 2"),
    (lambda lines: [lines[0], lines[1][:9], *lines[2:]], "line 2 is broken"),
    (lambda lines: [b"\xff\0", *lines], "line 1 is broken"),
    (lambda lines: [b"3", *lines], "line 1 is broken"),
    (lambda lines: [lines[0].replace(b"0.5", b"0.6"), *lines[1:]], "changed"),
    (lambda lines: [], "it lacks 4 steps, the first is 1"),
  ],
)
def test_a_damaged_log_is_refused(written, change, message):
  config, path, end = written
  damaged = b"\n".join(change(path.read_bytes().splitlines()))
  path.write_bytes(damaged)
  with pytest.raises(config_lib.SetupError) as error:
    metrics_log.MetricsLog(config, STEP, end)
  assert message in str(error.value) and str(path) in str(error.value)
  assert "or delete it to continue without" in str(error.value)
  assert path.read_bytes() == damaged


def test_a_deleted_log_is_done_without_which_is_said(written, capsys):
  config, path, end = written
  path.unlink()
  for _ in range(2):
    log = metrics_log.MetricsLog(config, STEP, end)
    assert log.rows == []
    assert f"{path} lacks 4 of the 4 steps" in capsys.readouterr().err
    end = log.sync()
    log.close()
  path.unlink()
  with pytest.raises(config_lib.SetupError, match="a run that is finished"):
    metrics_log.MetricsLog(config, 6, {"bytes": 9, "sha256": ""})
