# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Trains a byte-level language model with balanced Mixture-of-Experts layers.

By default it reads the source of Python's own library and runs on whatever
devices JAX finds; on two CPU cores it takes about three minutes. In --out it
leaves checkpoints, from which the same command continues, bit for bit, and one
with more --steps goes further; metrics.jsonl and TensorBoard events;
summary.json, sample.txt and figures. Several rules are trained in turn, each in
a folder of its own, and compared.

  python examples/lm/train.py --rule=proportional,none

Ctrl-C and SIGTERM end it after the step in progress, with a checkpoint; the
exit code is then 130 or 143. A second signal ends it at once. An impossible
setting or an unusable file exits with 2, a failed save or a lost process with 1.

All devices share the batch; --mesh=data=4,expert=2 shards the experts, too, and
--fsdp the parameters. On several hosts start the same command on each: Cloud TPU
and SLURM tell the processes of each other, elsewhere add

  --coordinator=HOST:PORT --num_processes=N --process_id=I

All hosts see one --out, a shared folder or gs://BUCKET/FOLDER, and each has the
corpus. A signal to one stops all after the same step. If one dies, all end;
started again, on as many hosts or others, they continue from the last checkpoint.
On another mesh the next step routes as it would have on the old one.

  python examples/lm/train.py --size=lfb_1b --data=TEXT --out=gs://BUCKET/RUN \\
    --mesh=data=8,expert=8 --fsdp --remat
