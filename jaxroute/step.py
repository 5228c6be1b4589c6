# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Pure step functions: count loads, move the bias, train, evaluate.

The bias moves in `update` and nowhere else: once per optimizer step, by the
load that `accumulate` summed over the micro-batches of that step. All states
are plain pytrees, to be jitted, donated, sharded and checkpointed like any
other; under `jax.jit` over sharded tokens the loads are global already.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import optax

from jaxroute import metrics as metrics_lib
from jaxroute import micro_batches as micro_batches_lib
from jaxroute import types


def init_router_state(
  rule: optax.GradientTransformation,
  num_experts: int,
  num_layers: int = 1,
  histogram: bool = False,
) -> types.RouterState:
  """Zero biases, zero loads and the rule's initial state.

  Args:
    rule: any optax transformation; see `jaxroute.dual`.
    num_experts: E.
    num_layers: Lyr, the layers that have a router.
    histogram: as in `RouterConfig`; `dual.quantile` needs it.

  Returns:
    A `RouterState` with `[Lyr, E]` arrays.

  Raises:
    ValueError: if a size is below 1.

  Example:
    >>> from jaxroute import dual
    >>> init_router_state(dual.sign(1e-3), num_experts=2).load
    Array([[0, 0]], dtype=int32)
  """
  for name, size in (("num_experts", num_experts), ("num_layers", num_layers)):
    if size < 1:
      raise ValueError(
        f"`{name}` must be at least 1, got {size}. Pass that of the model."
      )
  expert_bias = jnp.zeros((num_layers, num_experts), jnp.float32)
  load = jnp.zeros(expert_bias.shape, jnp.int32)
  bins = jnp.zeros((*expert_bias.shape, types.HISTOGRAM_BINS), jnp.int32)
  return types.RouterState(
    expert_bias=expert_bias,
    counts=types.Counts(load=load, histogram=bins if histogram else None),
    rule_state=rule.init(expert_bias),
  )


def accumulate(
  state: types.RouterState, routing: types.Routing | Sequence[types.Routing]
) -> types.RouterState:
  """Adds the counts of a forward pass; call it for every training micro-batch.

  Args:
    state: with `[Lyr, E]` arrays, from `init_router_state`.
    routing: of all layers: a `Routing` whose `load` is `[Lyr, E]` (what a scan
      over layers returns), a sequence of Lyr `Routing`s, or one if Lyr is 1.

  Returns:
    `state` with the counts added; histograms only if it has any. The bias is
    unchanged.

  Raises:
    ValueError: if the counts do not fit the state.
  """
  if isinstance(routing, types.Routing):
    routing = [routing]
  counts = [r.counts for r in routing]
  if state.counts.histogram is None:
    counts = [types.Counts(load=c.load) for c in counts]
  elif any(c.histogram is None for c in counts):
    raise ValueError(
      "`routing` must have a histogram, got None. Set `histogram=True` in the"
      " `RouterConfig`, or leave it out of `init_router_state`."
    )

  def add(total: jax.Array, *layers: jax.Array) -> jax.Array:
    is_stacked = len(layers) == 1 and layers[0].ndim == total.ndim
    found = layers[0] if is_stacked else jnp.stack(layers)
    if found.shape != total.shape:
      raise ValueError(
        f"`routing` must hold counts of shape {total.shape} (layers, experts"
        f" ...), got {found.shape}. Pass the routing of every layer at once."
      )
    return total + found

  return dataclasses.replace(
    state, counts=jax.tree.map(add, state.counts, *counts)
  )


