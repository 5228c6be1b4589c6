# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Arms side by side: what is written, what balances, what is not trained again."""

import contextlib
import io
import json

import compare_rules
import data as data_lib
import jax
import lm_runs
import numpy as np
import pytest
import train as train_lib
from absl.testing import flagsaver

# Another version of JAX trains a model in examples_lm_train_test.py. optax's Adam
# promotes.
pytestmark = [pytest.mark.any_jax, pytest.mark.implicit_promotion]

SWITCH, QUANTILE = "switch loss, 1e-1", "quantile"
# The arms set the rule, and the script the intervals.
TINY = {
  name: value
  for name, value in lm_runs.TINY.items()
  if name not in ("rule", "eval_every", "save_every")
}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
  """The script's folder after two arms of two seeds, and what it printed."""
  out = tmp_path_factory.mktemp("compared")
  corpus = lm_runs.write_corpus(tmp_path_factory.mktemp("corpus"))
  # The script sets them for the process.
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  flags = compare_rules.flags.FLAGS
  if not flags.is_parsed():
    flags(["compare_rules"])
  printed = io.StringIO()
  with (
    pytest.MonkeyPatch.context() as patch,
    flagsaver.flagsaver(out=str(out), seeds=2, arm=[SWITCH, QUANTILE]),
    contextlib.redirect_stdout(printed),
    jax.numpy_dtype_promotion("standard"),
  ):
    preset = TINY | {"data": str(corpus)}
    patch.setitem(compare_rules.PRESETS, "cpu", preset)
    lm_runs.share_programs(patch)
    compare_rules.main([""])
    yield out, printed.getvalue()
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope="module")
def unbalanced(compared):
  """The rows of a run whose bias stays 0, as in the arm "none"."""
  del compared
  config = compare_rules.config_of(QUANTILE, 0)
  with jax.numpy_dtype_promotion("standard"):
    return lm_runs.unbalanced_rows(config, data_lib.load(config))


def _run(arm):
  return compare_rules.run(compare_rules.config_of(arm, 0))


def test_it_writes_a_table_and_figures(compared):
  out, printed = compared
  text = (out / "table.md").read_text()
  assert text in printed
  lines = text.splitlines()
  assert f"2 seeds, {lm_runs.STEPS} steps" in lines[0]
  rows = [line.split("|") for line in lines if line.startswith("| ")][2:]
  assert [row[1].strip() for row in rows] == [SWITCH, QUANTILE]
  losses = [
    json.loads((out / f"quantile_{seed}" / "summary.json").read_text())[
      "validation_bits_per_byte"
    ]
    for seed in (0, 1)
  ]
  assert rows[1][2].split()[0] == f"{sum(losses) / 2:.3f}"
  assert losses[0] != losses[1]
  for name in ("trade_off", "max_vio"):
    assert (out / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_it_goes_on_from_what_is_there(compared, monkeypatch):
  out, _ = compared
  text = (out / "table.md").read_text()

  def refuse(config):
    raise AssertionError(f"trained again: {config.out}")

  monkeypatch.setattr(train_lib, "train", refuse)
  compare_rules.main([""])
  assert (out / "table.md").read_text() == text
  with flagsaver.flagsaver(steps=5), pytest.raises(AssertionError):
    compare_rules.main([""])


def test_the_quantile_rule_balances(compared, unbalanced):
  after = _run(QUANTILE)
  assert unbalanced[0]["load"] == after["rows"][0]["load"]
  assert unbalanced[-1]["max_vio_global"] > 2 * after["max_vio_global"]


def test_the_switch_loss_balances_and_is_not_in_the_metric(
  compared, unbalanced
):
  after = _run(SWITCH)["rows"]
  violation = [
    np.mean([r["max_vio"] for r in rows[-10:]])
    for rows in (unbalanced[:-1], after)
  ]
  assert violation[0] > 2 * violation[1]
  # Both models start alike, and the loss of this arm has the other loss added.
  assert after[0]["bits_per_byte"] == pytest.approx(
    unbalanced[0]["bits_per_byte"]
  )
  assert after[0]["loss"] > after[0]["bits_per_byte"] * np.log(2) + 0.09


def test_an_arm_is_chosen_by_its_name():
  parse = compare_rules.flags.FLAGS["arm"].parser.parse
  assert {parse(name) for name in compare_rules.ARMS} == set(compare_rules.ARMS)
  with pytest.raises(ValueError, match=r"one of <.*sign, u / sqrt\(n\)"):
    parse("sgin")
