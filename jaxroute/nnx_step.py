# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What `jaxroute.nnx` shows besides layers: their variables, and steps in place."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from flax import nnx

from jaxroute import checks, micro_batches, step, train, types


class ExpertBias(nnx.Variable):
  """Selection bias, `[..., E]` float32; moved by `update` only."""


class Load(nnx.Variable):
  """Assignments per expert since the last update, `[..., E]` int32."""


class Histogram(nnx.Variable):
  """`Counts.histogram` since the last update, `[..., E, 16]` int32."""


# A linen collection of this name arrives as our type through nnx.bridge.
nnx.register_variable_name("expert_bias", ExpertBias, overwrite=True)
nnx.register_variable_name("load", Load, overwrite=True)
nnx.register_variable_name("histogram", Histogram, overwrite=True)


def router_state(
  model: nnx.Module, rule_state: types.PyTree
) -> types.RouterState:
  """The model's biases and counts as a `RouterState` of plain arrays.

  Args:
    model: holds any number of `Router`s.
    rule_state: state of the rule, from `init_rule_state` or `update`.

  Returns:
    A `RouterState`, to look at or to save.

  Raises:
    ValueError: if the model has no router.
  """
  state = types.RouterState(
    expert_bias=nnx.to_pure_dict(nnx.state(model, ExpertBias)),
    counts=types.Counts(
      load=nnx.to_pure_dict(nnx.state(model, Load)),
      histogram=nnx.to_pure_dict(nnx.state(model, Histogram)) or None,
    ),
    rule_state=rule_state,
  )
  if not state.expert_bias:
    raise ValueError(
      f"`model` must hold at least one jaxroute.nnx.Router, got none in a"
      f" {type(model).__name__}."
    )
  return state


def init_rule_state(
  model: nnx.Module, rule: optax.GradientTransformation
) -> types.PyTree:
  """The rule's initial state for all routers of a model.

  Args:
    model: holds any number of `Router`s.
    rule: any optax transformation; see `jaxroute.dual`.

  Returns:
    A pytree, to be carried from `update` to `update` and checkpointed.

  Raises:
    ValueError: if the model has no router.
  """
  checks.check_transformation("rule", rule)
  return rule.init(router_state(model, None).expert_bias)


def update(
  model: nnx.Module,
  rule: optax.GradientTransformation,
  rule_state: types.PyTree,
  apply: jax.typing.ArrayLike = True,
  axis_name: str | Sequence[str] | None = None,
) -> types.PyTree:
  """`jaxroute.update`, in place: moves the biases and zeroes the counts.

  Args:
    model: whose forward passes counted since the last update.
    rule: any optax transformation; see `jaxroute.dual`.
    rule_state: from `init_rule_state` or the last call.
    apply: `[]` bool. False discards the counts and changes nothing else.
    axis_name: mesh axes to sum the counts over first, in `nnx.shard_map` or
      `nnx.pmap`; see `jaxroute.update`.

  Returns:
    The next `rule_state`.

  Raises:
    ValueError: if the model has no router, or `rule_state` is not of this rule.
  """
  state = router_state(model, rule_state)
  return _set_router_state(model, step.update(state, rule, apply, axis_name))


