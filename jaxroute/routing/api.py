# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing with a selection bias: arguments, checks, and who does it.

The primal step of auxiliary-loss-free balancing: every token takes the K
experts with the largest score + bias, and is weighted by the scores alone.
"""

from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp

from jaxroute import checks, ladder, types
from jaxroute.parallel import mesh
from jaxroute.routing import pallas_gpu, pallas_tpu, projection, xla

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: Implementation | None = None,
  interpret: Any = False,
  with_rank: bool = False,
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
    implementation: "pallas_tpu", "pallas_gpu", "xla", or None for the first of
      them that can do this here. "pallas_tpu" is a kernel for v5e, v5p and newer,
      "pallas_gpu" one for NVIDIA's Hopper and Blackwell (H100, B200), with jax
      0.11. XLA does not partition a kernel: call it on one device, under explicit
      sharding, by `jaxroute.layer.router` with a partition, or inside
      `jax.shard_map`. Without a name a kernel is taken only if the program is for
      such a device: that of the mesh in force (`jax.sharding.use_abstract_mesh`),
      or else the default device, if it is the only one. With a name it is traced
      anywhere, so that it can be compiled for a device elsewhere.
    interpret: whether a kernel is interpreted, on any device: False, True, or
      `pltpu.InterpretParams` for the TPU simulator.
    with_rank: whether to return `Routing.rank`, if this implementation counts it:
      "pallas_gpu" does.

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
  ladder.check_names(
    "route", get_args(Implementation), implementation, interpret
  )
  fix = "True asks for `Routing.rank`."
  with_rank = checks.as_bool("with_rank", with_rank, fix)
  # A token chooses among all experts.
  logits = mesh.whole(logits, 1)
  if expert_bias is not None:
    expert_bias = mesh.whole(expert_bias)
  operands = logits, expert_bias, config, token_mask
  by_name = implementation is not None

  def by_xla():
    ladder.refuse_to_interpret(interpret)
    return xla.route(*operands)

  def by_pallas_tpu():
    return pallas_tpu.route(*operands, by_name=by_name, interpret=interpret)

  def by_pallas_gpu():
    return pallas_gpu.route(
      *operands, by_name=by_name, interpret=interpret, with_rank=with_rank
    )

  implementations = {
    "pallas_tpu": by_pallas_tpu,
    "pallas_gpu": by_pallas_gpu,
    "xla": by_xla,
  }
  with jax.named_scope("jaxroute.route"):
    return ladder.climb("route", implementations, implementation)


def project_and_route(
  tokens: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: Implementation | None = None,
  interpret: Any = False,
  with_rank: bool = False,
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
      `route`, as "pallas_gpu" and "xla" take theirs.
    interpret: as in `route`.
    with_rank: as in `route`.

  Returns:
    A `Routing`. Gradients flow through the weights to `tokens` and
    `router_weight`.

  Raises:
    ValueError: as `route`.
    NotImplementedError: as `route`.
  """
  projection.check_tokens(tokens)
  check_router_weight(router_weight, tokens.shape[1], config)
  logits = jax.ShapeDtypeStruct(
    (tokens.shape[0], router_weight.shape[1]), jnp.float32
  )
  check_inputs(logits, expert_bias, config, token_mask)
  ladder.check_names(
    "project_and_route", get_args(Implementation), implementation, interpret
  )
  tokens, router_weight = mesh.whole(tokens, 1), mesh.whole(router_weight)
  if expert_bias is not None:
    expert_bias = mesh.whole(expert_bias)

  def one_after_the_other():
    if implementation == "xla":
      ladder.refuse_to_interpret(interpret)
    logits = projection.project(tokens, router_weight, token_mask)
    operands = logits, expert_bias, config, token_mask
    return route(*operands, implementation, interpret, with_rank)

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

  implementations = {
    "pallas_tpu": by_pallas_tpu,
    "pallas_gpu": one_after_the_other,
    "xla": one_after_the_other,
  }
  return ladder.climb("project_and_route", implementations, implementation)


