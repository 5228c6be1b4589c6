# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Flax nnx layers: a router, and a Mixture-of-Experts FFN around it.

The bias and the counts are variables of their own types, `ExpertBias`, `Load`
and, where the `RouterConfig` has histograms, `Histogram`:
`nnx.Optimizer(model, tx, wrt=nnx.Param)` and casts of `nnx.Param` pass them by.
A forward pass only reads the bias; it counts unless `model.eval()` was called.

    rule_state = jaxroute.nnx.init_rule_state(model, rule)
    ...                                                   # forward, backward
    rule_state = jaxroute.nnx.update(model, rule, rule_state)

Arguments and numbers are as in `jaxroute.linen`. nnx makes its parameters at
once, so it also needs `in_features` and `rngs`, and the model itself holds
biases and counts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxroute import checks, experts, layer, routing, step, types

Initializer = jax.nn.initializers.Initializer


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


class Router(nnx.Module):
  """Projects tokens to logits and routes them.

  Args:
    config: what to compute.
    in_features: D.
    kernel_init: initializer of the projection.
    implementation: as in `jaxroute.route`.
    fuse_projection: as in `jaxroute.layer.router`; there are no logits then.
    rngs: source of the parameter key.
  """

  def __init__(
    self,
    config: types.RouterConfig,
    *,
    in_features: int,
    kernel_init: Initializer = nnx.initializers.lecun_normal(),
    implementation: routing.Implementation | None = None,
    fuse_projection: bool = False,
    rngs: nnx.Rngs,
  ):
    layer.check_layer(
      config, {"kernel_init": kernel_init}, {"in_features": in_features}
    )
    checks.check_instance("rngs", rngs, nnx.Rngs, "Pass nnx.Rngs(seed).")
    e = config.num_experts
    self.config = config
    self.implementation = implementation
    self.fuse_projection = fuse_projection
    # Set by model.train() and model.eval(), as for dropout.
    self.deterministic = False
    self.kernel = nnx.Param(
      kernel_init(rngs.params(), (in_features, e), jnp.float32)
    )
    self.expert_bias = ExpertBias(jnp.zeros((e,), jnp.float32))
    self.load = Load(jnp.zeros((e,), jnp.int32))
    if config.histogram:
      self.histogram = Histogram(
        jnp.zeros((e, types.HISTOGRAM_BINS), jnp.int32)
      )

  def __call__(
    self, x: jax.Array, token_mask: jax.Array | None = None
  ) -> tuple[types.Routing, jax.Array | None]:
    """Routes tokens.

    Args:
      x: `[..., D]`. The leading axes are flattened into T.
      token_mask: bool, shaped like the leading axes. False marks padding.

    Returns:
      The `Routing` of the T tokens and their logits, `[T, E]` float32, or None.
    """
    routes, logits = layer.router(
      x,
      self.kernel[...],
      self.expert_bias[...],
      self.config,
      token_mask,
      self.implementation,
      self.fuse_projection,
    )
    if not self.deterministic:
      self.load[...] += routes.counts.load
      if routes.counts.histogram is not None:
        self.histogram[...] += routes.counts.histogram
    return routes, logits


