# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What several runs leave: each its folder, and a comparison beside them."""

import json
import pathlib

import command
import config as config_lib
import hosts
import numpy as np
import pytest
import report as report_lib
import train as train_lib
from absl import flags

pytestmark = pytest.mark.any_jax


def _rows(seed):
  rng = np.random.default_rng(seed)
  rows = [
    {
      "kind": "train",
      "step": step,
      "load": rng.integers(0, 9, (2, 4)).tolist(),
      "max_vio": rng.uniform(0.1, 3),
      "bits_per_byte": rng.uniform(2, 3),
      "skipped": 0,
      "seconds": 0.5,
    }
    for step in range(1, 9)
  ]
  last = {"bits_per_byte": 2.0 + seed, "max_vio_global": 0.5, "gap": 0.25}
  last |= {"dead_experts": 0, "load": rows[-1]["load"]}
  return [*rows, {"kind": "validation", "step": 8} | last]


def _train(config):
  """Leaves what `train.train` would."""
  rows = _rows(config_lib.RULES[config.rule][0] > 0)
  out = pathlib.Path(config.out)
  out.mkdir(parents=True)
  text = "".join(json.dumps(row) + "\n" for row in rows)
  (out / "metrics.jsonl").write_text(text)
  (out / "sample.txt").write_text(f"Written by {config.rule}.")
  summary = report_lib.summarize(rows, tokens=100)
  return summary | {"yardsticks": {"max_vio_batch_mean": 0.125}}


def _main(monkeypatch, *arguments):
  values = flags.FlagValues()
  command.define_flags(values)
  values(["train.py", *arguments])
  configs = command.from_flags(values)
  monkeypatch.setattr(command, "from_flags", lambda: configs)
  monkeypatch.setattr(hosts, "start", lambda: None)
  monkeypatch.setattr(train_lib, "train", _train)
  train_lib.main(["train.py"])


def test_rules_are_trained_in_turn_and_compared(tmp_path, monkeypatch, capsys):
  _main(monkeypatch, "--rule=none,sign", f"--out={tmp_path}")
  printed = capsys.readouterr().out
  table = (tmp_path / "compared.txt").read_text()
  assert table.split()[:3] == ["none", "sign", "yardstick"]
  (line,) = [x for x in table.splitlines() if "validation bits" in x]
  assert line.split()[4:6] == ["2.000", "3.000"]
  for text in (table, f"checkpoints: {tmp_path}\n"):
    assert text in printed
  for rule in ("none", "sign"):
    assert f"=== {rule}\nWritten by {rule}." in printed
  for name in ("compared", "compared_loads"):
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_one_rule_is_compared_with_nothing(tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  _main(monkeypatch, "--rule=sign")
  printed = capsys.readouterr().out
  assert "Written by sign." in printed
  assert printed.endswith("checkpoints: runs/lm/sign\n")
  folders = [p.name for p in (tmp_path / "runs" / "lm").iterdir()]
  assert folders == ["sign"]
