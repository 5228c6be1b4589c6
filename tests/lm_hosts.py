# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""One of two processes, of two devices each, in which tests run examples/lm.

  python lm_hosts.py PROCESS PORT CORPUS FOLDER SCENARIO

What a scenario finds is printed, as JSON, on a line that starts with "found".
"""

import json
import os
import pathlib
import signal
import sys
import time

import checkpoint as checkpoint_lib
import command
import config as config_lib
import figures as figures_lib
import hosts
import lm_runs
import metrics_log as metrics_log_lib
import train as train_lib
import trainer as trainer_lib
from absl import app
from jax._src import cache_key

MESH = "data=2,expert=2"
STEPS = 8
SETTINGS = lm_runs.TINY | {
  "steps": STEPS,
  # The programs are those of the other tests, on another mesh.
  "decay_steps": lm_runs.STEPS,
  "eval_every": 4,
  "eval_batches": 2,
  "save_every": 4,
  "mesh": MESH,
}


def found(**values):
  """Prints what the test looks for."""
  print("found", json.dumps(values), flush=True)


def refusal(**settings):
  """What train says of settings."""
  try:
    train_lib.train(config_lib.Config(**SETTINGS | settings))
  except config_lib.SetupError as error:
    return str(error)
  return ""


def run(**settings):
  """The main job, from its command line to its exit code."""
  arguments = [f"--{k}={v}" for k, v in (SETTINGS | settings).items()]
  app.run(train_lib.main, argv=["train.py", *sys.argv[6:], *arguments])


def on_step(action):
  """Has `action` of the step happen when a step has been started."""
  for log in (metrics_log_lib.MetricsLog, metrics_log_lib.Follower):

    def patched(self, step, report, add_step=log.add_step):
      add_step(self, step, report)
      action(step)

    log.add_step = patched


def no_sample(self, state, prompt):
  """In place of `Trainer.sample`, which has to be compiled."""
  del self, state
  return prompt


def train(process, corpus, folder):
  """What is refused; then a run to its end."""
  data, out = corpus, str(folder / "unbroken")
  missing = str(folder / "missing")
  found(
    steps=refusal(data=data, out=out, steps=STEPS + process),
    data=refusal(data=missing if process else data, out=out),
    mesh=refusal(data=data, out=out, mesh="data=2"),
    made=os.path.exists(out),
  )
  train_lib.train(config_lib.Config(**SETTINGS, data=data, out=out))


def kill(process, corpus, folder):
  """From step 4; the second process kills itself in step 7, of which 6 is saved."""

  def action(step):
    if process and step == 7:
      os.kill(os.getpid(), signal.SIGKILL)

  on_step(action)
  run(data=corpus, out=folder / "killed", save_every=2)


def resume(process, corpus, folder):
  """The killed run to its end, another on another mesh, and one that is stopped."""
  config = config_lib.Config(
    **SETTINGS | {"data": corpus, "out": str(folder / "killed")}
  )
  with_last = checkpoint_lib.Checkpoints.last_step
  if process:
    checkpoint_lib.Checkpoints.last_step = property(lambda self: 4)
  found(step=refusal(data=corpus, out=config.out))
  checkpoint_lib.Checkpoints.last_step = with_last
  train_lib.train(config)
  moved = {"mesh": "data=4", "fsdp": True, "out": str(folder / "moved")}
  train_lib.train(config_lib.Config(**SETTINGS | moved, data=corpus))

  def action(step):
    time.sleep(0.1)
    if process and step == 10:
      signal.raise_signal(signal.SIGINT)

  on_step(action)
  run(data=corpus, out=folder / "stopped", steps=400)


def main():
  process, port, corpus, folder, scenario = sys.argv[1:6]
  sys.argv[6:] = [
    f"--coordinator=localhost:{port}",
    "--num_processes=2",
    f"--process_id={process}",
    "--heartbeat_seconds=20",
  ]
  # The name of a program in the compilation cache has that of the process in it,
  # and the first alone writes there.
  cache_key._hash_accelerator_config = lambda hash_obj, accelerators: None
  command.define_flags()
  figures_lib.write_figures = lambda rows, out: None
  if scenario != "train":
    trainer_lib.Trainer.sample = no_sample
  if scenario != "kill":
    hosts.flags.FLAGS(["train.py", *sys.argv[6:]])
    hosts.start()
    hosts.start = lambda: None
  scenarios = {"train": train, "kill": kill, "resume": resume}
  scenarios[scenario](int(process), corpus, pathlib.Path(folder))


if __name__ == "__main__":
  main()
