# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Flax nnx layers: a router, and a Mixture-of-Experts FFN around it.

The bias and the counts are variables of their own types, `ExpertBias`, `Load`
and, where the `RouterConfig` has histograms, `Histogram`:
`nnx.Optimizer(model, tx, wrt=nnx.Param)` and casts of `nnx.Param` do not touch
them.
A forward pass only reads the bias; it counts unless `model.eval()` was called.

    rule_state = jaxroute.nnx.init_rule_state(model, rule)
    ...
    rule_state, metrics = jaxroute.nnx.train_step(
        model, optimizer, rule_state, batch, loss_fn=loss_fn, rule=rule)

With a step of your own, call `update` after the forward and backward pass:

    rule_state = jaxroute.nnx.update(model, rule, rule_state)

Arguments and numbers are as in `jaxroute.linen`. nnx makes its parameters at
once, so it also needs `in_features` and `rngs`, and the model itself holds
biases and counts.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxroute import checks, experts, layer, routing, types
from jaxroute.nnx_step import (
  ExpertBias,
  Histogram,
  Load,
  init_rule_state,
  router_state,
  train_step,
  update,
)
from jaxroute.parallel import placement

__all__ = [
  "ExpertBias",
  "Histogram",
  "Load",
  "MoE",
  "Router",
  "init_rule_state",
  "router_state",
  "train_step",
  "update",
]

Initializer = jax.nn.initializers.Initializer


class Router(nnx.Module):
  """Projects tokens to logits and routes them.

  Args:
    config: what to compute.
    in_features: D.
    kernel_init: initializer of the projection.
    implementation: as in `jaxroute.route`.
    fuse_projection: as in `jaxroute.layer.router`; there are no logits then.
    partition: as in `jaxroute.layer.router`.
    logical_axes: whether the projection carries the names of its axes, ("embed",
      None), for Flax's rules, as `out_sharding`.
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
    partition: types.Partition | None = None,
    logical_axes: bool = False,
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
    self.partition = partition
    # Set by model.train() and model.eval(), as for dropout.
    self.deterministic = False
    kernel = kernel_init(rngs.params(), (in_features, e), jnp.float32)
    self.kernel = _param("kernel", kernel, logical_axes)
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
    x, kernel = checks.as_jax(x), self.kernel[...]
    layer.check_tokens(x)
    if x.shape[-1] != kernel.shape[0]:
      raise ValueError(
        f"`x` must have D = `in_features` = {kernel.shape[0]}, got"
        f" {checks.describe(x)}. Pass `in_features` of the model."
      )
    routes, logits = layer.router(
      x,
      kernel,
      self.expert_bias[...],
      self.config,
      token_mask,
      self.implementation,
      self.fuse_projection,
      self.partition,
    )
    if not self.deterministic:
      self.load[...] += routes.counts.load
      if routes.counts.histogram is not None:
        self.histogram[...] += routes.counts.histogram
    return routes, logits

  def set_view(self, deterministic: bool | None = None) -> None:
    """Sets what `nnx.view` is told.

    Args:
      deterministic: whether forward passes count nothing, as in evaluation; None
        leaves it as it is.
    """
    if deterministic is not None:
      self.deterministic = deterministic


def _param(name: str, value: jax.Array, logical_axes: bool) -> nnx.Param:
  """A parameter, with the names of its axes if asked for."""
  fix = "True names the axes of parameters."
  if not checks.as_bool("logical_axes", logical_axes, fix):
    return nnx.Param(value)
  return nnx.Param(value, out_sharding=placement.LOGICAL_AXES[name])


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
    partition: as in `jaxroute.layer.moe`.
    implementation: as in `jaxroute.route`.
    experts_implementation: as in `jaxroute.layer.moe`.
    fuse_projection: as in `jaxroute.layer.router`; there are no logits then.
    logical_axes: whether parameters carry the names of their axes, for Flax's
      rules, as `out_sharding`: those of `jaxroute.linen.MoE`. Flax then shards
      them as they are made, on the mesh in force, unless told not to
      (`nnx.use_eager_sharding(False)`).
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
    experts_implementation: experts.Implementation | None = None,
    fuse_projection: bool = False,
    logical_axes: bool = False,
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
    self.experts_implementation = experts_implementation
    self.router = Router(
      config,
      in_features=in_features,
      kernel_init=kernel_init,
      implementation=implementation,
      fuse_projection=fuse_projection,
      partition=partition,
      logical_axes=logical_axes,
      rngs=rngs,
    )
    e, d, f, s = (
      config.num_experts,
      in_features,
      hidden_size,
      shared_hidden_size,
    )

    def param(
      name: str, init: Initializer, shape: tuple[int, ...]
    ) -> nnx.Param:
      value = init(rngs.params(), shape, param_dtype)
      return _param(name, value, logical_axes)

    self.w_gate = param("w_gate", expert_init, (e, d, f))
    self.w_up = param("w_up", expert_init, (e, d, f))
    self.w_down = param("w_down", expert_init, (e, f, d))
    self.has_shared = s > 0
    if self.has_shared:
      self.shared_gate = param("shared_gate", shared_init, (d, s))
      self.shared_up = param("shared_up", shared_init, (d, s))
      self.shared_down = param("shared_down", shared_init, (s, d))

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
      experts_implementation=self.experts_implementation,
    )
    return out, types.MoEOutput(
      routing=routes, logits=logits, group_sizes=group_sizes
    )