"""

import contextlib
import io
import os
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import checkpoint as checkpoint_lib
import command
import config as config_lib
import data as data_lib
import header as header_lib
import hosts
import jax
import lock as lock_lib
import metrics_log as metrics_log_lib
import numpy as np
import report as report_lib
import results as results_lib
import sample as sample_lib
import stop as stop_lib
import storage
from absl import app, flags, logging
from trainer import Trainer, make_mesh

import jaxroute


class Interrupted(Exception):
  """The run was asked to stop, and has saved its state."""

  def __init__(self, number: int, step: int, out: str):
    name = signal.Signals(number).name
    super().__init__(f"{name}: saved after step {step} in --out={out}")
    self.exit_code = 128 + number


def train(config: config_lib.Config) -> dict[str, Any]:
  """Trains, or finishes a run that was stopped; all processes call it.

  Args:
    config: the settings.

  Returns:
    The summary, as written to summary.json; beside it lie sample.txt and the
    figures. Empty in all processes but the first.

  Raises:
    SetupError: if a setting, the corpus or the checkpoint does not fit, or
      processes disagree.
    SaveError: if a checkpoint or the metrics cannot be written.
    Interrupted: after SIGINT or SIGTERM.
  """
  with hosts.together():
    corpus = data_lib.load(config)
    storage.check(config.out)
  config = config.on_devices(jax.device_count())
  hosts.agree(
    {f"--{k}": v for k, v in vars(config).items()}
    | {"the corpus": corpus.sha256}
  )
  mesh = make_mesh(config)
  with contextlib.ExitStack() as stack:
    with hosts.together():
      stack.enter_context(lock_lib.claim(config.out))
    return _run(config, corpus, mesh)


def _run(
  config: config_lib.Config,
  corpus: data_lib.Corpus,
  mesh: jax.sharding.Mesh | None,
) -> dict[str, Any]:
  """`train` in a folder that no other run uses."""
  with stop_lib.on_signal() as stop:
    config, checkpoints = _open(config, corpus)
    trainer = Trainer(config, mesh)
    params = trainer.shapes.params
    # It goes back to an earlier checkpoint if the last is damaged.
    state = None
    if checkpoints.last_step:
      state = checkpoints.restore(trainer.shapes)
    if hosts.is_first():
      text = header_lib.header(
        config,
        params,
        corpus.description,
        checkpoints.last_step,
        jax.device_count(),
      )
      print(text, flush=True)
    if state is None:
      state = trainer.init(jax.random.key(config.seed))
    with hosts.together():
      log = _open_log(config, checkpoints)
    with contextlib.closing(log):
      state = _loop(config, corpus, trainer, state, checkpoints, log, stop)
  prompt = corpus.validation[: config.seq_len]
  written = trainer.sample(state, prompt)
  with hosts.together():
    if not isinstance(log, metrics_log_lib.MetricsLog):
      return {}
    sample = sample_lib.describe(prompt, written)
    _, active = header_lib.parameter_counts(config, params)
    return results_lib.write(config, corpus, log.rows, sample, active)


def _open(
  config: config_lib.Config, corpus: data_lib.Corpus
) -> tuple[config_lib.Config, checkpoint_lib.Checkpoints]:
  """The settings that a run goes on with, and its checkpoints."""
  if config.resume:
    config = config.continuing(checkpoint_lib.saved_identity(config.out))
  identity = config.identity() | {"data": corpus.sha256}
  checkpoints = checkpoint_lib.Checkpoints(config.out, identity)
  folder = storage.absolute(config.out)
  hosts.agree(
    {
      "the step that --out is at": checkpoints.last_step,
      "the settings that it was begun with": identity,
      f"whether {folder} is there": folder.exists(),
    }
  )
  if config.resume:
    checkpoints.check()
  else:
    checkpoints.clear()
  if checkpoints.last_step > config.steps:
    raise config_lib.SetupError(
      f"--steps={config.steps}, but --out={config.out} holds a run of"
      f" {checkpoints.last_step} steps. Give at least as many, choose another"
      " --out, or --resume=false to delete that run."
    )
  return config, checkpoints


def _open_log(
  config: config_lib.Config, checkpoints: checkpoint_lib.Checkpoints
) -> metrics_log_lib.MetricsLog | metrics_log_lib.Follower:
  if not hosts.is_first():
    return metrics_log_lib.Follower()
  with checkpoint_lib.saving("opening metrics", config.out):
    return metrics_log_lib.MetricsLog(
      config, checkpoints.last_step, checkpoints.log_end
    )


def _loop(
  config: config_lib.Config,
  corpus: data_lib.Corpus,
  trainer: Trainer,
  state: jaxroute.TrainState,
  checkpoints: checkpoint_lib.Checkpoints,
  log: metrics_log_lib.MetricsLog | metrics_log_lib.Follower,
  stop: stop_lib.Stop,
) -> jaxroute.TrainState:
  """Steps, validates and saves, from the last checkpoint to the end.

  Returns:
    The last state.
  """
  validation = corpus.validation_batches(config)
  for step in range(checkpoints.last_step + 1, config.steps + 1):
    batch = trainer.place(lambda rows, s=step: corpus.batch(config, s, rows))
    state, report = trainer.step(state, batch)
    is_last = step == config.steps
    with checkpoint_lib.saving("writing metrics", config.out):
      log.add_step(step, report)
      if is_last or step % config.eval_every == 0:
        log.settle()
        with log.doing(step, "validating"):
          _validate(config, trainer, state, validation, step, log)
      is_stopped = stop.reached()
      if is_last or step % config.save_every == 0 or is_stopped:
        log_end = log.sync()
        with log.doing(step, "saving"):
          checkpoints.save(step, state, log_end)
        log.restart_clock()
    if is_stopped and not is_last:
      raise Interrupted(stop.number, step, config.out)
  if config.save_scores:
    scores = [
      trainer.scores(state, trainer.place(b.__getitem__)) for b in validation
    ]
    if hosts.is_first():
      with checkpoint_lib.saving("writing scores", config.out):
        np.savez(
          storage.local(config.out) / "scores.npz",
          scores=np.concatenate(scores, axis=1),
          expert_bias=report_lib.per_layer(
            jax.device_get(state.router.expert_bias)
          ),
          top_k=config.top_k,
        )
  return state


def _validate(
  config: config_lib.Config,
  trainer: Trainer,
  state: jaxroute.TrainState,
  batches: np.ndarray,
  step: int,
  log: metrics_log_lib.MetricsLog | metrics_log_lib.Follower,
) -> None:
  """Adds the row of a validation; all processes evaluate, the first has a log."""
  placed = [trainer.place(b.__getitem__) for b in batches]
  reports = [trainer.evaluate(state, batch) for batch in placed]
  scores = trainer.scores(state, placed[0])
  if isinstance(log, metrics_log_lib.MetricsLog):
    row = report_lib.validation_row(step, jax.device_get(reports))
    bias = report_lib.per_layer(jax.device_get(state.router.expert_bias))
    log.add(row | report_lib.gaps(scores, bias, config.top_k))


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    _exit(2, f"expected flags only, got {argv[1:]}. See --help.")
  # A path may have bytes that are no text, and a model writes what not every
  # terminal can show.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
  # JAX and Orbax would log in the middle of the progress bar.
  logging.set_verbosity(logging.WARNING)
  try:
    hosts.start()
    with hosts.together():
      configs = command.from_flags()
    hosts.agree({"--rule": ",".join(c.rule for c in configs)})
    summaries = [train(config) for config in configs]
    with hosts.together():
      if hosts.is_first():
        results_lib.show(configs, summaries)
  except config_lib.SetupError as error:
    _exit(2, str(error))
  except config_lib.SaveError as error:
    _exit_alone(1, str(error))
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    _exit_alone(*_explained(error))
  except Interrupted as error:
    _exit(error.exit_code, f"{error}; the same command continues from there.")
  except KeyboardInterrupt:
    _exit_alone(128 + signal.SIGINT, "aborted; the last checkpoint is intact.")


def _explained(error: Exception) -> tuple[int, str]:
  """The exit code and the message for what a device or a host has raised."""
  first = str(error).splitlines()[0] if str(error) else "host"
  if isinstance(error, MemoryError) or "EXHAUSTED" in str(error):
    return 2, (
      f"out of memory ({first}). Make --batch_size, --seq_len or the model"
      " smaller, or --micro_batches or --mesh larger; --remat and --fsdp save"
      " memory, too."
    )
  if jax.process_count() == 1:
    raise error
  return 1, (
    f"a step failed, as it does when another process has ended ({first[:300]})."
    " The same command, started again on all hosts, continues from the last"
    " checkpoint."
  )


def _exit(code: int, message: str) -> NoReturn:
  print(f"train.py: {message}", file=sys.stderr)
  sys.exit(code)


def _exit_alone(code: int, message: str) -> NoReturn:
  """Exits without waiting for other processes, which do not know of it."""
  if jax.process_count() == 1:
    _exit(code, message)
  print(f"train.py: {message}", file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)


if __name__ == "__main__":
  command.define_flags()
  for module in (command, hosts):
    flags.adopt_module_key_flags(module)
  app.run(main, flags_parser=command.parse_flags)
