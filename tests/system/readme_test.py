# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The snippets of README and docs run as they are pasted; docs name real tests."""

import pathlib
import re

import jax
import numpy as np
import pytest

import jaxroute

_ROOT = pathlib.Path(__file__).parents[1]
_README, _THEORY = _ROOT / "README.md", _ROOT / "docs/theory.md"


def _snippets():
  text = _README.read_text() + _THEORY.read_text()
  return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


@pytest.mark.implicit_promotion  # a user's session is not strict
@pytest.mark.parametrize("number", range(len(_snippets())))
def test_every_snippet_runs(number, capsys):
  names = {}
  code = compile(_snippets()[number], f"snippet {number}", "exec")
  with jax.numpy_rank_promotion("allow"):
    exec(code, names)
  if number == 0:  # its comment: 2.2 at first, below 0.15 at the end
    assert float(capsys.readouterr().out) < 0.15
    noise = jax.random.normal(names["key"], (4096, 64))
    logits = noise + names["skew"][None]
    first = jaxroute.route(logits, None, names["config"])
    np.testing.assert_allclose(jaxroute.max_vio(first.load), 2.2, atol=0.15)


def test_the_claims_of_the_theory_name_their_tests():
  tests = "".join(p.read_text() for p in (_ROOT / "tests").glob("*_test.py"))
  named = re.findall(r"`(test_\w+)`", _THEORY.read_text())
  assert len(named) > 15
  for name in named:
    assert f"def {name}(" in tests, name


def test_every_public_name_is_documented():
  for name in jaxroute.__all__:
    assert getattr(jaxroute, name).__doc__, name