def update(
  state: types.RouterState,
  rule: optax.GradientTransformation,
  apply: jax.typing.ArrayLike = True,
  axis_name: str | Sequence[str] | None = None,
) -> types.RouterState:
  """The dual step: moves all biases by the rule, once per optimizer step.

  The rule gets the violation as the gradient, and as keyword arguments `load`
  and `histogram`.

  Args:
    state: with the load of the step's micro-batches accumulated.
    rule: the transformation that `state.rule_state` belongs to; static.
    apply: `[]` bool. False (a skipped optimizer step, a frozen bias) discards
      the counts and changes nothing else.
    axis_name: mesh axes to sum the counts over first, inside `jax.shard_map`
      where every device counted its own tokens. All layers travel in one
      all-reduce. Under `jax.jit` alone counts are global: leave it None.

  Returns:
    The next `RouterState`, its counts zero.

  Raises:
    ValueError: if bias and counts do not belong together, or the rule needs a
      histogram and there is none.

  Example:
    >>> from jaxroute import dual
    >>> rule = dual.sign(0.5)
    >>> state = init_router_state(rule, num_experts=2)
    >>> counts = types.Counts(load=jnp.array([[3, 1]]))
    >>> state = dataclasses.replace(state, counts=counts)
    >>> update(state, rule).expert_bias
    Array([[-0.5,  0.5]], dtype=float32)
  """
  with jax.named_scope("jaxroute.update"):
    counts = state.counts
    if axis_name is not None:
      counts = _psum(counts, axis_name)
    summed = _like_bias(counts, state.expert_bias)
    updates, rule_state = optax.with_extra_args_support(rule).update(
      jax.tree.map(metrics_lib.violation, summed.load),
      state.rule_state,
      state.expert_bias,
      load=summed.load,
      histogram=summed.histogram,
    )
    expert_bias = optax.apply_updates(state.expert_bias, updates)
    expert_bias, rule_state = optax.tree.where(
      apply, (expert_bias, rule_state), (state.expert_bias, state.rule_state)
    )
    return types.RouterState(
      expert_bias=expert_bias,
      counts=optax.tree.zeros_like(counts),
      rule_state=rule_state,
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
  """All that a training run carries from step to step.

  Attributes:
    step: `[]` int32. Batches seen, skipped ones included.
    params: the model's trainable parameters.
    opt_state: state of the optimizer of `params`.
    router: biases, loads and the rule's state.
  """

  step: jax.Array
  params: types.PyTree
  opt_state: types.PyTree
  router: types.RouterState


def init_train_state(
  params: types.PyTree,
  router: types.RouterState,
  optimizer: optax.GradientTransformation,
) -> TrainState:
  """A `TrainState` at step 0.

  Args:
    params: the model's trainable parameters.
    router: from `init_router_state` or a Flax layer's helper.
    optimizer: the transformation that will update `params`, and only those.

  Returns:
    A `TrainState`.
  """
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=optimizer.init(params),
    router=router,
  )


def train_step(
  state: TrainState,
  batch: types.PyTree,
  *,
  loss_fn: micro_batches_lib.LossFn,
  optimizer: optax.GradientTransformation,
  rule: optax.GradientTransformation,
  micro_batches: int = 1,
  freeze_bias: jax.typing.ArrayLike = False,
  skip: jax.typing.ArrayLike = False,
) -> tuple[TrainState, dict[str, Any]]:
  """One optimizer step and one dual step.

  Gradients are averaged and loads summed over micro-batches that all route with
  the same bias. A step whose loss or gradient is not finite is skipped: params,
  optimizer, bias and rule stay as they were, and the metrics say so.

  Args:
    state: from `init_train_state`; may be donated.
    batch: pytree of arrays whose leading axis is split into micro-batches.
    loss_fn: (static)
      `(params, expert_bias, batch) -> (loss, (counts, metrics))`: the mean loss
      over the batch, the `Counts` of all layers, with loads shaped like
      `expert_bias`, and a dict of scalars to average.
    optimizer: (static) transformation of the gradients of `params`.
    rule: (static) transformation of the load violation; see `jaxroute.dual`.
    micro_batches: (static) parts the batch is processed in, one after the
      other.
    freeze_bias: `[]` bool. True trains the parameters and leaves the bias.
    skip: `[]` bool. True skips the step whatever the gradient.

  Returns:
    The next state, and a dict: the means of `loss_fn`'s metrics, `loss`,
    `grad_norm`, `skipped` (0 or 1), `load` (summed) and what
    `jaxroute.metrics.summary` says of it and of the next bias.

  Raises:
    ValueError: if `micro_batches` does not divide the batch, or the counts do
      not fit the router state.
  """
  (loss, (counts, aux)), grads = micro_batches_lib.accumulated_grad(
    loss_fn, state.params, state.router.expert_bias, batch, micro_batches
  )
  counts = _checked_counts(counts, state.router)
  grad_norm = optax.tree.norm(grads)
  ok = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & ~jnp.asarray(skip)

  updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  params, opt_state = optax.tree.where(
    ok, (params, opt_state), (state.params, state.opt_state)
  )
  counted = dataclasses.replace(
    state.router, counts=jax.tree.map(jnp.add, state.router.counts, counts)
  )
  router = update(counted, rule, apply=ok & ~jnp.asarray(freeze_bias))
  next_state = TrainState(
    step=state.step + 1, params=params, opt_state=opt_state, router=router
  )
  report = dict(aux, loss=loss, grad_norm=grad_norm, load=counts.load)
  report["skipped"] = 1 - ok.astype(jnp.int32)
  summary = metrics_lib.summary(counts.load, router.expert_bias)
  return next_state, report | summary


