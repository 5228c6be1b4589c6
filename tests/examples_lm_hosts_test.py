# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The main job in two processes: it agrees, stops, dies and goes on as one."""

import json
import pathlib
import signal
import socket
import subprocess
import sys
import threading

import config as config_lib
import hosts
import lm_hosts
import lm_runs
import pytest
from absl import flags

pytestmark = [
  pytest.mark.any_jax,  # `distributed_test.py` starts processes on every version.
  pytest.mark.cpu("the processes share no accelerator"),
  pytest.mark.implicit_promotion,  # optax's Adam promotes.
]


def _run_both(scenario, corpus, folder):
  """Runs a scenario in two processes.

  Returns:
    For each process its exit code, what it found and its standard error.
  """
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  env = lm_runs.environment() | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  script = pathlib.Path(lm_hosts.__file__)
  workers = [
    subprocess.Popen(
      [sys.executable, script, str(i), str(port), corpus, folder, scenario],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  try:
    ended = [worker.communicate(timeout=300) for worker in workers]
  finally:
    for worker in workers:
      worker.kill()
  return [
    (worker.returncode, _found(out), errors)
    for worker, (out, errors) in zip(workers, ended, strict=True)
  ]


def _found(out):
  lines = [x for x in out.splitlines() if x.startswith("found ")]
  return {k: v for x in lines for k, v in json.loads(x[6:]).items()}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
  return lm_runs.write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def trained(corpus, folder):
  """What the processes of an unbroken run left, and copies of it at step 4."""
  both = _run_both("train", corpus, folder)
  assert [code for code, _, _ in both] == [0, 0], both
  for name in ("killed", "moved", "stopped"):
    lm_runs.copy_at(4, folder / "unbroken", folder / name)
  return both


@pytest.fixture(scope="module")
def killed(trained, corpus, folder):
  """What the processes left of which one was killed."""
  return _run_both("kill", corpus, folder)


@pytest.fixture(scope="module")
def resumed(killed, corpus, folder):
  """What the processes left that went on from there."""
  return _run_both("resume", corpus, folder)


def _config(folder, name):
  return config_lib.Config(**lm_hosts.SETTINGS, out=str(folder / name))


def test_two_processes_train_what_one_does(trained, corpus, folder, tmp_path):
  config = _config(folder, "unbroken")
  alone = config_lib.Config(
    **lm_hosts.SETTINGS
    | {"data": str(corpus), "out": str(tmp_path), "mesh": "data=1"}
  )
  lm_runs.train(alone)
  rows, expected = (lm_runs.rows(c.out) for c in (config, alone))
  assert [r["step"] for r in rows] == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8]
  assert rows[0]["load"] == expected[0]["load"]
  for row, other in zip(rows, expected, strict=True):
    assert row["bits_per_byte"] == pytest.approx(
      other["bits_per_byte"], rel=1e-3
    )
  assert (folder / "unbroken" / "summary.json").exists()
  assert "that the model writes" in (
    folder / "unbroken" / "sample.txt"
  ).read_text("utf-8")


def test_processes_that_disagree_are_named(trained):
  for _, found, _ in trained:
    assert found["steps"].startswith(
      "the processes of a run must agree (--steps: 8 in process 0, 9 in process"
      " 1). Start all with the same"
    )
    assert "--data=" in found["data"] and "cannot be read" in found["data"]
    assert found["mesh"].startswith(
      "--mesh=data=2 must be of all 4 devices of the 2 processes, got 2."
    )
    assert not found["made"]
  assert trained[0][1]["data"].startswith("process 1: --data=")


def test_if_one_is_killed_the_other_ends(killed, folder):
  (first, _, errors), (second, _, _) = killed
  assert second == -signal.SIGKILL
  assert first not in (0, None)
  assert lm_runs.kept(folder / "killed") == ["4", "6"]
  assert "started again on all hosts" in errors or first == -signal.SIGABRT


def test_started_again_they_continue_bit_for_bit(resumed, folder):
  for _, found, _ in resumed:
    assert found["step"].startswith(
      "the processes of a run must agree (the step that --out is at: 6 in process"
      " 0, 4 in process 1)"
    )
  lm_runs.assert_same_run(
    _config(folder, "killed"), _config(folder, "unbroken"), lm_hosts.STEPS
  )


def test_on_another_mesh_they_route_alike(resumed, folder):
  rows, expected = (
    lm_runs.rows(folder / name, "train") for name in ("moved", "unbroken")
  )
  assert rows[:4] == expected[:4] and rows[4]["step"] == 5
  assert rows[4]["load"] == expected[4]["load"]
  for row, other in zip(rows[4:], expected[4:], strict=True):
    assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


def test_a_signal_to_one_stops_both_after_the_same_step(resumed, folder):
  steps = []
  for (code, _, errors), number in zip(
    resumed, (signal.SIGTERM, signal.SIGINT), strict=True
  ):
    assert code == 128 + number, errors
    saved = f"train.py: {number.name}: saved after step "
    assert saved in errors and "Traceback" not in errors
    steps.append(errors.split(saved)[1].split()[0])
  assert steps[0] == steps[1] == lm_runs.kept(folder / "stopped")[-1]
  assert lm_runs.rows(folder / "stopped")[-1]["step"] == int(steps[0])


def _flags(*arguments):
  values = flags.FlagValues()
  hosts.define_flags(values)
  values(["train.py", *arguments])
  return values


@pytest.mark.parametrize(
  "arguments, message",
  [
    (["--coordinator=host:1"], "got 'host:1', None and None"),
    (["--num_processes=2"], "got '', 2 and None"),
    (
      ["--coordinator=host:99999", "--num_processes=2", "--process_id=1"],
      "got 'host:99999', 2 and 1",
    ),
    (
      ["--coordinator=host", "--num_processes=2", "--process_id=1"],
      "got 'host', 2 and 1",
    ),
    (
      ["--coordinator=host:1", "--num_processes=2", "--process_id=2"],
      "got 'host:1', 2 and 2",
    ),
  ],
)
def test_a_process_that_cannot_start_is_told_what_to_type(arguments, message):
  expected = (
    "--coordinator=HOST:PORT, --num_processes=N and --process_id from 0"
  )
  with pytest.raises(config_lib.SetupError, match=message) as error:
    hosts.start(_flags(*arguments))
  assert str(error.value).startswith(expected)


@pytest.mark.parametrize(
  "tasks, calls", [("1", []), ("2", [(None, None, None, 7)])]
)
def test_several_slurm_tasks_find_each_other(monkeypatch, tasks, calls):
  names = "JOB_ID STEP_NODELIST NTASKS PROCID LOCALID"
  for name in names.split():
    monkeypatch.setenv(f"SLURM_{name}", tasks if name == "NTASKS" else "0")
  seen = []

  def initialize(*given, heartbeat_timeout_seconds, initialization_timeout):
    del initialization_timeout
    seen.append((*given, heartbeat_timeout_seconds))

  monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
  hosts.start(_flags("--heartbeat_seconds=7"))
  assert seen == calls


class _Ended(Exception):
  """Stands for the end of a process."""


def test_a_process_that_finds_no_other_says_so_and_ends(monkeypatch, capsys):
  ended = threading.Event()

  def end(code):
    assert code == 2
    ended.set()

  monkeypatch.setattr(hosts, "_SILENCE", 0)
  monkeypatch.setattr(hosts, "_PATIENCE", 0)
  monkeypatch.setattr(hosts.os, "_exit", end)
  monkeypatch.setattr(hosts.faulthandler, "disable", lambda: None)

  def initialize(*given, **options):
    assert ended.wait(60)
    raise _Ended

  monkeypatch.setattr(hosts.jax.distributed, "initialize", initialize)
  address = ["--coordinator=host:1", "--num_processes=2", "--process_id=1"]
  with pytest.raises(_Ended):
    hosts.start(_flags(*address))
  errors = capsys.readouterr().err
  assert "did not find each other in 0 s. Start the same command on" in errors


@pytest.mark.parametrize("number, other", [(0, 1), (1, 0)])
def test_another_number_of_processes_is_named(monkeypatch, number, other):
  store = {f"num_processes/{other}": "3"}

  class Store:
    key_value_set = store.__setitem__

    def blocking_key_value_get(self, key, milliseconds):
      del milliseconds
      return store[key]

  monkeypatch.setattr(hosts.distributed.global_state, "client", Store())
  monkeypatch.setattr(hosts.faulthandler, "disable", lambda: None)
  monkeypatch.setattr(hosts.jax.distributed, "initialize", lambda *a, **k: None)
  flags_of_one = ["--coordinator=host:1", "--num_processes=2"]
  message = f"got 2 in process {number} and 3 in process {other}"
  with pytest.raises(config_lib.SetupError, match=message):
    hosts.start(_flags(*flags_of_one, f"--process_id={number}"))


def test_one_process_starts_nothing(monkeypatch):
  def fail(*given, **options):
    raise AssertionError(given, options)

  monkeypatch.setattr(hosts.jax.distributed, "initialize", fail)
  hosts.start(_flags())
  hosts.agree({"--steps": 3})
  with pytest.raises(config_lib.SaveError, match="full"), hosts.together():
    raise config_lib.SaveError("full")


@pytest.mark.parametrize("kind", [config_lib.SaveError, config_lib.SetupError])
def test_what_one_process_raises_all_raise(monkeypatch, kind):
  there = [kind.__name__, "no"]
  monkeypatch.setattr(hosts, "gather", lambda here: [here, there])
  with pytest.raises(kind, match="process 1: no"), hosts.together():
    pass
