# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Scripts that rent machines, against programs that only note what they are asked."""

import os
import pathlib
import re
import subprocess

import command
import pytest
import yaml
from absl import flags

pytestmark = pytest.mark.any_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "launch"
# Notes a line for each call, each argument in brackets.
STUB = """#!/usr/bin/env bash
{ printf '%s' "${0##*/}"; printf ' [%s]' "$@"; echo; } >>"$CALLS"
case "$*" in *describe*value*) head -n 1 "$STATES"; sed -i 1d "$STATES" ;; esac
exit "${EXIT:-0}"
"""
PLACE = "[--project=mine] [--zone=z]"


@pytest.fixture
def run(tmp_path):
  """Runs a script with variables, and returns it and the calls it made."""
  for name in ("gcloud", "git", "srun", "scontrol"):
    (tmp_path / name).write_text(STUB)
    (tmp_path / name).chmod(0o755)
  states = tmp_path / "states"
  states.write_text("WAITING_FOR_RESOURCES\nPROVISIONING\nACTIVE\n")
  calls = tmp_path / "calls"

  def call(script, *arguments, **variables):
    calls.write_text("")
    done = subprocess.run(
      ["bash", FOLDER / script, *arguments],
      capture_output=True,
      cwd=ROOT,
      env={
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "STATES": str(states),
        **variables,
      },
      text=True,
    )
    return done, calls.read_text()

  return call


def _tpu(run, *arguments, **variables):
  variables = (
    dict(PROJECT="mine", ZONE="z", OUT="gs://b/run", POLL="0") | variables
  )
  done, calls = run("tpu.sh", *arguments, **variables)
  assert done.returncode == 0, done.stderr
  return calls


@pytest.mark.parametrize("script", ("tpu.sh", "slurm.sbatch"))
def test_bash_can_read_it(script):
  subprocess.run(["bash", "-n", FOLDER / script], check=True)


@pytest.mark.parametrize(
  ("accelerator", "runtime"),
  (("v5litepod-16", "v2-alpha-tpuv5-lite"), ("v6e-256", "v2-alpha-tpuv6e")),
)
def test_a_slice_is_asked_for_where_it_was_said(run, accelerator, runtime):
  assert _tpu(run, "create", ACCELERATOR=accelerator, SPOT="1") == (
    "gcloud [compute] [tpus] [queued-resources] [create] [jaxroute]"
    f" [--node-id=jaxroute] [--accelerator-type={accelerator}]"
    f" [--runtime-version={runtime}] [--spot] {PLACE}\n"
  )


def test_nothing_is_asked_for_without_project_and_zone(run):
  for given, missing in (({}, "PROJECT"), ({"PROJECT": "mine"}, "ZONE")):
    done, calls = run("tpu.sh", "create", **given)
    assert done.returncode and not calls
    assert f"Set {missing} to" in done.stderr
  named = dict(PROJECT="mine", ZONE="z")
  done, calls = run("tpu.sh", "create", **named, ACCELERATOR="v9-8")
  assert done.returncode and not calls
  assert "Set RUNTIME to that of v9-8." in done.stderr
  done, calls = run("tpu.sh", "run", **named)
  assert done.returncode and not calls
  assert "Set OUT to" in done.stderr
  done, calls = run("tpu.sh", "begin", **named)
  assert done.returncode == 2 and not calls
  assert "expected create, wait, install" in done.stderr


def test_it_waits_until_the_slice_is_there(run):
  assert _tpu(run, "wait").count("[describe] [jaxroute]") == 3


def test_a_request_that_failed_is_said(run, tmp_path):
  (tmp_path / "states").write_text("FAILED\n")
  done, _ = run("tpu.sh", "wait", PROJECT="mine", ZONE="z")
  assert done.returncode == 2
  assert "jaxroute is FAILED, see above" in done.stderr


