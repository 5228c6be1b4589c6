# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The main job: what it learns, what it survives, what it refuses.

Most tests continue a copy of one finished run from its checkpoint at step 50.
"""

import dataclasses
import errno
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys

import checkpoint as checkpoint_lib
import config as config_lib
import data as data_lib
import jax
import lm_runs
import lock
import metrics_log as metrics_log_lib
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
import report as report_lib
import train as train_lib
import trainer as trainer_lib
from lm_runs import STEPS, TINY

from jaxroute import assignment

pytestmark = pytest.mark.implicit_promotion  # optax's Adam promotes.


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return lm_runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
  """A run that was never stopped: its settings."""
  out = tmp_path_factory.mktemp("unbroken")
  config = config_lib.Config(data=str(corpus), out=str(out), **TINY)
  with pytest.MonkeyPatch.context() as patch:
    lm_runs.share_programs(patch, figures=True)
    train_lib.train(config)
  return config


@pytest.fixture
def config(unbroken, tmp_path):
  """Settings of a run that has come to step 50."""
  lm_runs.copy_at(50, pathlib.Path(unbroken.out), tmp_path / "run")
  return dataclasses.replace(unbroken, out=str(tmp_path / "run"), save_every=5)


def _at_step(monkeypatch, step, action):
  """Has `action` happen when a step is under way."""
  add_step = metrics_log_lib.MetricsLog.add_step

  def patched(self, current, report):
    add_step(self, current, report)
    if current == step:
      action()

  monkeypatch.setattr(metrics_log_lib.MetricsLog, "add_step", patched)


def test_a_run_leaves_metrics_checkpoints_and_figures(unbroken):
  out = pathlib.Path(unbroken.out)
  train, validation = (lm_runs.rows(out, k) for k in ("train", "validation"))
  assert [r["step"] for r in train] == list(range(1, STEPS + 1))
  assert [r["step"] for r in validation] == [30, 60]
  load = np.array([r["load"] for r in train])
  assert load.shape == (STEPS, 2, 8)
  assert (load.sum(axis=-1) == 8 * 32 * 2).all()
  assert np.sum(validation[0]["load"]) == 2 * 4 * 8 * 32 * 2
  assert train[-1]["loss"] < train[0]["loss"]
  assert lm_runs.kept(out) == ["50", "60"]
  assert list((out / "tensorboard").glob("events*"))
  held_out = bytes(data_lib.load(unbroken).validation[: unbroken.seq_len])
  sample = (out / "sample.txt").read_text()
  assert held_out.decode() in sample and "256 that the model" in sample
  for name in ("loads", "max_vio", "bias", "loss"):
    png = (out / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


@pytest.mark.any_jax
def test_the_summary_is_what_the_rows_say(unbroken):
  out = pathlib.Path(unbroken.out)
  summary = json.loads((out / "summary.json").read_text())
  last = lm_runs.rows(out, "validation")[-1]
  load = np.array(last["load"])
  violation = load.max(axis=1) / load.mean(axis=1) - 1
  assert summary["max_vio_global"] == pytest.approx(violation.mean(), rel=1e-5)
  assert summary["validation_bits_per_byte"] == last["bits_per_byte"]
  assert summary["dead_experts"] == (load == 0).sum()
  assert summary["steps"] == STEPS and summary["skipped_steps"] == 0
  table = report_lib.table({"sign": summary})
  assert f"{summary['max_vio_global']:.3f}" in table


@pytest.mark.any_jax
def test_the_rule_balances(unbroken):
  before = lm_runs.unbalanced_rows(unbroken, data_lib.load(unbroken))
  after = lm_runs.rows(unbroken.out)
  # No bias has moved before the first step.
  assert before[0]["load"] == after[0]["load"]
  assert before[-1]["max_vio_global"] > 2 * after[-1]["max_vio_global"]


@pytest.mark.any_jax
def test_a_finished_run_is_only_reported_again(unbroken):
  out = pathlib.Path(unbroken.out)
  before = (out / "metrics.jsonl").read_bytes()
  summary = lm_runs.train(unbroken)
  assert (out / "metrics.jsonl").read_bytes() == before
  assert summary == json.loads((out / "summary.json").read_text())


@pytest.mark.any_jax
def test_an_extended_run_is_one_that_was_to_be_longer(
  config, unbroken, tmp_path
):
  shutil.copytree(unbroken.out, tmp_path / "finished")
  finished = dataclasses.replace(
    unbroken, out=str(tmp_path / "finished"), steps=STEPS + 5
  )
  lm_runs.train(finished)
  longer = dataclasses.replace(config, steps=STEPS + 5, decay_steps=STEPS)
  lm_runs.train(longer)
  lm_runs.assert_same_run(finished, longer, steps=STEPS + 5)
  with pytest.raises(
    config_lib.SetupError,
    match=r"--steps=60, but --out=.* holds a run of 65 steps. Give at least as",
  ):
    lm_runs.train(dataclasses.replace(finished, steps=STEPS))


@pytest.mark.any_jax
def test_the_gap_is_to_the_best_balanced_routes_of_its_scores(unbroken):
  summary = lm_runs.train(dataclasses.replace(unbroken, save_scores=True))
  with np.load(pathlib.Path(unbroken.out) / "scores.npz") as file:
    scores, bias = file["scores"], file["expert_bias"]
    assert file["top_k"] == unbroken.top_k
  assert scores.shape == (2, 4 * 8 * 32, 8) and bias.shape == (2, 8)
  first = scores[:, : 8 * 32]
  gaps, without = [], []
  for layer, b in zip(first, bias, strict=True):
    best = assignment.solve(layer, unbroken.top_k).value
    gaps.append(oracle.dual_value(layer, b, unbroken.top_k) / best - 1)
    zero = oracle.dual_value(layer, np.zeros_like(b), unbroken.top_k)
    without.append(zero / best - 1)
  assert summary["gap"] == pytest.approx(np.mean(gaps), abs=2e-4)
  yardstick = summary["yardsticks"]["gap"]
  assert yardstick == pytest.approx(np.mean(without), abs=2e-4)
  assert yardstick > summary["gap"]
  rows = lm_runs.rows(unbroken.out, "train")
  np.testing.assert_array_equal(rows[-1]["expert_bias"], bias)


@pytest.mark.any_jax
def test_the_complementary_slackness_is_of_the_bias_that_routed(unbroken):
  rows = lm_runs.rows(unbroken.out, "train")
  # The first bias is 0, so there is none to differ from the load.
  assert rows[0]["complementary_slackness"] == 0.0
  bias, load = np.array(rows[-2]["expert_bias"]), np.array(rows[-1]["load"])
  excess = load - load.mean(axis=-1, keepdims=True)
  expected = np.abs((bias * excess).sum(axis=-1)) / load.sum(axis=-1)
  found = rows[-1]["complementary_slackness"]
  assert found == pytest.approx(expected.mean(), rel=1e-4)
  assert found > 0


def test_stopped_from_outside_then_killed_it_continues_bit_for_bit(
  config, unbroken
):
  arguments = [
    f"--{field.name}={getattr(config, field.name)}"
    for field in dataclasses.fields(config)
  ]
  with subprocess.Popen(
    [sys.executable, "-c", lm_runs.STOPPED_THEN_KILLED, *arguments],
    env=lm_runs.environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    for line in process.stdout:
      if line == "waiting\n":
        process.send_signal(signal.SIGTERM)
        break
    output, errors = process.communicate()
  assert "code 143\n" in output, errors
  stopped = f"train.py: SIGTERM: saved after step 52 in --out={config.out}; the"
  assert stopped in errors and "Traceback" not in errors
  assert process.returncode == -signal.SIGKILL, errors
  assert lm_runs.kept(config.out) == ["52", "55"]
  assert (pathlib.Path(config.out) / "metrics.jsonl").read_text().endswith("tr")
  lm_runs.train(config)
  lm_runs.assert_same_run(config, unbroken)


@pytest.mark.any_jax
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
  config, unbroken, number, monkeypatch
):
  handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with monkeypatch.context() as patch:
    _at_step(patch, 57, lambda: signal.raise_signal(number))
    with pytest.raises(train_lib.Interrupted, match="saved after step 57") as e:
      lm_runs.train(config)
  assert e.value.exit_code == 128 + number
  assert lm_runs.kept(config.out) == ["55", "57"]
  assert lm_runs.rows(config.out)[-1]["step"] == 57
  assert handlers == [
    signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
  ]
  lm_runs.train(config)
  lm_runs.assert_same_run(config, unbroken)


@pytest.mark.any_jax
def test_a_second_ctrl_c_aborts(config, monkeypatch):
  def twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

  _at_step(monkeypatch, 57, twice)
  with pytest.raises(KeyboardInterrupt):
    lm_runs.train(config)
  assert lm_runs.kept(config.out) == ["50", "55"]


@pytest.mark.any_jax
def test_a_checkpoint_of_other_settings_is_refused(unbroken):
  other = dataclasses.replace(unbroken, rule="none", seed=3)
  with pytest.raises(
    config_lib.SetupError,
    match=r"--rule: 'sign' there, 'none' here; --seed: 0 there, 3 here\)\."
    r" Choose another --out, or --resume=false",
  ):
    lm_runs.train(other)
  with pytest.raises(config_lib.SetupError, match="--data: '"):
    lm_runs.train(dataclasses.replace(unbroken, data_bytes=9000))
  assert lm_runs.kept(unbroken.out) == ["50", "60"]


@pytest.mark.any_jax
def test_an_older_program_s_checkpoint_is_refused_or_started_anew(
  unbroken, tmp_path
):
  out = tmp_path / "old"
  out.mkdir()
  settings = unbroken.identity() | {"data": data_lib.load(unbroken).sha256}
  with ocp.CheckpointManager(out / "checkpoints") as manager:
    state = {"params": np.zeros(3, np.float32), "load": np.zeros(8, np.int32)}
    manager.save(
      9,
      args=ocp.args.Composite(
        state=ocp.args.StandardSave(state),
        settings=ocp.args.JsonSave(settings),
      ),
    )
  row = {"kind": "train", "step": 9, "loss": 1.0}
  (out / "metrics.jsonl").write_text(json.dumps(row) + "\n")
  config = dataclasses.replace(unbroken, out=str(out))
  with pytest.raises(
    config_lib.SetupError,
    match="--out=.*old holds checkpoints without a format, expected format 3:"
    " another version .* Choose another --out, or --resume=false",
  ):
    lm_runs.train(config)
  assert lm_runs.kept(out) == ["9"]
  lm_runs.train(dataclasses.replace(config, resume=False))
  lm_runs.assert_same_run(config, unbroken)


@pytest.mark.any_jax
@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    # The array store says it so.
    ValueError(
      "RESOURCE_EXHAUSTED: Error writing: Failed to write 9 bytes to file 14:"
      " No space left on device [os_error_code='28']"
    ),
  ],
  ids=["os", "array_store"],
)
def test_a_full_disk_leaves_the_last_checkpoint(
  config, unbroken, error, monkeypatch
):
  write = checkpoint_lib.Checkpoints._write

  def full(self, step, *args):
    if step < 60:
      return write(self, step, *args)
    part = pathlib.Path(config.out, "checkpoints", "60.orbax-checkpoint-tmp")
    part.mkdir()
    (part / "half").write_text("")
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_lib.Checkpoints, "_write", full)
    with pytest.raises(
      checkpoint_lib.SaveError,
      match="saving step 60 in --out=.* failed: No space left on device. Earl",
    ):
      lm_runs.train(config)
  assert lm_runs.kept(config.out) == ["50", "55"]
  lm_runs.train(config)
  lm_runs.assert_same_run(config, unbroken)


@pytest.mark.any_jax
def test_a_damaged_checkpoint_continues_from_the_one_before(
  unbroken, tmp_path, capsys
):
  out = tmp_path / "run"
  shutil.copytree(unbroken.out, out)
  arrays = out / "checkpoints" / "60" / "state" / "ocdbt.process_0" / "d"
  largest = max(arrays.iterdir(), key=lambda path: path.stat().st_size)
  data = bytearray(largest.read_bytes())
  data[len(data) // 2] ^= 1
  largest.write_bytes(data)
  config = dataclasses.replace(unbroken, out=str(out))
  lm_runs.train(config)
  assert "step 60 is damaged" in capsys.readouterr().err
  assert lm_runs.kept(out) == ["50", "60"]
  lm_runs.assert_same_run(config, unbroken)


@pytest.mark.any_jax
def test_no_other_run_may_use_the_folder(config):
  with lock.claim(pathlib.Path(config.out)):
    with pytest.raises(config_lib.SetupError, match="in use by another run"):
      lm_runs.train(config)


def test_a_run_may_move_to_a_mesh_which_changes_nothing(config, unbroken):
  lm_runs.train(dataclasses.replace(config, mesh="data=2,expert=2"))
  rows, expected = lm_runs.rows(config.out), lm_runs.rows(unbroken.out)
  assert rows[50]["step"] == 50 and rows[51]["step"] == 51
  assert rows[51]["load"] == expected[51]["load"]
  for row, other in zip(rows, expected, strict=True):
    assert row["bits_per_byte"] == pytest.approx(
      other["bits_per_byte"], rel=2e-3
    )
  # What one mesh has saved, another and a single device can read.
  for mesh in ("data=1,expert=4", "data=1"):
    lm_runs.train(dataclasses.replace(config, mesh=mesh))


def test_experts_are_sharded_and_nothing_else(unbroken):
  config = dataclasses.replace(unbroken, mesh="data=2,expert=2")
  mesh = trainer_lib.make_mesh(config)
  state = lm_runs.trainer(config, mesh).init(jax.random.key(0))
  sharded = {
    path[-1].key
    for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    if not leaf.sharding.is_fully_replicated
  }
  assert sharded == {"w_gate", "w_up", "w_down"}
  w_up = state.params["layers"]["moe"]["w_up"]
  assert w_up.sharding.spec == jax.P(None, "expert")
  assert state.opt_state[1][0].mu["layers"]["moe"]["w_up"].sharding == (
    w_up.sharding
  )


@pytest.mark.any_jax
def test_micro_batches_change_no_load(unbroken):
  parts = dataclasses.replace(unbroken, micro_batches=2)
  state = lm_runs.trainer(unbroken, None).init(jax.random.key(unbroken.seed))
  batch = data_lib.load(unbroken).batch(unbroken, 1)
  _, report = lm_runs.trainer(parts, None).step(state, batch)
  row = report_lib.train_row(1, jax.device_get(report), None)
  expected = lm_runs.rows(unbroken.out)[0]
  assert row["load"] == expected["load"]
  assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.any_jax
def test_sampling_leaves_the_state_as_it_is(unbroken):
  trainer = lm_runs.trainer(unbroken, None)
  state = trainer.init(jax.random.key(0))
  before = jax.device_get(state)
  prompt = np.arange(unbroken.seq_len, dtype=np.uint8)
  texts = [trainer.sample(state, prompt) for _ in range(2)]
  np.testing.assert_array_equal(*texts)
  assert len(np.unique(texts[0])) > 20  # of an untrained model
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), before)
  (load,) = jax.tree.leaves(state.router.counts.load)
  assert not np.any(load)
