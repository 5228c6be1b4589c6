# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The dual step: count loads, move the bias.

The bias moves in `update` and nowhere else: once per optimizer step, by the
load that `accumulate` summed over the micro-batches of that step. All states
are plain pytrees, to be jitted, donated, sharded and checkpointed like any
other; under `jax.jit` over sharded tokens the loads are global already.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxroute import checks, types
from jaxroute import counts as counts_lib
from jaxroute import metrics as metrics_lib
from jaxroute.parallel import mesh

Layer = types.Routing | types.MoEOutput | types.Counts


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
    A `RouterState` with `[Lyr, E]` arrays. That of a linen model is made by
    `jaxroute.linen.init_router_state(variables, rule)`.

  Raises:
    ValueError: if `rule` is no optax transformation, or a size is no int or below 1.

  Example:
    >>> from jaxroute import dual
    >>> init_router_state(dual.sign(1e-3), num_experts=2).load
    Array([[0, 0]], dtype=int32)
  """
  checks.check_transformation("rule", rule)
  for name, size in (("num_experts", num_experts), ("num_layers", num_layers)):
    checks.as_int(name, size, "Pass that of the model.")
  histogram = checks.as_bool("histogram", histogram, "Pass `config.histogram`.")
  expert_bias = jnp.zeros((num_layers, num_experts), jnp.float32)
  load = jnp.zeros(expert_bias.shape, jnp.int32)
  bins = jnp.zeros((*expert_bias.shape, types.HISTOGRAM_BINS), jnp.int32)
  return types.RouterState(
    expert_bias=expert_bias,
    counts=types.Counts(load=load, histogram=bins if histogram else None),
    rule_state=rule.init(expert_bias),
  )


def accumulate(
  state: types.RouterState,
  routing: Layer | Sequence[Layer],
) -> types.RouterState:
  """Adds the counts of a forward pass; call it for every training micro-batch.

  Args:
    state: of all layers, from `init_router_state` here or of `jaxroute.linen`.
    routing: of all layers: what `route` or a layer returned, with a load of
      `[Lyr, E]` (what a scan over layers returns), a list of Lyr such, or one if
      Lyr is 1; or `Counts` in the structure of the state's, which
      `jaxroute.linen.counts` makes for a linen model.

  Returns:
    `state` with the counts added; histograms only if it has any. The bias is
    unchanged.

  Raises:
    ValueError: if the counts do not fit the state.
  """
  check_state("state", state)
  counts = counts_lib.of_layers(routing, state.counts)
  return dataclasses.replace(
    state, counts=jax.tree.map(jnp.add, state.counts, counts)
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
    ValueError: if biases, counts and the rule's state do not belong together, or
      the rule needs a histogram and there is none.

  Example:
    >>> from jaxroute import dual
    >>> rule = dual.sign(0.5)
    >>> state = init_router_state(rule, num_experts=2)
    >>> counts = types.Counts(load=jnp.array([[3, 1]]))
    >>> state = dataclasses.replace(state, counts=counts)
    >>> update(state, rule).expert_bias
    Array([[-0.5,  0.5]], dtype=float32)
  """
  check_state("state", state)
  checks.check_transformation("rule", rule)
  checks.check_flag("apply", apply, "It holds for all layers.")
  with jax.named_scope("jaxroute.update"):
    _check_rule_state(state, rule)
    counts = state.counts
    if axis_name is not None:
      counts = mesh.sum_together(counts, axis_name)
    summed = counts_lib.like_bias(counts, state.expert_bias)
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


def check_state(name: str, state: Any) -> None:
  """Checks that an argument is a `RouterState`.

  Args:
    name: of the argument.
    state: the argument.

  Raises:
    ValueError: if it is something else.
  """
  if not isinstance(state, types.RouterState):
    fix = "Pass what `init_router_state` returned."
    if hasattr(state, "router"):
      fix = "Pass `state.router`."
    raise ValueError(
      f"`{name}` must be a `RouterState`, got {checks.describe(state)}. {fix}"
    )


def _check_rule_state(
  state: types.RouterState, rule: optax.GradientTransformation
) -> None:
  expected, found = (
    jax.tree.map(jnp.shape, tree)
    for tree in (
      jax.eval_shape(rule.init, state.expert_bias),
      state.rule_state,
    )
  )
  if jax.tree.flatten(expected) != jax.tree.flatten(found):
    raise ValueError(
      "`state.rule_state` must be like `rule.init(state.expert_bias)`, of the shapes"
      f" {expected}, got {found}. To change the rule and keep the biases:"
      " `dataclasses.replace(state, rule_state=rule.init(state.expert_bias))`."
    )
