# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Flax linen layers: a router, and a Mixture-of-Experts FFN around it.

The bias and the load live in collections of their own, "expert_bias" and
"load", out of reach of optimizers, weight decay and casts of "params". A
forward pass only reads the bias. It counts when the caller makes "load"
mutable, as with BatchNorm's statistics; initialisation never counts. A third
collection, "histogram", is there if the `RouterConfig` has histograms, and is
made mutable like "load". Where tokens are sharded, "load_parts" and
"histogram_parts" have what each shard counted in this call, `[..., S, E]`, of which
`counts` makes one sum for all layers:

    variables = model.init(key, x)
    state = jaxroute.linen.init_router_state(variables, rule)
    ...
    (y, _), counted = model.apply(
        {"params": params, "expert_bias": state.expert_bias}, x,
        mutable=jaxroute.linen.COUNTED)
    state = dataclasses.replace(state, counts=jaxroute.linen.counts(counted))
    state = jaxroute.update(state, rule)

Once this module is imported, `flax.serialization` saves and restores a
`jaxroute.TrainState` and what it holds.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import serialization

from jaxroute import checks, experts, layer, routing, train, types
from jaxroute import counts as counts_lib
from jaxroute.parallel import placement

Initializer = jax.nn.initializers.Initializer

COUNTED = ("load", "histogram", "load_parts", "histogram_parts")
"""The collections that a training forward pass makes mutable, if it has them."""


class Router(nn.Module):
  """Projects tokens to logits and routes them.

  Parameter "kernel" `[D, E]`; variables "expert_bias" `[E]` float32 and "load"
  `[E]` int32, each in the collection of its name, and with
  `config.histogram` "histogram" `[E, 16]` int32.

  Attributes:
    config: what to compute.
    kernel_init: initializer of the projection.
    implementation: as in `jaxroute.route`.
    fuse_projection: as in `jaxroute.layer.router`; there are no logits then.
    partition: as in `jaxroute.layer.router`.
    logical_axes: whether the projection is boxed with the names of its axes,
      ("embed", None), for Flax's rules: an `nn.LogicallyPartitioned`.
  """

  config: types.RouterConfig
  _: dataclasses.KW_ONLY
  kernel_init: Initializer = nn.initializers.lecun_normal()
  implementation: routing.Implementation | None = None
  fuse_projection: bool = False
  partition: types.Partition | None = None
  logical_axes: bool = False

  @nn.compact
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
    layer.check_tokens(x)
    layer.check_layer(self.config, {"kernel_init": self.kernel_init}, {})
    e = self.config.num_experts
    init = _named("kernel", self.kernel_init, self.logical_axes)
    kernel = self.param("kernel", init, (x.shape[-1], e), jnp.float32)
    routes, logits = layer.router(
      x,
      kernel,
      self._expert_bias(),
      self.config,
      token_mask,
      self.implementation,
      self.fuse_projection,
      self.partition,
    )
    counts = routes.counts
    parts = counts.parts or types.Parts(load=None)
    self._count("load", counts.load, parts.load)
    if counts.histogram is not None:
      self._count("histogram", counts.histogram, parts.histogram)
    return routes, logits

  def _expert_bias(self) -> jax.Array:
    """The variable, made at initialisation."""
    name = "expert_bias"
    if not (self.has_variable(name, name) or self.is_mutable_collection(name)):
      raise ValueError(
        "A router must find its bias in the collection 'expert_bias', got"
        f" variables without. Pass {{'params': params, '{name}':"
        " state.expert_bias}, and name it and `jaxroute.linen.COUNTED` among the"
        " `variable_axes` of an `nn.scan` or `nn.vmap` around the layer."
      )
    shape = (self.config.num_experts,)
    return self.variable(name, name, jnp.zeros, shape, jnp.float32).value

  def _count(
    self, name: str, counts: jax.Array, parts: jax.Array | None
  ) -> None:
    """Adds to the variable, if the caller lets it change."""
    if not self.is_mutable_collection(name):
      return
    is_first = not self.has_variable(name, name)
    total = self.variable(name, name, jnp.zeros, counts.shape, jnp.int32)
    if self.is_initializing():
      return
    total.value += counts
    apart = f"{name}_parts"
    if parts is None or not self.is_mutable_collection(apart):
      return
    if is_first:
      self.put_variable(apart, name, parts)
    elif self.has_variable(apart, name):
      # The caller may have set the total anew since.
      self.put_variable(apart, name, None)