def check_inputs(
  logits: jax.Array | jax.ShapeDtypeStruct,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None,
  name: str = "logits",
) -> None:
  """Raises ValueError unless the arguments of `route` fit together.

  Args:
    logits: `[T, E]` floating point, or an abstract array.
    expert_bias: `[E]` float32, or None.
    config: what E has to be that of.
    token_mask: `[T]` bool, or None.
    name: what the caller calls the logits.
  """
  check_config(config)
  checks.check_array(
    name,
    logits,
    "[T, E]",
    "floating point",
    "Flatten batch and sequence into T. Pass what the router projects to, or"
    " scores.",
    E=config.num_experts,
  )
  if expert_bias is not None:
    _check_bias(expert_bias, config.num_experts)
  checks.check_mask(token_mask, logits.shape[0])


def _check_bias(expert_bias: jax.Array, num_experts: int) -> None:
  fix = (
    "Pass the row of one layer, and leave it out of casts of the model: lower"
    " precision changes which experts win."
  )
  checks.check_array(
    "expert_bias", expert_bias, "[E]", "float32", fix, E=num_experts
  )


def check_config(config: types.RouterConfig) -> None:
  """Raises ValueError unless `config` is a `RouterConfig`.

  Args:
    config: what was passed.
  """
  checks.check_instance(
    "config",
    config,
    types.RouterConfig,
    "Write jaxroute.RouterConfig(num_experts=..., top_k=...).",
  )


def check_scores(
  scores: jax.Array,
  expert_bias: jax.Array,
  top_k: int,
  token_mask: jax.Array | None,
) -> types.RouterConfig:
  """The router that compares scores as they are, if the arguments fit together.

  Args:
    scores: `[T, E]` floating point.
    expert_bias: `[E]` float32.
    top_k: K, from 1 to E.
    token_mask: `[T]` bool, or None.

  Returns:
    `RouterConfig.on_scores(E, K)`.

  Raises:
    ValueError: if they do not fit.
  """
  fix = "Flatten batch and sequence into T."
  checks.check_array("scores", scores, "[T, E]", "floating point", fix)
  num_experts = scores.shape[1]
  fix = "Pass the K of the router of these scores."
  top_k = checks.as_int("top_k", top_k, fix, E=num_experts)
  config = types.RouterConfig.on_scores(num_experts, top_k)
  _check_bias(expert_bias, num_experts)
  check_inputs(scores, expert_bias, config, token_mask, "scores")
  return config


def check_routing(
  routing: types.Routing,
  num_tokens: int,
  config: types.RouterConfig | None = None,
) -> None:
  """Raises ValueError unless a routing is of these tokens by this router.

  Args:
    routing: what was passed.
    num_tokens: T.
    config: what E and K have to be those of; None for those of the routing.
  """
  fix = (
    "Pass what `jaxroute.route` returned for these tokens and this `config`."
  )
  checks.check_instance("routing", routing, types.Routing, fix)
  sizes = dict(T=num_tokens)
  if config is not None:
    sizes |= dict(K=config.top_k, E=config.num_experts)
  fields = [
    ("expert_idx", "[T, K]", "integer"),
    ("weights", "[T, K]", "float32"),
    ("token_mask", "[T]", "bool"),
    ("load", "[E]", "int32 or int64"),
  ]
  if routing.rank is not None:
    fields.append(("rank", "[T, K]", "int32"))
  for field, shape, dtype in fields:
    value = getattr(routing, field)
    checks.check_array(f"routing.{field}", value, shape, dtype, fix, **sizes)
    if field == "expert_idx":
      sizes["K"] = value.shape[1]


def check_router_weight(
  router_weight: jax.Array, width: int, config: types.RouterConfig
) -> None:
  """Raises ValueError unless a projection takes D to E.

  Args:
    router_weight: `[D, E]` floating point. The router projection.
    width: D, of the tokens.
    config: what E has to be that of.
  """
  check_config(config)
  width = checks.as_int("width", width, "Pass D, the features of a token.")
  checks.check_array(
    "router_weight",
    router_weight,
    "[D, E]",
    "floating point",
    "Its rows are the features of a token.",
    D=width,
    E=config.num_experts,
  )