def eval_step(
  state: TrainState, batch: types.PyTree, *, loss_fn: micro_batches_lib.LossFn
) -> dict[str, Any]:
  """The loss and load of a batch; changes nothing.

  Args:
    state: from `init_train_state` or `train_step`.
    batch: what `loss_fn` takes.
    loss_fn: as in `train_step`.

  Returns:
    A dict: `loss_fn`'s metrics, `loss`, a scalar, and `load`, int32 of the
    shape of the bias, `[Lyr, E]` or a pytree of `[..., E]`. MaxVio_global is
    `max_vio` of the loads summed over all batches.
  """
  loss, (counts, aux) = loss_fn(state.params, state.router.expert_bias, batch)
  counts = _checked_counts(counts, state.router)
  return dict(aux, loss=loss, load=counts.load)


def _checked_counts(
  counts: types.Counts, router: types.RouterState
) -> types.Counts:
  """What a loss function counted, in the tree structure of the state it is for."""
  if not isinstance(counts, types.Counts):
    raise ValueError(
      "`loss_fn` must return (loss, (counts, metrics)) with a `jaxroute.Counts`, got"
      f" a {type(counts).__name__} for the counts. Wrap the loads:"
      " `jaxroute.Counts(load=...)`, or `jaxroute.linen.counts(...)`."
    )
  if router.counts.histogram is None:
    counts = types.Counts(load=counts.load)
  elif counts.histogram is None:
    raise ValueError(
      "`loss_fn` must count a histogram, which the router state has, got None. Set"
      " `histogram=True` in the `RouterConfig`."
    )
  _like_bias(counts, router.expert_bias)
  return jax.tree.unflatten(
    jax.tree.structure(router.counts), jax.tree.leaves(counts)
  )


def _psum(counts: types.Counts, axis_name: str | Sequence[str]) -> types.Counts:
  """Sums the arrays over devices, all of them in one all-reduce."""
  flat, unravel = jax.flatten_util.ravel_pytree(counts)
  return unravel(jax.lax.psum(flat, axis_name))


def _like_bias(counts: types.Counts, expert_bias: types.PyTree) -> types.Counts:
  """`counts` in the tree structure of `expert_bias`, checked leaf by leaf."""
  biases = jax.tree.leaves(expert_bias)
  for x in biases:
    if x.dtype != jnp.float32:
      raise ValueError(
        f"`expert_bias` must be float32, got {x.dtype}. Leave it out of casts"
        " of the model."
      )
  shapes = [x.shape for x in biases]
  load = _in_structure("load", counts.load, shapes, expert_bias)
  histogram = counts.histogram
  if histogram is not None:
    shapes = [(*shape, types.HISTOGRAM_BINS) for shape in shapes]
    histogram = _in_structure("histogram", histogram, shapes, expert_bias)
  return types.Counts(load=load, histogram=histogram)


def _in_structure(
  name: str,
  tree: types.PyTree,
  shapes: Sequence[tuple[Any, ...]],
  like: types.PyTree,
) -> types.PyTree:
  """The arrays of `tree`, of these shapes, in the structure of another tree."""
  arrays = jax.tree.leaves(tree)
  found = [x.shape for x in arrays]
  if found != shapes:
    raise ValueError(
      f"`{name}` must hold an array for each of `expert_bias`, of the shapes"
      f" {shapes}, got {found}."
    )
  return jax.tree.unflatten(jax.tree.structure(like), arrays)
