# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The first example that a reader opens: that it balances, and stays small."""

import pathlib
import subprocess
import sys

import minimal
import pytest

# optax's Adam promotes.
pytestmark = [pytest.mark.any_jax, pytest.mark.implicit_promotion]


def test_it_balances_and_without_the_rule_it_does_not(capsys):
  result = minimal.main(steps=40)
  assert result["balanced"][-1] < 0.5 * result["balanced"][0]
  assert result["unbalanced"][-1] > 1.5 * result["balanced"][-1]
  # Both start from the same model, which no rule has balanced yet.
  assert result["balanced"][0] == result["unbalanced"][0]
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "balanced:" and "MaxVio" in lines[1]
  assert len(lines) == 2 * (1 + len(result["balanced"]))


def test_it_fits_on_two_screens():
  text = pathlib.Path(minimal.__file__).read_text()
  assert len(text.splitlines()) <= 100


def test_who_gives_an_argument_gets_the_page_of_help():
  command = [sys.executable, minimal.__file__, "--steps=0"]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 1
  assert done.stderr.strip() == minimal.__doc__.strip()