def train_step(
  model: nnx.Module,
  optimizer: nnx.Optimizer,
  rule_state: types.PyTree,
  batch: types.PyTree,
  *,
  loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, Any]]],
  rule: optax.GradientTransformation,
  micro_batches: int = 1,
  weight_fn: Callable[[types.PyTree], jax.Array] | None = None,
  freeze_bias: jax.typing.ArrayLike = False,
  skip: jax.typing.ArrayLike = False,
) -> tuple[types.PyTree, dict[str, Any]]:
  """`jaxroute.train_step`, in place: moves the parameters and the biases.

  Call it under `nnx.jit`, and donate model, optimizer and rule state: without,
  every call traces and compiles the model anew.

  Random streams, batch statistics and all other variables go from one
  micro-batch to the next, and stay as they were if the step is skipped. What a
  forward pass adds to the model, as `sow` does, is dropped.

  Args:
    model: to be trained, not in the mode of `model.eval()`, which counts nothing.
    optimizer: `nnx.Optimizer(model, tx, wrt=nnx.Param)`. Its `step` counts the
      batches, skipped ones included.
    rule_state: from `init_rule_state` or the last call.
    batch: pytree of arrays whose leading axis is split into micro-batches.
    loss_fn: (static) `(model, batch) -> (loss, metrics)`: the mean loss over the
      batch and a dict of numbers to average.
    rule: (static) transformation of the load violation; see `jaxroute.dual`.
    micro_batches: (static) as in `jaxroute.train_step`.
    weight_fn: (static) as in `jaxroute.train_step`.
    freeze_bias: as in `jaxroute.train_step`.
    skip: as in `jaxroute.train_step`.

  Returns:
    The next `rule_state` and the metrics of `jaxroute.train_step`.

  Raises:
    ValueError: as in `jaxroute.train_step`, or if the optimizer has a bias among
      its parameters, or the model is in evaluation mode.
  """
  if not isinstance(optimizer, nnx.Optimizer):
    raise ValueError(
      "`optimizer` must be an `nnx.Optimizer(model, tx, wrt=nnx.Param)`, got"
      f" {checks.describe(optimizer)}."
    )
  checks.check_callable("loss_fn", loss_fn)
  _check_counts(model)
  kinds = (optimizer.wrt, ExpertBias, (Load, Histogram), ...)
  graph, *parts = nnx.split(model, *kinds)
  params, biases, counts, variables = map(nnx.as_pure, parts)
  router = router_state(model, rule_state)
  if len(jax.tree.leaves(biases)) < len(jax.tree.leaves(router.expert_bias)):
    raise ValueError(
      "`optimizer` must leave the biases to the rule, got one with"
      f" wrt={optimizer.wrt}. Make it with `wrt=nnx.Param`."
    )
  state, metrics = train.train_step(
    train.TrainState(
      step=optimizer.step[...],
      params=params,
      opt_state=nnx.as_pure(optimizer.opt_state),
      router=router,
      variables=variables,
    ),
    batch,
    loss_fn=_functional_loss(loss_fn, graph, kinds, counts),
    optimizer=optimizer.tx,
    rule=rule,
    micro_batches=micro_batches,
    weight_fn=weight_fn,
    freeze_bias=freeze_bias,
    skip=skip,
  )
  nnx.update(model, state.params, state.variables)
  nnx.update(optimizer.opt_state, nnx.state(state.opt_state))
  optimizer.step[...] = state.step
  return _set_router_state(model, state.router), metrics


def _check_counts(model: nnx.Module) -> None:
  """Raises ValueError if all routers of a model are in evaluation mode."""
  routers = [
    module
    for _, module in nnx.iter_modules(model)
    if isinstance(getattr(module, "load", None), Load)
  ]
  if routers and all(getattr(r, "deterministic", False) for r in routers):
    raise ValueError(
      "`model` must count its loads, got one in evaluation mode. Call"
      " `model.train()` before."
    )


def _functional_loss(
  loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, Any]]],
  graph: Any,
  kinds: tuple[Any, ...],
  counts: types.PyTree,
) -> micro_batches.LossFn:
  """A loss of a model's parts, as `jaxroute.train_step` takes it.

  Args:
    loss_fn: of the model and a batch.
    graph: of `nnx.split(model, *kinds)`.
    kinds: the filters of parameters, biases, counts and all other variables.
    counts: of the model.

  Returns:
    A function that runs a copy of the model, which has counted nothing before.
  """

  def call_copy(
    params: types.PyTree,
    expert_bias: types.PyTree,
    batch: types.PyTree,
    *,
    variables: types.PyTree,
  ) -> tuple[jax.Array, tuple[types.Counts, Any, types.PyTree]]:
    none = optax.tree.zeros_like(counts)
    copy = nnx.merge(graph, params, expert_bias, none, variables)
    out = loss_fn(copy, batch)
    if not isinstance(out, tuple | list) or len(out) != 2:
      raise ValueError(
        f"`loss_fn` must return (loss, metrics), got {checks.describe(out)}. Where"
        " there are no metrics, return an empty dict."
      )
    after: Any = nnx.as_pure(nnx.split(copy, *kinds)[-1])
    return out[0], (
      router_state(copy, None).counts,
      out[1],
      _of_paths(after, variables),
    )

  return call_copy


def _of_paths(state: nnx.State, like: nnx.State) -> nnx.State:
  """The part of a model's state at the paths of another."""
  leaves = dict(nnx.to_flat_state(state))
  paths = [path for path, _ in nnx.to_flat_state(like)]
  return nnx.from_flat_state([(p, leaves[p]) for p in paths if p in leaves])


def _set_router_state(
  model: nnx.Module, state: types.RouterState
) -> types.PyTree:
  """Writes biases and counts into a model; returns the state of the rule."""
  for kind, values in (
    (ExpertBias, state.expert_bias),
    (Load, state.counts.load),
    (Histogram, state.counts.histogram or {}),
  ):
    variables = nnx.state(model, kind)
    nnx.replace_by_pure_dict(variables, values)
    nnx.update(model, variables)
  return state.rule_state
