# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Trains a byte-level language model with balanced Mixture-of-Experts layers.

By default it reads the source of Python's own library and runs on whatever
device JAX finds; on two CPU cores it takes about three minutes. In --out it
leaves checkpoints, from which the same command continues, bit for bit, and one
with more --steps goes further; metrics.jsonl and TensorBoard events;
summary.json, sample.txt and figures. Several rules are trained in turn, each in
a folder of its own, and compared.

  python examples/lm/train.py --rule=proportional,none

Ctrl-C and SIGTERM end it after the step in progress, with a checkpoint; the
exit code is then 130 or 143. A second signal ends it at once. An impossible
setting or an unusable file exits with 2, a failed save with 1.

On a host with several accelerators, --mesh=DATA,EXPERT shards the batch and the
experts over them. This is one process; examples/minimal.py shows what a pod of
several hosts needs.
"""

import contextlib
import functools
import io
import pathlib
import signal
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import checkpoint as checkpoint_lib
import config as config_lib
import data as data_lib
import header as header_lib
import jax
import jax.numpy as jnp
import lock as lock_lib
import metrics_log as metrics_log_lib
import model as model_lib
import numpy as np
import report as report_lib
import results as results_lib
import sample as sample_lib
from absl import app, flags, logging

import jaxroute
import jaxroute.linen


class Interrupted(Exception):
  """The run was asked to stop, and has saved its state."""

  def __init__(self, number: int, step: int, out: pathlib.Path):
    name = signal.Signals(number).name
    super().__init__(f"{name}: saved after step {step} in --out={out}")
    self.exit_code = 128 + number


class Trainer:
  """The compiled steps of a run and where their operands lie.

  Args:
    config: the settings.
    mesh: with the axes "data" and "expert", or None for one device.

  Attributes:
    init: `key -> TrainState`, the state at step 0.
    shapes: what `init` returns, as `jax.ShapeDtypeStruct`s with shardings.
    step: `(state, batch) -> (state, report)`; the state is donated.
    evaluate: `(state, batch) -> report`, which changes nothing.
  """

  def __init__(self, config: config_lib.Config, mesh: jax.sharding.Mesh | None):
    self._config = config
    self._mesh = mesh
    partition = None
    if mesh is not None:
      partition = jaxroute.Partition(token_axes=("data",), expert_axis="expert")
    self._model = model_lib.Transformer(config, partition)
    self._rule, self._optimizer = config.make_rule(), config.make_optimizer()
    loss_fn = model_lib.make_loss_fn(self._model, config.switch_weight or None)
    self._train_step = functools.partial(
      jaxroute.train_step,
      loss_fn=loss_fn,
      optimizer=self._optimizer,
      rule=self._rule,
      micro_batches=config.micro_batches,
    )
    shapes = jax.eval_shape(self._init, jax.random.key(0))
    placed = model_lib.shardings(shapes, mesh)
    self.shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      placed,
    )
    self.init = jax.jit(self._init, out_shardings=placed)
    self.step = jax.jit(
      self._step, donate_argnums=0, out_shardings=(placed, None)
    )
    self.evaluate = jax.jit(
      functools.partial(jaxroute.eval_step, loss_fn=loss_fn)
    )
    self._scores = jax.jit(
      functools.partial(model_lib.router_scores, self._model)
    )
    # Of a single sequence: all devices do the same.
    self._generate = jax.jit(
      functools.partial(sample_lib.generate, model_lib.Transformer(config))
    )

  def place(self, batch: np.ndarray) -> jax.Array:
    """A batch on the devices."""
    if self._mesh is None:
      return jnp.asarray(batch)
    return jax.device_put(batch, jax.NamedSharding(self._mesh, jax.P("data")))

  def scores(self, state: jaxroute.TrainState, batch: jax.Array) -> np.ndarray:
    """`[Lyr, T, E]` float32: the routers' scores of a batch, without the bias."""
    return jax.device_get(
      self._scores(state.params, state.router.expert_bias, batch)
    )

  def sample(
    self, state: jaxroute.TrainState, prompt: np.ndarray
  ) -> np.ndarray:
    """Bytes that the model writes after a prompt.

    Args:
      state: it is left as it is.
      prompt: `[seq_len]` uint8.

    Returns:
      `[sample.LENGTH]` uint8.
    """
    variables = {
      "params": state.params,
      "expert_bias": state.router.expert_bias,
    }
    key = jax.random.key(self._config.seed)
    return jax.device_get(
      self._generate(jax.device_get(variables), prompt, key)
    )

  def _init(self, key: jax.Array) -> jaxroute.TrainState:
    c = self._config
    variables = self._model.init(
      key, jnp.zeros((c.batch_size, c.seq_len), jnp.int32)
    )
    router = jaxroute.linen.init_router_state(variables, self._rule)
    return jaxroute.init_train_state(
      variables["params"], router, self._optimizer
    )

  def _step(
    self, state: jaxroute.TrainState, batch: jax.Array
  ) -> tuple[jaxroute.TrainState, dict[str, Any]]:
    routed_by = state.router.expert_bias
    state, report = self._train_step(state, batch)
    return state, report | {
      "complementary_slackness": report_lib.complementary_slackness(
        routed_by, report["load"]
      ),
      "expert_bias": state.router.expert_bias,
    }


