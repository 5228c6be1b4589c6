# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The training step: parameters by their gradient and biases by the rule, at once."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxroute import checks, types
from jaxroute import counts as counts_lib
from jaxroute import metrics as metrics_lib
from jaxroute import micro_batches as micro_batches_lib
from jaxroute import step as step_lib


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """All that a training run carries from step to step.

  Attributes:
    step: `[]` int32. Batches seen, skipped ones included.
    params: the model's trainable parameters.
    opt_state: state of the optimizer of `params`.
    router: biases, loads and the rule's state.
    variables: what else the model carries from batch to batch (batch statistics,
      say), a pytree of arrays; None if there is nothing.
  """

  step: jax.Array
  params: types.PyTree
  opt_state: types.PyTree
  router: types.RouterState
  variables: types.PyTree = None


def init_train_state(
  params: types.PyTree,
  router: types.RouterState,
  optimizer: optax.GradientTransformation | optax.MultiSteps,
  variables: types.PyTree = None,
) -> TrainState:
  """A `TrainState` at step 0.

  Args:
    params: the model's trainable parameters.
    router: from `init_router_state` or a Flax layer's helper.
    optimizer: the transformation that will update `params`, and only those.
    variables: the model's other collections, if it has any that change.

  Returns:
    A `TrainState`.

  Raises:
    ValueError: if `router` is no state, or `optimizer` no optax transformation.
  """
  step_lib.check_state("router", router)
  checks.check_transformation("optimizer", optimizer)
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    router=router,
    variables=variables,
  )


def train_step(
  state: TrainState,
  batch: types.PyTree,
  *,
  loss_fn: micro_batches_lib.LossFn,
  optimizer: optax.GradientTransformation | optax.MultiSteps,
  rule: optax.GradientTransformation,
  micro_batches: int = 1,
  weight_fn: micro_batches_lib.WeightFn | None = None,
  rng: jax.Array | None = None,
  freeze_bias: jax.typing.ArrayLike = False,
  skip: jax.typing.ArrayLike = False,
) -> tuple[TrainState, dict[str, Any]]:
  """One optimizer step and one dual step.

  Call it under `jax.jit`, and donate the state: without, every call traces and
  compiles the model anew.

  Gradients are averaged and loads summed over micro-batches that all route with
  the same bias. A step whose loss or a gradient is not finite, or that no token
  counts in, is skipped: the state stays as it was but for its number.

  With `optax.MultiSteps` in the optimizer the bias moves when the parameters
  do, by what was counted since they last did; a gradient that it refuses
  (`should_skip_update_fn`) makes a skipped step, and counts nothing. Other
  wrappers that hold an update back, such as `optax.apply_if_finite`, are not
  looked into: the bias moves with every step that is not skipped.

  Args:
    state: from `init_train_state`; may be donated.
    batch: pytree of arrays whose leading axis is split into micro-batches.
    loss_fn: (static)
      `(params, expert_bias, batch) -> (loss, (counts, metrics))`: the mean loss
      over the batch, the `Counts` of all layers, with loads shaped like
      `expert_bias`, and a dict of numbers to average. If there is an `rng`, it
      is called with a keyword `rng`, a key for this micro-batch. If there are
      `state.variables`, it is called with a keyword `variables`, and returns
      `(loss, (counts, metrics, variables))`: one micro-batch hands them to the
      next.
    optimizer: (static) transformation of the gradients of `params`.
    rule: (static) transformation of the load violation; see `jaxroute.dual`.
    micro_batches: (static) parts the batch is processed in, one after the
      other.
    weight_fn: (static) `batch -> []`, what a micro-batch weighs in the means of
      losses, gradients and metrics: the number of its tokens that count, if the
      loss is a mean over those. One of weight 0 adds nothing to them. None weighs
      all alike, as `optax.MultiSteps` does its steps.
    rng: a random key, for the whole run: each step folds its number into it, and
      each micro-batch its own.
    freeze_bias: `[]` bool. True trains the parameters and leaves the bias.
    skip: `[]` bool. True skips the step whatever the gradient.

  Returns:
    The next state, and a dict: the means of `loss_fn`'s metrics, `loss` and
    `grad_norm`, all in float32 at least, `skipped` (0 or 1), `load` (of this
    batch) and what `jaxroute.metrics.summary` says of it and of the next bias.

  Raises:
    ValueError: if `micro_batches` does not divide the batch, the counts do not
      fit the router state, or what is passed or returned is not as above.

  Example:
    >>> import functools, jaxroute
    >>> config = jaxroute.RouterConfig(num_experts=4, top_k=2)
    >>> def loss_fn(params, expert_bias, x):
    ...   routing = jaxroute.route(x @ params, expert_bias[0], config)
    ...   counts = jax.tree.map(lambda c: c[None], routing.counts)
    ...   return jnp.mean(routing.weights ** 2), (counts, {})
    >>> rule, optimizer = jaxroute.dual.sign(1e-3), optax.sgd(0.1)
    >>> step = functools.partial(
    ...   jaxroute.train_step, loss_fn=loss_fn, optimizer=optimizer, rule=rule)
    >>> step = jax.jit(step, donate_argnums=0)
    >>> router = jaxroute.init_router_state(rule, num_experts=4)
    >>> state = jaxroute.init_train_state(jnp.eye(4), router, optimizer)
    >>> state, metrics = step(state, jnp.eye(4)[:1])
    >>> state.router.expert_bias
    Array([[-0.001, -0.001,  0.001,  0.001]], dtype=float32)
  """
  functions: dict[str, Any] = {"loss_fn": loss_fn}
  if weight_fn is not None:
    functions["weight_fn"] = weight_fn
  flags = {"freeze_bias": freeze_bias, "skip": skip}
  _check_arguments(state, rng, functions, flags)
  checks.check_transformation("optimizer", optimizer)
  _check_opt_state(state, optimizer)
  if rng is not None:
    rng = jax.random.fold_in(rng, state.step)
  found = micro_batches_lib.accumulated_grad(
    loss_fn,
    state.params,
    state.router.expert_bias,
    batch,
    micro_batches=micro_batches,
    weight_fn=weight_fn,
    rng=rng,
    variables=state.variables,
  )
  counts = counts_lib.of_loss(found.counts, state.router)
  grad_norm, is_finite = micro_batches_lib.norm(found.grads)
  ok = is_finite & jnp.isfinite(found.loss) & (found.weight > 0)
  ok &= jnp.logical_not(skip)

  updates, opt_state = optimizer.update(
    found.grads, state.opt_state, state.params
  )
  is_taken, is_moved = micro_batches_lib.multi_steps(state.opt_state, opt_state)
  params, opt_state, variables = optax.tree.where(
    ok,
    (optax.apply_updates(state.params, updates), opt_state, found.variables),
    (state.params, state.opt_state, state.variables),
  )
  router = _next_router(
    state.router,
    counts,
    rule,
    is_taken=ok & is_taken,
    is_moved=ok & is_moved,
    freeze_bias=freeze_bias,
  )
  next_state = TrainState(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    router=router,
    variables=variables,
  )
  report = dict(loss=found.loss, grad_norm=grad_norm, load=counts.load)
  report["skipped"] = 1 - (ok & is_taken).astype(jnp.int32)
  report |= metrics_lib.summary(counts.load, router.expert_bias)
  return next_state, _joined(found.metrics, report)


