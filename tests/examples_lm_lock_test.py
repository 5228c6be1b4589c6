# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""One run a folder: who is refused, and what leaves no lock behind."""

import signal
import subprocess
import sys

import config as config_lib
import jax
import lm_runs
import lock
import pytest

pytestmark = pytest.mark.any_jax

_HOLD = """
import pathlib, sys, lock
with lock.claim(pathlib.Path(sys.argv[1])):
  print("held", flush=True)
  sys.stdin.read()
"""


def test_a_second_run_is_refused_until_the_first_is_killed(tmp_path):
  out = tmp_path / "run"
  with subprocess.Popen(
    [sys.executable, "-c", _HOLD, str(out)],
    env=lm_runs.environment(),
    stdin=subprocess.PIPE,
    stdout=subprocess.PIPE,
    text=True,
  ) as process:
    assert process.stdout.readline() == "held\n"
    with (
      pytest.raises(
        config_lib.SetupError, match=f"--out={out} is in use by another run"
      ),
      lock.claim(out),
    ):
      pass
    process.send_signal(signal.SIGKILL)
    process.wait()
  with lock.claim(out):
    pass


def test_other_processes_of_a_run_need_no_lock(tmp_path, monkeypatch):
  with lock.claim(tmp_path):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    with lock.claim(tmp_path):
      pass


def test_without_locks_it_says_so(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(lock, "fcntl", None)
  with lock.claim(tmp_path):
    assert "cannot be locked here" in capsys.readouterr().err


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
  (tmp_path / "file").write_text("")
  for out in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(config_lib.SetupError, match=f"--out={out} failed"):
      with lock.claim(out):
        pass