def train(config: config_lib.Config) -> dict[str, Any]:
  """Trains, or finishes a run that was stopped.

  Args:
    config: the settings.

  Returns:
    The summary, as written to summary.json; beside it lie sample.txt and the
    figures.

  Raises:
    SetupError: if a setting, the corpus or the checkpoint does not fit.
    SaveError: if a checkpoint or the metrics cannot be written.
    Interrupted: after SIGINT or SIGTERM.
  """
  corpus = data_lib.load(config)
  with _mesh(config) as mesh, lock_lib.claim(pathlib.Path(config.out)):
    return _run(config, corpus, mesh)


def _run(
  config: config_lib.Config,
  corpus: data_lib.Corpus,
  mesh: jax.sharding.Mesh | None,
) -> dict[str, Any]:
  """`train` in a folder that no other run uses."""
  out = pathlib.Path(config.out)
  if config.resume:
    config = config.continuing(checkpoint_lib.saved_identity(out))
  identity = config.identity() | {"data": corpus.sha256}
  with _stop_signal() as stop:
    checkpoints = checkpoint_lib.Checkpoints(out, identity)
    if config.resume:
      checkpoints.check()
    else:
      checkpoints.clear()
    last_step = checkpoints.last_step
    if last_step > config.steps:
      raise config_lib.SetupError(
        f"--steps={config.steps}, but --out={out} holds a run of {last_step}"
        " steps. Give at least as many, choose another --out, or --resume=false"
        " to delete that run."
      )
    trainer = Trainer(config, mesh)
    params = trainer.shapes.params
    # It goes back to an earlier checkpoint if the last is damaged.
    state = checkpoints.restore(trainer.shapes) if last_step else None
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
    with checkpoint_lib.saving("opening metrics", out):
      log = metrics_log_lib.MetricsLog(
        config, checkpoints.last_step, checkpoints.log_end
      )
    with contextlib.closing(log):
      state = _loop(config, corpus, trainer, state, checkpoints, log, stop)
  prompt = corpus.validation[: config.seq_len]
  sample = sample_lib.describe(prompt, trainer.sample(state, prompt))
  _, active = header_lib.parameter_counts(config, params)
  return results_lib.write(config, corpus, log.rows, sample, active)


