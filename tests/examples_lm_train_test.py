# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The main job: what it learns, what it survives, what it refuses."""

import dataclasses
import errno
import json
import os
import pathlib
import signal
import subprocess
import sys

import checkpoint as checkpoint_lib
import config as config_lib
import data as data_lib
import jax
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
import report as report_lib
import train as train_lib
from jax.experimental.compilation_cache import compilation_cache

from jaxroute import assignment

pytestmark = [
  # Of optax's Adam.
  pytest.mark.implicit_promotion,
  # In one process: its runs compile the same programs.
  pytest.mark.xdist_group("lm"),
]

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "lm" / "train.py"
STEPS = 12
TINY = {
  "steps": STEPS,
  "batch_size": 4,
  "seq_len": 32,
  "model_size": 32,
  "num_heads": 2,
  "num_layers": 3,
  "num_experts": 8,
  "expert_size": 16,
  "shared_size": 16,
  "eval_every": 6,
  "eval_batches": 4,
  "save_every": 5,
  "rule": "sign",
}


@pytest.fixture(scope="module", autouse=True)
def _compilation_cache(tmp_path_factory):
  """Most runs here compile the same programs, some in processes of their own."""
  settings = {
    "jax_compilation_cache_dir": str(tmp_path_factory.mktemp("cache")),
    "jax_persistent_cache_min_compile_time_secs": 0.1,
  }
  with pytest.MonkeyPatch.context() as patch:
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
      jax.config.update(name, value)
      patch.setenv(name.upper(), str(value))
    yield
    for name, value in before.items():
      jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  """A folder of twenty short texts."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  words = ["def", "return", "import", "class", "self.x", "=", "+ 1", "\n  "]
  for i in range(20):
    text = " ".join(rng.choice(words, 200))
    (folder / f"{i:02d}.py").write_text(text)
  return folder


@pytest.fixture
def config(corpus, tmp_path):
  return config_lib.Config(data=str(corpus), out=str(tmp_path / "run"), **TINY)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
  """A run that was never stopped."""
  out = tmp_path_factory.mktemp("unbroken")
  train_lib.train(config_lib.Config(data=str(corpus), out=str(out), **TINY))
  return out


@pytest.fixture(scope="module")
def unbalanced(corpus, tmp_path_factory):
  """Settings of a longer run that nothing balances, and its summary."""
  longer = TINY | {"steps": 60, "eval_every": 60, "batch_size": 8}
  out = str(tmp_path_factory.mktemp("unbalanced"))
  config = config_lib.Config(
    data=str(corpus), out=out, **longer | {"rule": "none"}
  )
  return config, train_lib.train(config)


def _rows(out):
  lines = (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()
  return [json.loads(line) for line in lines]


def _timeless(rows):
  return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def _kept(out):
  return sorted(os.listdir(pathlib.Path(out) / "checkpoints"), key=int)


def _assert_same_run(out, other):
  """Parameters, optimizer, bias, rule and metrics, bit for bit."""
  assert _timeless(_rows(out)) == _timeless(_rows(other))
  assert _kept(out)[-1] == _kept(other)[-1] == str(STEPS)
  paths = (
    pathlib.Path(o) / "checkpoints" / str(STEPS) / "state" for o in (out, other)
  )
  with ocp.StandardCheckpointer() as saver:
    state, expected = (saver.restore(path.absolute()) for path in paths)
  leaves, treedef = jax.tree.flatten(state)
  assert treedef == jax.tree.structure(expected)
  assert len(leaves) > 40
  for a, b in zip(leaves, jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.any(jax.tree.leaves(state["router"]["expert_bias"])[0])


def _environment():
  path = [str(SCRIPT.parent), os.environ.get("PYTHONPATH", "")]
  return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))}


def _arguments(config):
  return [
    f"--{field.name}={getattr(config, field.name)}"
    for field in dataclasses.fields(config)
  ]


def _at_step(monkeypatch, step, action):
  """Has `action` happen when a step is under way."""
  add_step = report_lib.MetricsLog.add_step

  def patched(self, current, report):
    add_step(self, current, report)
    if current == step:
      action()

  monkeypatch.setattr(report_lib.MetricsLog, "add_step", patched)


def test_a_run_leaves_metrics_checkpoints_and_figures(unbroken):
  rows = _rows(unbroken)
  train = [r for r in rows if r["kind"] == "train"]
  validation = [r for r in rows if r["kind"] == "validation"]
  assert [r["step"] for r in train] == list(range(1, STEPS + 1))
  assert [r["step"] for r in validation] == [6, 12]
  load = np.array([r["load"] for r in train])
  assert load.shape == (STEPS, 2, 8)
  assert (load.sum(axis=-1) == 4 * 32 * 2).all()
  assert np.sum(validation[0]["load"]) == 2 * 4 * 4 * 32 * 2
  assert train[-1]["loss"] < train[0]["loss"]
  assert _kept(unbroken) == ["10", "12"]
  assert list((unbroken / "tensorboard").glob("events*"))
  for name in ("loads", "max_vio", "bias", "loss"):
    png = (unbroken / f"{name}.png").read_bytes()
    assert png.startswith(b"\x89PNG") and len(png) > 10_000


def test_the_summary_is_what_the_rows_say(unbroken):
  summary = json.loads((unbroken / "summary.json").read_text())
  last = [r for r in _rows(unbroken) if r["kind"] == "validation"][-1]
  load = np.array(last["load"])
  violation = load.max(axis=1) / load.mean(axis=1) - 1
  assert summary["max_vio_global"] == pytest.approx(violation.mean(), rel=1e-5)
  assert summary["validation_bits_per_byte"] == last["bits_per_byte"]
  assert summary["dead_experts"] == (load == 0).sum()
  assert summary["steps"] == STEPS and summary["skipped_steps"] == 0
  table = report_lib.table(summary)
  assert f"{summary['max_vio_global']:.3f}" in table
  assert len({len(line) for line in table.splitlines()}) == 1


def test_the_gap_is_to_the_best_balanced_routes_of_its_scores(
  config, unbroken, tmp_path
):
  again = dataclasses.replace(config, save_scores=True, out=str(tmp_path / "a"))
  summary = train_lib.train(again)
  with np.load(tmp_path / "a" / "scores.npz") as file:
    scores, bias = file["scores"], file["expert_bias"]
    assert file["top_k"] == config.top_k
  assert scores.shape == (2, 4 * 4 * 32, 8) and bias.shape == (2, 8)
  first = scores[:, : 4 * 32]
  gaps = []
  for layer, b in zip(first, bias, strict=True):
    best = assignment.solve(layer, config.top_k).value
    gaps.append(oracle.dual_value(layer, b, config.top_k) / best - 1)
  assert summary["gap"] == pytest.approx(np.mean(gaps), abs=2e-4)
  rows = [r for r in _rows(unbroken) if r["kind"] == "train"]
  # The first bias is 0, so there is none to differ from the load.
  assert rows[0]["duality_gap"] == 0.0 < rows[-1]["duality_gap"]
  np.testing.assert_array_equal(rows[-1]["expert_bias"], bias)


def test_the_switch_loss_balances_and_is_not_in_the_metric(
  unbalanced, tmp_path
):
  config, _ = unbalanced
  train_lib.train(
    dataclasses.replace(config, switch_weight=1.0, out=str(tmp_path))
  )
  before, after = (
    [r for r in _rows(out) if r["kind"] == "train"]
    for out in (config.out, tmp_path)
  )
  violation = [
    np.mean([r["max_vio"] for r in rows[-10:]]) for rows in (before, after)
  ]
  assert violation[0] > 2 * violation[1]
  # At first the two models are one, but for the loss that is added.
  assert after[0]["loss"] > after[0]["bits_per_byte"] * np.log(2) + 0.9


def test_killed_in_the_middle_it_continues_bit_for_bit(config, unbroken):
  # After step 8 of 12, of which 5 is saved; half a row is on the disk.
  code = """
