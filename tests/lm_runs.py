# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs of examples/lm for tests: small, compiled once, continued from copies."""

import dataclasses
import functools
import json
import os
import pathlib
import shutil
from typing import Any

import config as config_lib
import figures as figures_lib
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import report as report_lib
import train as train_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "lm" / "train.py"
STEPS = 60
TINY = {
  "steps": STEPS,
  "batch_size": 8,
  "seq_len": 32,
  "model_size": 32,
  "num_heads": 2,
  "num_layers": 3,
  "num_experts": 8,
  "expert_size": 16,
  "shared_size": 16,
  "eval_every": 30,
  "eval_batches": 4,
  "save_every": 25,
  "rule": "sign",
  "mesh": "data=1",
}
# Runs the main job twice on the same folder: the first time it waits in step 52
# for a signal, the second time it kills itself in step 58, of which 55 is
# saved, with half a row on the disk.
STOPPED_THEN_KILLED = """
import os, signal, sys, time
from absl import app
import command, lm_runs, metrics_log as metrics_log_lib
import train as train_lib
add_step = metrics_log_lib.MetricsLog.add_step
signaled = []
def note(number, frame):
  signaled.append(number)
  handler(number, frame)
def patched(self, step, report):
  global handler
  add_step(self, step, report)
  if step == 52:
    handler = signal.signal(signal.SIGTERM, note)
    print("waiting", flush=True)
    while not signaled:
      time.sleep(0.01)
  if step == 58:
    self.sync()
    self._file.write(b'{"kind": "tr')
    self.sync()
    os.kill(os.getpid(), signal.SIGKILL)
metrics_log_lib.MetricsLog.add_step = patched
train_lib.Trainer = lm_runs.trainer
command.define_flags()
for _ in range(2):
  try:
    app.run(train_lib.main)
  except SystemExit as end:
    print("code", end.code, flush=True)
"""

# Settings that the compiled programs do not depend on.
_NOT_COMPILED = ("data", "data_bytes", "seed")


def write_corpus(folder: pathlib.Path) -> pathlib.Path:
  """Writes twenty short texts into a folder, and returns it."""
  rng = np.random.default_rng(0)
  words = ["def", "return", "import", "class", "self.x", "=", "+ 1", "\n  "]
  for i in range(20):
    (folder / f"{i:02d}.py").write_text(" ".join(rng.choice(words, 200)))
  return folder


def trainer(
  config: config_lib.Config, mesh: jax.sharding.Mesh | None
) -> train_lib.Trainer:
  """The `Trainer` of the settings, whose programs all runs of them share."""
  settings = config.identity()
  names = tuple(sorted(settings.keys() - set(_NOT_COMPILED)))
  return _trainer(tuple(settings[n] for n in names), names, mesh)


# The class itself, for tests that put `trainer` in its place.
_TRAINER = train_lib.Trainer


@functools.cache
def _trainer(
  values: tuple[Any, ...], names: tuple[str, ...], mesh: Any
) -> train_lib.Trainer:
  settings = dict(zip(names, values, strict=True))
  shape = {"data": 1} if mesh is None else mesh.shape
  text = ",".join(f"{axis}={size}" for axis, size in shape.items())
  return _TRAINER(config_lib.Config(**settings, mesh=text), mesh)


def train(config: config_lib.Config) -> dict[str, Any]:
  """Trains with shared programs, and draws nothing."""
  with pytest.MonkeyPatch.context() as patch:
    share_programs(patch)
    return train_lib.train(config)


def share_programs(patch: pytest.MonkeyPatch, *, figures: bool = False) -> None:
  """Has runs share their programs and, unless told to, draw no figures."""
  patch.setattr(train_lib, "Trainer", trainer)
  if not figures:
    patch.setattr(figures_lib, "write_figures", lambda rows, out: None)


def unbalanced_rows(config: config_lib.Config, corpus: Any) -> list[dict]:
  """Rows of the run in which nothing moves the bias: of each step, and at the end.

  The programs are those of the balanced run; the router's state is put back
  after every step.
  """
  programs = trainer(config, None)
  state = programs.init(jax.random.key(config.seed))
  router, rows = jax.device_get(state.router), []
  places = jax.tree.map(lambda x: x.sharding, state.router)
  for step in range(1, config.steps + 1):
    state, report = programs.step(state, corpus.batch(config, step))
    state = dataclasses.replace(state, router=jax.device_put(router, places))
    rows.append(report_lib.train_row(step, jax.device_get(report), None))
  reports = [
    jax.device_get(programs.evaluate(state, batch))
    for batch in corpus.validation_batches(config)
  ]
  return [*rows, report_lib.validation_row(config.steps, reports)]


def copy_at(step: int, run: pathlib.Path, out: pathlib.Path) -> None:
  """Copies a run, without the checkpoints after a step."""
  shutil.copytree(run, out)
  for name in kept(out):
    if int(name) > step:
      shutil.rmtree(out / "checkpoints" / name)
  assert kept(out)[-1] == str(step)


def rows(out: str | pathlib.Path, kind: str | None = None) -> list[dict]:
  """The rows of metrics.jsonl, of a kind if given."""
  lines = (pathlib.Path(out) / "metrics.jsonl").read_text().splitlines()
  return [r for r in map(json.loads, lines) if kind in (None, r["kind"])]


def timeless(rows: list[dict]) -> list[dict]:
  """Rows without what may differ from run to run."""
  return [{k: v for k, v in r.items() if k != "seconds"} for r in rows]


def kept(out: str | pathlib.Path) -> list[str]:
  """The steps of the checkpoints of a run."""
  return sorted(os.listdir(pathlib.Path(out) / "checkpoints"), key=int)


def assert_same_run(
  config: config_lib.Config, other: config_lib.Config, steps: int = STEPS
) -> None:
  """Parameters, optimizer, bias, rule and metrics, bit for bit."""
  found, expected = (timeless(rows(c.out)) for c in (config, other))
  assert found == expected
  states = []
  # A checkpoint may be of devices that are not here.
  device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  for out in (config.out, other.out):
    assert kept(out)[-1] == str(steps)
    path = pathlib.Path(out) / "checkpoints" / str(steps) / "state"
    states.append(
      ocp.StandardCheckpointHandler().restore(
        path.absolute(), args=ocp.args.StandardRestore(fallback_sharding=device)
      )
    )
  state, expected = states
  leaves, treedef = jax.tree.flatten(state)
  assert treedef == jax.tree.structure(expected)
  assert len(leaves) > 40
  for a, b in zip(leaves, jax.tree.leaves(expected), strict=True):
    np.testing.assert_array_equal(a, b)
  assert np.any(jax.tree.leaves(state["router"]["expert_bias"])[0])


def environment() -> dict[str, str]:
  """Variables for a process that imports this file and the example's."""
  folders = [str(SCRIPT.parent), str(ROOT / "tests")]
  given = [p for p in [os.environ.get("PYTHONPATH")] if p]
  return os.environ | {"PYTHONPATH": os.pathsep.join(folders + given)}