class MoE(nnx.Module):
  """A sparse SwiGLU feed-forward layer, with optional shared experts.

  Args:
    config: what the router computes.
    in_features: D.
    hidden_size: F, the width of one routed expert.
    shared_hidden_size: S, the joint width of the shared experts; 0 for none.
    capacity_factor: each expert keeps the first `ceil(factor * T * K / E)`
      assignments and drops the rest; None drops nothing.
    dtype: of the expert computation; None for that of the input. Routing is
      float32 whatever this is.
    param_dtype: of the expert parameters.
    kernel_init: initializer of the router's projection.
    expert_init: initializer of the `[E, ...]` parameters.
    shared_init: initializer of the shared experts' parameters.
    partition: how tokens and experts are laid out on the mesh; None for one
      device, or to leave it to the compiler.
    implementation: as in `jaxroute.route`.
    fuse_projection: as in `jaxroute.layer.router`; there are no logits then.
    rngs: source of the parameter keys.
  """

  def __init__(
    self,
    config: types.RouterConfig,
    *,
    in_features: int,
    hidden_size: int,
    shared_hidden_size: int = 0,
    capacity_factor: float | None = None,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    kernel_init: Initializer = nnx.initializers.lecun_normal(),
    expert_init: Initializer = nnx.initializers.lecun_normal(batch_axis=(0,)),
    shared_init: Initializer = nnx.initializers.lecun_normal(),
    partition: types.Partition | None = None,
    implementation: routing.Implementation | None = None,
    fuse_projection: bool = False,
    rngs: nnx.Rngs,
  ):
    sizes = dict(
      in_features=in_features,
      hidden_size=hidden_size,
      shared_hidden_size=shared_hidden_size,
    )
    inits = dict(expert_init=expert_init, shared_init=shared_init)
    layer.check_layer(config, inits, sizes, param_dtype)
    self.config = config
    self.capacity_factor = capacity_factor
    self.dtype = dtype
    self.partition = partition
    self.router = Router(
      config,
      in_features=in_features,
      kernel_init=kernel_init,
      implementation=implementation,
      fuse_projection=fuse_projection,
      rngs=rngs,
    )
    e, d, f, s = (
      config.num_experts,
      in_features,
      hidden_size,
      shared_hidden_size,
    )

    def param(init: Initializer, shape: tuple[int, ...]) -> nnx.Param:
      return nnx.Param(init(rngs.params(), shape, param_dtype))

    self.w_gate = param(expert_init, (e, d, f))
    self.w_up = param(expert_init, (e, d, f))
    self.w_down = param(expert_init, (e, f, d))
    self.has_shared = s > 0
    if self.has_shared:
      self.shared_gate = param(shared_init, (d, s))
      self.shared_up = param(shared_init, (d, s))
      self.shared_down = param(shared_init, (s, d))

  def __call__(
    self, x: jax.Array, token_mask: jax.Array | None = None
  ) -> tuple[jax.Array, types.MoEOutput]:
    """Applies the layer.

    Args:
      x: `[..., D]`. The leading axes are flattened into T for routing.
      token_mask: bool, shaped like the leading axes. False marks padding: the
        output is 0 there and nothing is counted.

    Returns:
      `[..., D]`, the dtype of the computation, and what the router did.
    """
    routes, logits = self.router(x, token_mask)
    params = experts.ExpertParams(
      w_gate=self.w_gate[...], w_up=self.w_up[...], w_down=self.w_down[...]
    )
    shared = None
    if self.has_shared:
      shared = experts.ExpertParams(
        w_gate=self.shared_gate[...],
        w_up=self.shared_up[...],
        w_down=self.shared_down[...],
      )
    out, group_sizes = layer.moe(
      x,
      routes,
      params,
      shared,
      config=self.config,
      capacity_factor=self.capacity_factor,
      dtype=self.dtype,
      partition=self.partition,
    )
    return out, types.MoEOutput(
      routing=routes, logits=logits, group_sizes=group_sizes
    )


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
  return rule.init(router_state(model, None).expert_bias)


def update(
  model: nnx.Module,
  rule: optax.GradientTransformation,
  rule_state: types.PyTree,
  apply: jax.typing.ArrayLike = True,
) -> types.PyTree:
  """`jaxroute.update`, in place: moves the biases and zeroes the counts.

  Args:
    model: whose forward passes counted since the last update.
    rule: any optax transformation; see `jaxroute.dual`.
    rule_state: from `init_rule_state` or the last call.
    apply: `[]` bool. False discards the counts and changes nothing else.

  Returns:
    The next `rule_state`.
  """
  state = step.update(router_state(model, rule_state), rule, apply)
  for kind, values in (
    (ExpertBias, state.expert_bias),
    (Load, state.counts.load),
    (Histogram, state.counts.histogram or {}),
  ):
    variables = nnx.state(model, kind)
    nnx.replace_by_pure_dict(variables, values)
    nnx.update(model, variables)
  return state.rule_state
