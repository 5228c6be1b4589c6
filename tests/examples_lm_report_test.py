# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The table of one run or several, and what the bar says."""

import sys

import config as config_lib
import pytest
import report as report_lib

pytestmark = pytest.mark.any_jax

SUMMARY = {
  "steps": 600,
  "validation_bits_per_byte": 2.25,
  "max_vio_global": 0.125,
  "max_vio_batch_mean": 0.25,
  "max_vio_batch_worst": 0.5,
  "gap": 0.0125,
  "dead_experts": 1,
  "skipped_steps": 2,
  "step_seconds": 0.25,
  "tokens_per_second": 8192.0,
  "yardsticks": {
    "validation_bits_per_byte": 4.75,
    "gzip": 1.75,
    "max_vio_global": 0.03,
    "max_vio_batch_mean": 0.1,
    "max_vio_batch_worst": 0.15,
    "gap": 0.5,
    "dead_experts": 0.2,
    "step_seconds": 0.1,
    "tokens_per_second": 20480.0,
  },
}


def test_a_table_has_a_column_for_each_run_and_one_of_yardsticks():
  other = SUMMARY | {"max_vio_global": 5.0, "yardsticks": {}}
  heading, *lines, note = report_lib.table(
    {"proportional": SUMMARY, "none": other}
  ).splitlines()
  assert heading.split() == ["proportional", "none", "yardstick"]
  assert "yardsticks are those of the first run" in note
  found = {line[:35].strip(): line[35:].split() for line in lines}
  assert found["MaxVio_global, validation"][:3] == ["0.125", "5.000", "0.030"]
  assert found[""][:3] == ["1.750", "gzip", "-9"]
  assert found["gap to the best balanced routes"][:3] == [
    "1.25%",
    "1.25%",
    "50.00%",
  ]
  assert found["skipped steps"] == ["2", "2"]
  # Columns are under their headings, and what has a yardstick is explained.
  for line in lines:
    for name in ("proportional", "none", "yardstick"):
      end = heading.index(name) + len(name)
      assert line[end : end + 1] in ("", " ")
  explained = [line[heading.index("yardstick") + 9 :].strip() for line in lines]
  assert sum(map(bool, explained)) == len(SUMMARY["yardsticks"])


def test_a_table_of_one_run_needs_no_note():
  table = report_lib.table({"none": SUMMARY})
  assert len(table.splitlines()) == 12
  assert "first run" not in table


ROW = {"kind": "train", "bits_per_byte": 2.5, "max_vio": 0.5, "seconds": 0.5}


def _work(progress):
  progress.show(ROW | {"step": 19})
  progress.show(ROW | {"step": 20})
  with progress.doing(20, "validating"):
    pass
  progress.close()


def test_without_a_terminal_it_says_what_it_does_in_lines(capsys):
  config = config_lib.Config(steps=100, batch_size=4, seq_len=32)
  _work(report_lib.Progress(config, 10))
  captured = capsys.readouterr()
  assert captured.out.splitlines() == [
    "step 11/100: compiling",
    "step 20/100: 2.500 bits/byte, MaxVio 0.50, 256 tokens/s",
    "step 20/100: validating",
  ]
  assert not captured.err
  report_lib.Progress(config, 100).close()
  assert not capsys.readouterr().out


def test_on_a_terminal_the_bar_says_it(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
  config = config_lib.Config(steps=100, batch_size=4, seq_len=32)
  _work(report_lib.Progress(config, 10))
  captured = capsys.readouterr()
  assert not captured.out
  said = [
    line.split(":")[0] for line in captured.err.split("\r") if ":" in line
  ]
  order = ["compiling", "validating", "training"]
  assert [name for name in said if name in order][-1] == "training"
  positions = [said.index(name) for name in order[:2]]
  assert positions == sorted(positions)