class MoE(nn.Module):
  """A sparse SwiGLU feed-forward layer, with optional shared experts.

  Parameters "router/kernel" `[D, E]`, "w_gate" and "w_up" `[E, D, F]`, "w_down"
  `[E, F, D]` and, for shared experts of joint width S, "shared_gate",
  "shared_up" `[D, S]`, "shared_down" `[S, D]`.

  Attributes:
    config: what the router computes.
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
    logical_axes: whether parameters are boxed with the names of their axes, for
      Flax's rules: as `nn.LogicallyPartitioned`, "w_gate" and "w_up" of ("expert",
      "embed", "mlp"), "w_down" of ("expert", "mlp", "embed"), shared experts alike
      without "expert", and the router's projection of ("embed", None).
  """

  config: types.RouterConfig
  _: dataclasses.KW_ONLY
  hidden_size: int
  shared_hidden_size: int = 0
  capacity_factor: float | None = None
  dtype: Any = None
  param_dtype: Any = jnp.float32
  kernel_init: Initializer = nn.initializers.lecun_normal()
  expert_init: Initializer = nn.initializers.lecun_normal(batch_axis=(0,))
  shared_init: Initializer = nn.initializers.lecun_normal()
  partition: types.Partition | None = None
  implementation: routing.Implementation | None = None
  experts_implementation: experts.Implementation | None = None
  fuse_projection: bool = False
  logical_axes: bool = False

  @nn.compact
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
    sizes = dict(
      hidden_size=self.hidden_size, shared_hidden_size=self.shared_hidden_size
    )
    inits = dict(expert_init=self.expert_init, shared_init=self.shared_init)
    layer.check_layer(self.config, inits, sizes, self.param_dtype)
    routes, logits = Router(
      self.config,
      kernel_init=self.kernel_init,
      implementation=self.implementation,
      fuse_projection=self.fuse_projection,
      partition=self.partition,
      logical_axes=self.logical_axes,
      name="router",
    )(x, token_mask)
    e, d, f = self.config.num_experts, x.shape[-1], self.hidden_size

    def param(
      name: str, init: Initializer, shape: tuple[int, ...]
    ) -> jax.Array:
      init = _named(name, init, self.logical_axes)
      return self.param(name, init, shape, self.param_dtype)

    params = experts.ExpertParams(
      w_gate=param("w_gate", self.expert_init, (e, d, f)),
      w_up=param("w_up", self.expert_init, (e, d, f)),
      w_down=param("w_down", self.expert_init, (e, f, d)),
    )
    shared = None
    if s := self.shared_hidden_size:
      shared = experts.ExpertParams(
        w_gate=param("shared_gate", self.shared_init, (d, s)),
        w_up=param("shared_up", self.shared_init, (d, s)),
        w_down=param("shared_down", self.shared_init, (s, d)),
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


def _named(name: str, init: Initializer, logical_axes: bool) -> Any:
  """An initializer of a parameter in a box that names its axes, if asked for."""
  fix = "True boxes the parameters."
  if not checks.as_bool("logical_axes", logical_axes, fix):
    return init
  axes = placement.LOGICAL_AXES[name]
  return nn.with_logical_partitioning(init, axes)


def init_router_state(
  variables: Mapping[str, Any], rule: optax.GradientTransformation
) -> types.RouterState:
  """The `RouterState` of a linen model, for `jaxroute.update`.

  Args:
    variables: what `model.init` returned, or a restored copy.
    rule: any optax transformation; see `jaxroute.dual`.

  Returns:
    A `RouterState` with the collections "expert_bias" and, as `counts`, "load"
    and "histogram": pytrees of `[..., E]`, of the last `[..., E, 16]`.

  Raises:
    ValueError: if the model has no router, one of its routers lacks a
      collection, or `rule` is no optax transformation.
  """
  if not isinstance(variables, Mapping):
    raise ValueError(
      "`variables` must be what `model.init` returned, got"
      f" {checks.describe(variables)}. For a model without collections:"
      " `jaxroute.init_router_state(rule, num_experts, num_layers)`."
    )
  checks.check_transformation("rule", rule)
  missing = {"expert_bias", "load"} - set(variables)
  if missing:
    raise ValueError(
      f"`variables` must hold the collections 'expert_bias' and 'load', got"
      f" {sorted(variables)}. Pass all that `model.init` returned, and name both"
      " among the `variable_axes` of an `nn.scan` or `nn.vmap`."
    )
  found = counts(variables)
  counts_lib.like_bias(found, variables["expert_bias"])
  return types.RouterState(
    expert_bias=variables["expert_bias"],
    counts=found,
    rule_state=rule.init(variables["expert_bias"]),
  )


def counts(collections: Mapping[str, Any]) -> types.Counts:
  """What a model counted.

  Args:
    collections: what `model.apply(..., mutable=COUNTED)` returned beside the
      output.

  Returns:
    `Counts` of the collections "load" and, if there is one, "histogram".

  Raises:
    ValueError: if nothing was counted.
  """
  is_mapping = isinstance(collections, Mapping)
  if not is_mapping or "load" not in collections:
    found = sorted(collections) if is_mapping else checks.describe(collections)
    raise ValueError(
      f"`collections` must hold 'load', got {found}. Pass what"
      " `model.apply(..., mutable=jaxroute.linen.COUNTED)` returned; under an `nn.scan`"
      " or `nn.vmap`, name `COUNTED` among its `variable_axes`."
    )
  found = types.Counts(
    load=collections["load"], histogram=collections.get("histogram")
  )
  parts = types.Parts(
    load=collections.get("load_parts"),
    histogram=collections.get("histogram_parts"),
  )
  return counts_lib.of_parts(parts, found)


def _fields(x: Any) -> dict[str, Any]:
  """The state dict of a dataclass, for `flax.serialization.to_state_dict`."""
  return {
    field.name: serialization.to_state_dict(getattr(x, field.name))
    for field in dataclasses.fields(x)
  }


def _restore(x: Any, state: dict[str, Any]) -> Any:
  """A dataclass with the fields of a state dict, for `from_state_dict`.

  Raises:
    ValueError: if the fields, or those that are None, are not those of `x`.
  """
  wanted = {
    field.name: getattr(x, field.name) for field in dataclasses.fields(x)
  }
  where = f"a {type(x).__name__} at {serialization.current_path()}"
  if state.keys() != wanted.keys():
    raise ValueError(
      f"The state dict of {where} must have the fields {list(wanted)}, got"
      f" {list(state)}: it lacks {sorted(wanted.keys() - state.keys())}. Save and"
      " restore by the same version of jaxroute."
    )
  for name, value in wanted.items():
    if (value is None) != (state[name] is None):
      expected = "None" if value is None else "a value"
      raise ValueError(
        f"`{name}` of {where} must be {expected}, as in what is restored into, got"
        f" {'None' if state[name] is None else 'a value'}. Initialise the state as"
        " it was when it was saved."
      )
  restored = {
    name: serialization.from_state_dict(value, state[name], name=name)
    for name, value in wanted.items()
  }
  return dataclasses.replace(x, **restored)


for _saved in (
  train.TrainState,
  types.RouterState,
  types.Counts,
  types.Routing,
  types.MoEOutput,
  experts.ExpertParams,
):
  serialization.register_serialization_state(_saved, _fields, _restore)