def test_every_host_gets_the_commit_and_runs_the_same_command(run):
  packed, *calls = _tpu(run, "install").splitlines()
  assert packed.startswith("git [-C]") and packed.endswith("[HEAD]")
  assert re.fullmatch(
    r"gcloud \[compute\] \[tpus\] \[tpu-vm\] \[scp\] \[\S+/jaxroute\.tar\.gz\]"
    rf" \[jaxroute:\] {re.escape(PLACE)} \[--worker=all\]",
    calls[0],
  )
  ssh = "gcloud [compute] [tpus] [tpu-vm] [ssh] [jaxroute]"
  assert calls[1].startswith(f"{ssh} {PLACE} [--worker=all] [--command=set -e")
  assert "'./jaxroute[tpu,examples]'" in calls[-1]
  calls = _tpu(run, "run", "--mesh=data=4,expert=4", "--data=my text")
  assert calls.startswith(
    f"{ssh} {PLACE} [--worker=all] [--command=cd jaxroute"
  )
  assert (
    "examples/lm/train.py --out=gs://b/run --mesh=data=4\\,expert=4"
    " --data=my\\ text >~/train.log"
  ) in calls
  assert "[--worker=3] [--command=tail" in _tpu(run, "logs", WORKER="3")
  assert "[--worker=all] [--command=kill -TERM" in _tpu(run, "stop")


def test_what_was_asked_for_can_be_given_back(run):
  deleted, listed = _tpu(run, "delete").splitlines()
  assert "[queued-resources] [delete] [jaxroute] [--force]" in deleted
  assert "[tpu-vm] [list]" in listed


def test_a_job_that_saved_goes_back_into_the_queue(run):
  given = dict(OUT="runs/slurm", SLURM_JOB_ID="7", PYTHON="python")
  done, calls = run("slurm.sbatch", "--mesh=data=2,expert=8", **given)
  assert done.returncode == 0, done.stderr
  assert calls == (
    "srun [--label] [python] [-u] [examples/lm/train.py] [--out=runs/slurm]"
    " [--mesh=data=2,expert=8]\n"
  )
  for code, queued in (("143", True), ("1", False)):
    done, calls = run("slurm.sbatch", **given, EXIT=code)
    assert ("scontrol [requeue] [7]" in calls) == queued
  done, calls = run("slurm.sbatch")
  assert done.returncode and not calls
  assert "Set OUT to" in done.stderr


def test_a_job_set_has_a_process_for_every_host_of_its_topology():
  job_set = yaml.safe_load((FOLDER / "jobset.yaml").read_text())
  (job,) = job_set["spec"]["replicatedJobs"]
  hosts, pod = (
    job["template"]["spec"],
    job["template"]["spec"]["template"]["spec"],
  )
  (container,) = pod["containers"]
  topology = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
  rows, columns = map(int, topology.split("x"))
  chips = container["resources"]["limits"]["google.com/tpu"]
  assert hosts["parallelism"] == hosts["completions"] == rows * columns // chips
  assert container["args"][0] == "--out=$OUT"


def _commands():
  """The arguments that the page and the job set give the main job."""
  text = (FOLDER / "README.md").read_text().replace("\\\n", " ")
  start = r"(?:launch/tpu\.sh run|launch/slurm\.sbatch|examples/lm/train\.py)"
  for found in re.finditer(start + r"((?: +--[^\s;]+)+)", text):
    yield found[1].replace("$i", "0").split()
  text = (FOLDER / "jobset.yaml").read_text()
  (job,) = yaml.safe_load(text)["spec"]["replicatedJobs"]
  pod = job["template"]["spec"]["template"]["spec"]
  yield pod["containers"][0]["args"]


def test_every_command_is_one_that_the_main_job_takes():
  commands = list(_commands())
  assert len(commands) > 6
  for arguments in commands:
    values = flags.FlagValues()
    command.define_flags(values)
    assert values(["train.py", *arguments]) == ["train.py"]
    assert command.from_flags(values)


def test_the_page_names_what_is_there():
  text = (FOLDER / "README.md").read_text()
  links = re.findall(r"\]\(([^)#\s]+)\)", text)
  assert not [x for x in links if "://" not in x and not (FOLDER / x).exists()]
  commands = set(re.findall(r"launch/tpu\.sh (\w+)", text))
  script = (FOLDER / "tpu.sh").read_text()
  assert commands == set(re.findall(r"^  (\w+)\)", script, re.MULTILINE))
