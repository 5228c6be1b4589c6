# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The compiled programs of a run, and the mesh that they run on.

All processes call each of them. What they return for a process to look at is the
same in all of them, whole; batches are made part by part, where they are needed.
"""

import functools
from collections.abc import Callable
from typing import Any

import config as config_lib
import jax
import jax.numpy as jnp
import model as model_lib
import numpy as np
import report as report_lib
import sample as sample_lib

import jaxroute
import jaxroute.linen
from jaxroute import parallel

# Enough to tell how far biases are from the best; scores of all tokens of a large
# batch would not fit a device.
SCORED_TOKENS = 2**16


def make_mesh(config: config_lib.Config) -> jax.sharding.Mesh | None:
  """The mesh of --mesh, of all processes; None for one device.

  Args:
    config: the settings, with a mesh.

  Raises:
    SetupError: if there are fewer devices, or processes without any of them.
  """
  data, expert = config.mesh_shape
  used, found = data * expert, jax.device_count()
  if used > found:
    raise config_lib.SetupError(
      f"--mesh={config.mesh} needs {used} devices, found {found}. On CPU, set"
      f" XLA_FLAGS=--xla_force_host_platform_device_count={used} to try it."
    )
  if used < found and jax.process_count() > 1:
    raise config_lib.SetupError(
      f"--mesh={config.mesh} must be of all {found} devices of the"
      f" {jax.process_count()} processes, got {used}. Leave it out for all, or"
      " start fewer processes."
    )
  if used == 1:
    return None
  shape = {"data": data} | ({"expert": expert} if expert > 1 else {})
  return jax.make_mesh(
    tuple(shape.values()),
    tuple(shape),
    axis_types=(jax.sharding.AxisType.Auto,) * len(shape),
    devices=jax.devices()[:used],
  )


class Trainer:
  """The compiled steps of a run and where their operands lie.

  Args:
    config: the settings.
    mesh: of `make_mesh`; the batch is sharded over all its axes.

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
      partition = jaxroute.Partition(
        token_axes=mesh.axis_names,
        expert_axis="expert" if "expert" in mesh.axis_names else None,
        fsdp_axis="data" if config.fsdp else None,
      )
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
    init = self._on_mesh(self._init)
    shapes = jax.eval_shape(init, jax.random.key(0))
    if mesh is None or partition is None:
      placed = jax.sharding.SingleDeviceSharding(jax.devices()[0])
      placed = jax.tree.map(lambda _: placed, shapes)
    else:
      placed = parallel.shardings(shapes, partition, mesh)
    self.shapes = jax.tree.map(
      lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
      shapes,
      placed,
    )
    # A process can only fetch what it has all of.
    whole = None if mesh is None else jax.NamedSharding(mesh, jax.P())
    self.init = jax.jit(init, out_shardings=placed)
    self.step = jax.jit(
      self._on_mesh(self._step),
      donate_argnums=0,
      out_shardings=(placed, whole),
    )
    self.evaluate = jax.jit(
      self._on_mesh(functools.partial(jaxroute.eval_step, loss_fn=loss_fn)),
      out_shardings=whole,
    )
    self._scores = jax.jit(
      self._on_mesh(self._router_scores), out_shardings=whole
    )
    self._generate = jax.jit(self._on_mesh(self._sample), out_shardings=whole)

  def place(self, rows: Callable[[slice], np.ndarray]) -> jax.Array:
    """A batch on the devices; each process makes the rows of its own.

    Args:
      rows: makes some rows of `[batch_size, seq_len + 1]` bytes.
    """
    if self._mesh is None:
      return jnp.asarray(rows(slice(None)))
    c = self._config

    def part(index: Any) -> np.ndarray:
      return rows(index[0])

    return jax.make_array_from_callback(
      (c.batch_size, c.seq_len + 1),
      jax.NamedSharding(self._mesh, jax.P(self._mesh.axis_names)),
      part,
    )

  def scores(self, state: jaxroute.TrainState, batch: jax.Array) -> np.ndarray:
    """`[Lyr, T, E]` float32: the routers' scores, without the bias.

    They are of a batch, of its first `SCORED_TOKENS` tokens at most.
    """
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
    return jax.device_get(self._generate(variables, prompt, key))

  def _on_mesh(self, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, traced with the mesh in force.

    It is not in force outside: what the first process alone computes is on a
    device of its own.
    """
    if self._mesh is None:
      return function
    mesh = self._mesh.abstract_mesh

    def traced(*args: Any) -> Any:
      with jax.sharding.use_abstract_mesh(mesh):
        return function(*args)

    return traced

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

  def _router_scores(
    self, params: Any, expert_bias: Any, batch: jax.Array
  ) -> jax.Array:
    found = model_lib.router_scores(self._model, params, expert_bias, batch)
    return found[:, :SCORED_TOKENS]

  def _sample(self, variables: Any, prompt: jax.Array, key: jax.Array):
    # Every device writes the same text, since the layers shard sequences.
    rows = 1 if self._mesh is None else self._mesh.size
    return sample_lib.generate(self._model, variables, prompt, key, rows)
