# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Arms side by side: what is written, and that what is there is not trained again."""

import json

import compare_rules
import jax
import pytest
import train as train_lib
from absl.testing import flagsaver

# Of optax's Adam.
pytestmark = pytest.mark.implicit_promotion

TINY = {
  "steps": 4,
  "batch_size": 4,
  "seq_len": 32,
  "model_size": 32,
  "num_heads": 2,
  "num_layers": 2,
  "num_experts": 8,
  "expert_size": 16,
  "shared_size": 16,
  "eval_batches": 2,
}


@pytest.fixture
def _tiny(monkeypatch, tmp_path):
  monkeypatch.setitem(compare_rules.PRESETS, "cpu", TINY)
  # The script sets them for the process.
  names = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
  )
  before = {name: getattr(jax.config, name) for name in names}
  flags = compare_rules.flags.FLAGS
  if not flags.is_parsed():
    flags(["compare_rules"])
  with flagsaver.flagsaver(
    out=str(tmp_path), seeds=2, arm=["switch loss, 1e-2", "quantile"]
  ):
    yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


def test_it_writes_a_table_and_figures_and_goes_on_from_what_is_there(
  _tiny, monkeypatch, capsys
):
  compare_rules.main([""])
  text = (_tiny / "table.md").read_text()
  assert text in capsys.readouterr().out
  lines = text.splitlines()
  assert "2 seeds, 4 steps" in lines[0]
  rows = [line.split("|") for line in lines if line.startswith("| ")][2:]
  assert [row[1].strip() for row in rows] == ["switch loss, 1e-2", "quantile"]
  losses = [
    json.loads((_tiny / f"quantile_{seed}" / "summary.json").read_text())[
      "validation_bits_per_byte"
    ]
    for seed in (0, 1)
  ]
  assert rows[1][2].split()[0] == f"{sum(losses) / 2:.3f}"
  assert losses[0] != losses[1]
  for name in ("trade_off", "max_vio"):
    assert (_tiny / f"{name}.png").read_bytes().startswith(b"\x89PNG")

  def refuse(config):
    raise AssertionError(f"trained again: {config.out}")

  monkeypatch.setattr(train_lib, "train", refuse)
  compare_rules.main([""])
  assert (_tiny / "table.md").read_text() == text
  with flagsaver.flagsaver(steps=5), pytest.raises(AssertionError):
    compare_rules.main([""])


def test_an_arm_is_chosen_by_its_name():
  parse = compare_rules.flags.FLAGS["arm"].parser.parse
  assert {parse(name) for name in compare_rules.ARMS} == set(compare_rules.ARMS)
  with pytest.raises(ValueError, match=r"one of <.*sign, u / sqrt\(n\)"):
    parse("sgin")