def _next_router(
  router: types.RouterState,
  counts: types.Counts,
  rule: optax.GradientTransformation,
  *,
  is_taken: jax.Array,
  is_moved: jax.Array,
  freeze_bias: jax.typing.ArrayLike,
) -> types.RouterState:
  """The bias moves when the parameters do; until then, counts stay.

  Args:
    router: before the step.
    counts: of the batch.
    rule: moves the bias.
    is_taken: `[]` bool. False loses the counts of the batch.
    is_moved: `[]` bool. Whether the parameters move.
    freeze_bias: `[]` bool. Whether the bias stays even then.

  Returns:
    The router state after the step.
  """
  counted = dataclasses.replace(
    router, counts=jax.tree.map(jnp.add, router.counts, counts)
  )
  moved = step_lib.update(counted, rule, apply=jnp.logical_not(freeze_bias))
  router = optax.tree.where(is_taken, counted, router)
  return optax.tree.where(is_moved, moved, router)


def eval_step(
  state: TrainState,
  batch: types.PyTree,
  *,
  loss_fn: micro_batches_lib.LossFn,
  rng: jax.Array | None = None,
) -> dict[str, Any]:
  """The loss and load of a batch; changes nothing.

  Args:
    state: from `init_train_state` or `train_step`.
    batch: what `loss_fn` takes.
    loss_fn: (static) as in `train_step`; the variables that it returns are
      dropped.
    rng: a random key, which `loss_fn` gets as it is; None if it takes none.

  Returns:
    A dict: `loss_fn`'s metrics, `loss`, a scalar, and `load`, int32 of the
    shape of the bias, `[Lyr, E]` or a pytree of `[..., E]`. MaxVio_global is
    `max_vio` of the loads summed over all batches.

  Raises:
    ValueError: if what is passed or returned is not as in `train_step`.
  """
  _check_arguments(state, rng, {"loss_fn": loss_fn}, {})
  loss, (counts, aux, _) = micro_batches_lib.call_loss(
    loss_fn,
    state.params,
    state.router.expert_bias,
    batch,
    rng,
    state.variables,
  )
  counts = counts_lib.of_loss(counts, state.router)
  return _joined(aux, dict(loss=loss, load=counts.load))


def _joined(
  metrics: dict[str, Any], report: dict[str, jax.Array]
) -> dict[str, Any]:
  """What a loss function reports and what a step does, under names of their own."""
  if taken := sorted(set(metrics) & set(report)):
    raise ValueError(
      f"`loss_fn` must return metrics of other names than {sorted(report)}, which"
      f" are reported with them, got {taken}. Rename these."
    )
  return metrics | report


def _check_opt_state(
  state: TrainState, optimizer: optax.GradientTransformation | optax.MultiSteps
) -> None:
  expected = jax.eval_shape(optimizer.init, state.params)
  found = jax.tree.structure(state.opt_state)
  if found != jax.tree.structure(expected):
    raise ValueError(
      "`state.opt_state` must be like `optimizer.init(params)`, of the structure"
      f" {jax.tree.structure(expected)}, got {found}. Pass the optimizer that the"
      " state was made with."
    )


def _check_arguments(
  state: Any, rng: Any, functions: dict[str, Any], flags: dict[str, Any]
) -> None:
  fix = "Pass what `init_train_state` returned."
  checks.check_instance("state", state, TrainState, fix)
  for name, function in functions.items():
    checks.check_callable(name, function)
  for name, flag in flags.items():
    checks.check_flag(name, flag, "It holds for all layers.")
  if rng is not None:
    checks.check_key("rng", rng)