def _loop(
  config: config_lib.Config,
  corpus: data_lib.Corpus,
  trainer: Trainer,
  state: jaxroute.TrainState,
  checkpoints: checkpoint_lib.Checkpoints,
  log: metrics_log_lib.MetricsLog,
  stop: "_Stop",
) -> jaxroute.TrainState:
  """Steps, validates and saves, from the last checkpoint to the end.

  Returns:
    The last state.
  """
  out = pathlib.Path(config.out)
  place, validation = trainer.place, corpus.validation_batches(config)
  for step in range(checkpoints.last_step + 1, config.steps + 1):
    state, report = trainer.step(state, place(corpus.batch(config, step)))
    is_last = step == config.steps
    with checkpoint_lib.saving("writing metrics", out):
      log.add_step(step, report)
      if is_last or step % config.eval_every == 0:
        log.settle()
        with log.progress.doing(step, "validating"):
          reports = [trainer.evaluate(state, b) for b in map(place, validation)]
          row = report_lib.validation_row(step, jax.device_get(reports))
          scores = trainer.scores(state, place(validation[0]))
          bias = report_lib.per_layer(jax.device_get(state.router.expert_bias))
          row |= report_lib.gaps(scores, bias, config.top_k)
        log.add(row)
      if is_last or step % config.save_every == 0 or stop.number:
        log_end = log.sync()
        with log.progress.doing(step, "saving"):
          checkpoints.save(step, state, log_end)
        log.restart_clock()
    if stop.number and not is_last:
      raise Interrupted(stop.number, step, out)
  if config.save_scores:
    scores = [trainer.scores(state, b) for b in map(place, validation)]
    with checkpoint_lib.saving("writing scores", out):
      np.savez(
        out / "scores.npz",
        scores=np.concatenate(scores, axis=1),
        expert_bias=report_lib.per_layer(state.router.expert_bias),
        top_k=config.top_k,
      )
  return state


@contextlib.contextmanager
def _mesh(config: config_lib.Config) -> Iterator[jax.sharding.Mesh | None]:
  """Puts the mesh of --mesh in force; None for one device."""
  shape = config.mesh_shape
  count = shape[0] * shape[1]
  if count > jax.device_count():
    raise config_lib.SetupError(
      f"--mesh={config.mesh} needs {count} devices, found {jax.device_count()}."
      " On CPU, set XLA_FLAGS=--xla_force_host_platform_device_count="
      f"{count} to try it."
    )
  if count == 1:
    yield None
    return
  mesh = jax.make_mesh(
    shape,
    ("data", "expert"),
    axis_types=(jax.sharding.AxisType.Auto,) * 2,
    devices=jax.devices()[:count],
  )
  with jax.set_mesh(mesh):
    yield mesh


class _Stop:
  """The signal that asked for a stop, 0 so far."""

  number = 0


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
  """Notes the first SIGINT or SIGTERM; a second one has its default effect."""
  stop = _Stop()
  default = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
  }

  def note(number: int, frame: types.FrameType | None) -> None:
    del frame
    stop.number = number
    for each, handler in default.items():
      signal.signal(each, handler)

  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  before = {number: signal.signal(number, note) for number in default}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"expected flags only, got {argv[1:]}.", exitcode=2)
  # A path may have bytes that are no text, and a model writes what not every
  # terminal can show.
  if isinstance(sys.stdout, io.TextIOWrapper):
    sys.stdout.reconfigure(errors="backslashreplace")
  # JAX and Orbax would log in the middle of the progress bar.
  logging.set_verbosity(logging.WARNING)
  try:
    configs = config_lib.from_flags()
    results_lib.show(configs, [train(config) for config in configs])
  except config_lib.SetupError as error:
    _exit(2, str(error))
  except checkpoint_lib.SaveError as error:
    _exit(1, str(error))
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    if not isinstance(error, MemoryError) and "EXHAUSTED" not in str(error):
      raise
    _exit(
      2,
      f"out of memory ({str(error).splitlines()[0] if str(error) else 'host'})."
      " Make --batch_size, --seq_len or the model smaller, or --micro_batches"
      " or --mesh larger.",
    )
  except Interrupted as error:
    _exit(error.exit_code, f"{error}; the same command continues from there.")
  except KeyboardInterrupt:
    _exit(128 + signal.SIGINT, "aborted; the last checkpoint is intact.")


def _exit(code: int, message: str) -> NoReturn:
  print(f"train.py: {message}", file=sys.stderr)
  sys.exit(code)


if __name__ == "__main__":
  config_lib.define_flags()
  flags.adopt_module_key_flags(config_lib)
  app.run(main, flags_parser=config_lib.parse_flags)