import os, signal, sys
from absl import app
import config as config_lib, report as report_lib, train as train_lib
add_step = report_lib.MetricsLog.add_step
def patched(self, step, report):
  add_step(self, step, report)
  if step == 8:
    self.sync()
    self._file.write('{"kind": "tr')
    self.sync()
    os.kill(os.getpid(), signal.SIGKILL)
report_lib.MetricsLog.add_step = patched
config_lib.define_flags()
app.run(train_lib.main)
"""
  done = subprocess.run(
    [sys.executable, "-c", code, *_arguments(config)],
    env=_environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == -signal.SIGKILL, done.stderr
  assert _kept(config.out) == ["5"]
  assert (pathlib.Path(config.out) / "metrics.jsonl").read_text().endswith("tr")
  train_lib.train(config)
  _assert_same_run(config.out, unbroken)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
  config, unbroken, number, monkeypatch
):
  handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
  with monkeypatch.context() as patch:
    _at_step(patch, 7, lambda: signal.raise_signal(number))
    with pytest.raises(train_lib.Interrupted, match="saved after step 7") as e:
      train_lib.train(config)
  assert e.value.exit_code == 128 + number
  assert _kept(config.out) == ["5", "7"]
  assert _rows(config.out)[-1]["step"] == 7
  assert handlers == [
    signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)
  ]
  train_lib.train(config)
  _assert_same_run(config.out, unbroken)


def test_a_second_ctrl_c_aborts(config, monkeypatch):
  def twice():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)

  _at_step(monkeypatch, 7, twice)
  with pytest.raises(KeyboardInterrupt):
    train_lib.train(config)
  assert _kept(config.out) == ["5"]


def test_sigterm_from_outside_ends_the_process_with_143(config):
  config = dataclasses.replace(config, steps=400)
  with subprocess.Popen(
    [sys.executable, SCRIPT, *_arguments(config)],
    env=_environment(),
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  ) as process:
    for line in process.stdout:
      if line.startswith("step "):
        process.send_signal(signal.SIGTERM)
        break
    _, errors = process.communicate()
  assert process.returncode == 143, errors
  last = _kept(config.out)[-1]
  assert f"SIGTERM: saved after step {last} in --out=" in errors
  assert _rows(config.out)[-1]["step"] == int(last) < 400


def test_a_finished_run_is_only_reported_again(unbroken, corpus):
  before = (unbroken / "metrics.jsonl").read_bytes()
  summary = train_lib.train(
    config_lib.Config(data=str(corpus), out=str(unbroken), **TINY)
  )
  assert (unbroken / "metrics.jsonl").read_bytes() == before
  assert summary == json.loads((unbroken / "summary.json").read_text())


def test_a_checkpoint_of_other_settings_is_refused(unbroken, corpus, config):
  other = dataclasses.replace(config, out=str(unbroken), rule="none", seed=3)
  with pytest.raises(
    config_lib.SetupError,
    match=r"--rule: 'sign' there, 'none' here; --seed: 0 there, 3 here\)\."
    r" Choose another --out, or --resume=false",
  ):
    train_lib.train(other)
  with pytest.raises(config_lib.SetupError, match="--data: '"):
    train_lib.train(
      dataclasses.replace(config, out=str(unbroken), data_bytes=9000)
    )
  assert _kept(unbroken) == ["10", "12"]


def test_without_resume_it_starts_anew(config, unbroken):
  train_lib.train(dataclasses.replace(config, seed=1))
  assert _timeless(_rows(config.out)) != _timeless(_rows(unbroken))
  train_lib.train(dataclasses.replace(config, resume=False))
  _assert_same_run(config.out, unbroken)


@pytest.mark.parametrize(
  "error",
  [
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    # How the array store says it.
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

  def full(self, step, state):
    if step < 10:
      return write(self, step, state)
    part = pathlib.Path(config.out, "checkpoints", "10.orbax-checkpoint-tmp")
    part.mkdir()
    (part / "half").write_text("")
    raise error

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint_lib.Checkpoints, "_write", full)
    with pytest.raises(
      checkpoint_lib.SaveError,
      match="saving step 10 in --out=.* failed: No space left on device. Earl",
    ):
      train_lib.train(config)
  assert _kept(config.out) == ["5"]
  train_lib.train(config)
  _assert_same_run(config.out, unbroken)


def test_a_mesh_changes_nothing(config, unbroken):
  train_lib.train(dataclasses.replace(config, mesh="2,2"))
  rows, expected = _rows(config.out), _rows(unbroken)
  assert rows[0]["load"] == expected[0]["load"]
  for row, other in zip(rows, expected, strict=True):
    assert row["bits_per_byte"] == pytest.approx(
      other["bits_per_byte"], rel=2e-3
    )
  # And a run may move to a mesh in the middle.
  train_lib.train(dataclasses.replace(config, mesh="1,4"))


def test_experts_are_sharded_and_nothing_else(config):
  config = dataclasses.replace(config, mesh="2,4")
  with train_lib._mesh(config) as mesh:
    state = train_lib.Trainer(config, mesh).init()
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


def test_micro_batches_change_no_load(config, unbroken):
  train_lib.train(dataclasses.replace(config, micro_batches=2, steps=2))
  row, expected = _rows(config.out)[0], _rows(unbroken)[0]
  assert row["load"] == expected["load"]
  assert row["loss"] == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("rule", ("sign", "quantile"))
def test_the_rule_balances(unbalanced, rule, tmp_path):
  config, before = unbalanced
  after = train_lib.train(
    dataclasses.replace(config, rule=rule, out=str(tmp_path))
  )
  assert before["max_vio_global"] > 2 * after["max_vio_global"]


def test_batches_are_a_function_of_seed_and_step(config):
  corpus = data_lib.load(config)
  batch = corpus.batch(config, 3)
  assert batch.shape == (4, 33) and batch.dtype == np.uint8
  np.testing.assert_array_equal(batch, data_lib.load(config).batch(config, 3))
  assert np.any(batch != corpus.batch(config, 4))
  reseeded = dataclasses.replace(config, seed=1)
  assert np.any(batch != corpus.batch(reseeded, 3))


def test_every_tenth_file_is_held_out(tmp_path, config):
  for i in range(20):
    (tmp_path / f"{i:02d}").write_bytes(bytes([65 + i]) * 40)
  (tmp_path / "sub").mkdir()
  (tmp_path / "sub" / "binary").write_bytes(b"\0" * 40)
  (tmp_path / ".hidden").write_bytes(b"hidden")
  (tmp_path / "loop").symlink_to(tmp_path / "nothing")
  corpus = data_lib.load(dataclasses.replace(config, data=str(tmp_path)))
  assert bytes(corpus.validation) == b"J" * 40 + b"T" * 40
  assert len(corpus.train) == 18 * 40
  assert "Skipped 1 binary files." in corpus.description


def test_the_tail_of_a_single_file_is_held_out(tmp_path, config):
  path = tmp_path / "any"
  path.write_bytes(bytes(range(200)) * 2)
  config = dataclasses.replace(config, data=str(path))
  corpus = data_lib.load(config)
  assert bytes(corpus.validation) == bytes(range(160, 200))
  windows = corpus.validation_batches(config)
  assert windows.shape == (1, 4, 33)
  assert windows[0, 0, 0] == 160 and windows[0, -1, -1] == 199


@pytest.mark.parametrize(
  "make, message",
  [
    (lambda path: None, "cannot be read: No such file"),
    (lambda path: path.mkdir(), "leaves 0 bytes to train on"),
    (lambda path: path.write_bytes(b""), "leaves 0 bytes to train on"),
    (
      lambda path: path.write_bytes(b"a" * 300),
      "leaves 30 bytes to validate on, expected more than --seq_len=32",
    ),
  ],
  ids=["missing", "empty_folder", "empty_file", "too_short"],
)
def test_an_unusable_corpus_is_named(tmp_path, config, make, message):
  path = tmp_path / "corpus"
  make(path)
  with pytest.raises(config_lib.SetupError, match=f"--data={path} {message}"):
    data_lib.load(dataclasses.replace(config, data=str(path)))


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
def test_an_impossible_setting_is_named(config, change, message):
  with pytest.raises(config_lib.SetupError, match=message):
    dataclasses.replace(config, **change)


def test_errors_come_without_a_traceback(tmp_path):
  done = subprocess.run(
    [sys.executable, SCRIPT, f"--data={tmp_path}/none", f"--out={tmp_path}/o"],
    env=_environment(),
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith("train.py: --data=")
  assert "Traceback" not in done.stderr


def test_more_devices_than_there_are_is_named(config):
  config = dataclasses.replace(config, batch_size=16, mesh="16,1")
  with pytest.raises(config_lib.SetupError, match="needs 16 devices, found 8"):
    train_lib.train(config)
