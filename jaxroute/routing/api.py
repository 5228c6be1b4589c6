# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing with a selection bias: arguments, checks, and who does it.

The primal step of auxiliary-loss-free balancing: every token takes the K
experts with the largest score + bias, and is weighted by the scores alone.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from jaxroute import ladder, types
from jaxroute.parallel import mesh
from jaxroute.routing import pallas_tpu, projection, xla

Implementation = Literal["xla", "pallas_tpu"]


def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> types.Routing:
  """Chooses K experts per token and weighs them; counts what was chosen.

  Experts are chosen by `scores + expert_bias` (ties: the lowest index),
  weighted by their unbiased scores. Gradients flow to `logits` through the
  weights only; the bias gets none. A NaN logit never beats a finite one; a
  token that has to choose one gets NaN weights and is left out of `load`.

  Args:
    logits: `[T, E]` floating point. Router projection output; -inf masks an
      expert.
    expert_bias: `[E]` float32. The dual variable, or None for no bias.
    config: what to compute; static.
    token_mask: `[T]` bool. False marks padding: weight 0, not counted.
    implementation: "pallas_tpu", "xla", or None for the first of them that can
      do this here. "pallas_tpu" is a kernel for v5e, v5p and newer, which XLA
      does not partition: call it on one device, under explicit sharding, by
      `jaxroute.layer.router` with a partition, or inside `jax.shard_map`. Without
      a name the kernel is taken only if the program is for such a TPU: that of
      the mesh in force (`jax.sharding.use_abstract_mesh`), or else the default
      device, if it is the only one. With a name it is traced anywhere, so that
      it can be compiled for a TPU elsewhere.
    interpret: whether a kernel is interpreted, on any device: False, True, or
      `pltpu.InterpretParams` for the TPU simulator.

  Returns:
    A `Routing`; on T = 0 its arrays are empty and `load` is zero.

  Raises:
    ValueError: if a shape or dtype does not fit `config`.
    NotImplementedError: if `implementation` cannot do this; "xla" always can.
      The error says why, and what to do. A kernel that was asked for by name
      raises it where its program is compiled for another platform.

  Example:
    >>> config = types.RouterConfig(num_experts=4, top_k=2)
    >>> logits = jnp.array([[0.0, 2.0, 1.0, -1.0]])
    >>> route(logits, jnp.zeros(4), config).expert_idx
    Array([[1, 2]], dtype=int32)
    >>> bias = jnp.array([0.0, 0.0, 0.0, 1.0])
    >>> route(logits, bias, config).expert_idx
    Array([[3, 1]], dtype=int32)

  References:
    Wang et al., 2024, https://arxiv.org/abs/2408.15664, section 3.
    DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 12 to 16.
  """
  check_inputs(logits, expert_bias, config, token_mask)
  # A token chooses among all experts.
  logits = mesh.whole(logits, 1)
  operands = logits, expert_bias, config, token_mask
  by_name = implementation is not None

  def by_xla():
    ladder.refuse_to_interpret(interpret)
    return xla.route(*operands)

  def by_pallas_tpu():
    return pallas_tpu.route(*operands, by_name=by_name, interpret=interpret)

  with jax.named_scope("jaxroute.route"):
    return ladder.climb(
      "route", {"pallas_tpu": by_pallas_tpu, "xla": by_xla}, implementation
    )


def project_and_route(
  tokens: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: Implementation | None = None,
  interpret: Any = False,
) -> types.Routing:
  """`route` of `project`, in one kernel where there is one.

  The kernel does not write logits to memory: it works on the logits of one
  block while it projects the next, in float32 as `project` does, except for the
  order of the sums. It is for TPU v6e and newer, bfloat16 tokens whose width is
  a multiple of 128, projections that fit its memory, and scores other than a
  softmax over all experts. One block is projected twice, so it is for many
  thousand tokens.

  Args:
    tokens: `[T, D]` floating point.
    router_weight: `[D, E]`. The router projection.
    expert_bias: as in `route`.
    config: what to compute; static.
    token_mask: as in `route`.
    implementation: as in `route`. None and "pallas_tpu" take one kernel for
      both where it can do this; else None takes `project` and then the best
      `route`.
    interpret: as in `route`.

  Returns:
    A `Routing`. Gradients flow through the weights to `tokens` and
    `router_weight`.

  Raises:
    ValueError: as `route`.
    NotImplementedError: as `route`.
  """
  check_router_weight(router_weight, tokens.shape[1], config)
  logits = jax.ShapeDtypeStruct(
    (len(tokens), router_weight.shape[1]), jnp.float32
  )
  check_inputs(logits, expert_bias, config, token_mask)
  tokens, router_weight = mesh.whole(tokens, 1), mesh.whole(router_weight)

  def by_xla():
    if implementation is not None:
      ladder.refuse_to_interpret(interpret)
    logits = projection.project(tokens, router_weight, token_mask)
    return route(
      logits, expert_bias, config, token_mask, implementation, interpret
    )

  def by_pallas_tpu():
    with jax.named_scope("jaxroute.route"):
      return pallas_tpu.project_and_route(
        tokens,
        router_weight,
        expert_bias,
        config,
        token_mask,
        by_name=implementation is not None,
        interpret=interpret,
      )

  return ladder.climb(
    "project_and_route",
    {"pallas_tpu": by_pallas_tpu, "xla": by_xla},
    implementation,
  )


def check_inputs(
  logits: jax.Array | jax.ShapeDtypeStruct,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
) -> None:
  """Raises ValueError unless the arguments of `route` fit together.

  Args:
    logits: `[T, E]` floating point, or an abstract array.
    expert_bias: `[E]` float32, or None.
    config: what E has to be that of.
    token_mask: `[T]` bool, or None.
  """
  if logits.ndim != 2 or logits.shape[1] != config.num_experts:
    raise ValueError(
      f"`logits` must be [T, E={config.num_experts}], got shape"
      f" {logits.shape}. Flatten batch and sequence into T."
    )
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(
      f"`logits` must be floating point, got {logits.dtype}. Pass the router"
      " projection's output, not indices."
    )
  if expert_bias is not None:
    if expert_bias.shape != (config.num_experts,):
      raise ValueError(
        f"`expert_bias` must be [E={config.num_experts}], got shape"
        f" {expert_bias.shape}. Pass the row of one layer."
      )
    if expert_bias.dtype != jnp.float32:
      raise ValueError(
        f"`expert_bias` must be float32, got {expert_bias.dtype}. Leave it out"
        " of casts of the model: lower precision changes which experts win."
      )
  if token_mask is not None:
    if token_mask.shape != logits.shape[:1] or token_mask.dtype != jnp.bool_:
      raise ValueError(
        f"`token_mask` must be bool [T={logits.shape[0]}], got"
        f" {token_mask.dtype} {token_mask.shape}. True marks real tokens."
      )


def check_router_weight(
  router_weight: jax.Array, width: int, config: types.RouterConfig
) -> None:
  """Raises ValueError unless a projection takes D to E.

  Args:
    router_weight: `[D, E]`. The router projection.
    width: D, of the tokens.
    config: what E has to be that of.
  """
  if router_weight.shape != (width, config.num_experts):
    raise ValueError(
      f"`router_weight` must be [D={width}, E={config.num_experts}], got shape"
      f" {router_weight.shape}. Its rows are the features of a token."
    )
