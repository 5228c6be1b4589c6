# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The calls of the routing kernel: operands, blocks, results and memory."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute import types
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.route import body, histogram, projection
from jaxroute.kernels.tpu.route.plan import Plan
from jaxroute.kernels.tpu.route.refs import (
  InputRefs,
  OutputRefs,
  scratch_shapes,
)

_LANES, _SUBLANES = device.LANES, device.SUBLANES
# Mosaic allows a kernel this much VMEM without being asked.
_DEFAULT_VMEM = 16 * 2**20


class Outputs(NamedTuple):
  """What the kernel returns.

  Attributes:
    expert_idx: `[T, K]` int32.
    weights: `[T, K]` float32.
    load: `[E]` int32.
    cutoff: `[T]` float32.
    histogram: `[E, 16]` int32, if `config.histogram`.
    chosen: `[T, K]` float32, if asked for. The logits of the chosen experts, or
      their log scores if weights depend on the logits of all experts.
  """

  expert_idx: jax.Array
  weights: jax.Array
  load: jax.Array
  cutoff: jax.Array
  histogram: jax.Array | None = None
  chosen: jax.Array | None = None


@functools.partial(
  jax.jit, static_argnames=("config", "with_chosen", "interpret")
)
def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  *,
  config: types.RouterConfig,
  with_chosen: bool = False,
  interpret: Any = False,
) -> Outputs:
  """Routes tokens; see `jaxroute.route`, which checks the arguments.

  Args:
    logits: `[T, E]` floating point.
    expert_bias: `[E]` float32, or None.
    token_mask: `[T]` bool, or None.
    config: one that is not `unsupported`; static.
    with_chosen: whether to return what the weights were made from; static.
    interpret: what `pallas_call` takes: False, True, or parameters of the TPU
      simulator.

  Returns:
    `Outputs`. No gradient is defined.
  """
  plan = Plan(
    config=config,
    tokens=logits.shape[0],
    has_bias=expert_bias is not None,
    has_mask=token_mask is not None,
    with_chosen=with_chosen,
    interpret=bool(interpret),
    divides_in_software=_divides_in_software(interpret),
  )
  if plan.experts_first:
    logits = logits.T
  operands = InputRefs(
    logits=logits,
    expert_bias=expert_bias,
    token_mask=_pad_mask(plan, token_mask),
  )
  return _call(plan, operands, interpret)


@functools.partial(
  jax.jit, static_argnames=("config", "with_chosen", "interpret")
)
def project_and_route(
  tokens: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  *,
  config: types.RouterConfig,
  with_chosen: bool = False,
  interpret: Any = False,
) -> Outputs:
  """Routes by logits `tokens @ router_weight` that are not written to HBM.

  Args:
    tokens: `[T, D]` bfloat16.
    router_weight: `[D, E]` floating point, taken as float32.
    expert_bias: `[E]` float32, or None.
    token_mask: `[T]` bool, or None.
    config: one for which this is no `unsupported_projection`; static.
    with_chosen: as in `route`.
    interpret: as in `route`.

  Returns:
    What `route` does. Products are exact, and their sums float32.
  """
  plan = Plan(
    config=config,
    tokens=tokens.shape[0],
    width=tokens.shape[1],
    has_bias=expert_bias is not None,
    has_mask=token_mask is not None,
    with_chosen=with_chosen,
    interpret=bool(interpret),
    divides_in_software=_divides_in_software(interpret),
  )
  operands = InputRefs(
    tokens=tokens,
    router_weight=projection.split_bf16x3(plan, router_weight),
    expert_bias=expert_bias,
    token_mask=_pad_mask(plan, token_mask),
  )
  return _call(plan, operands, interpret)


def _divides_in_software(interpret: Any) -> bool:
  """Whether an inverse is approximate: on TPUs before v6e, or not known."""
  return not interpret and (device.generation() or 0) < 6


def _pad_mask(plan: Plan, token_mask: jax.Array | None) -> jax.Array | None:
  """Lays a mask out by grid step and column: [steps, columns, 128] int32."""
  if token_mask is None:
    return None
  padding = plan.grid_steps * plan.step_tokens - plan.tokens
  mask = jnp.pad(token_mask.astype(jnp.int32), (0, padding))
  columns = plan.blocks_per_step * plan.columns
  return mask.reshape(plan.grid_steps, columns, _LANES)


def _call(plan: Plan, operands: InputRefs, interpret: Any) -> Outputs:
  """Calls the kernel on all blocks of tokens."""
  if plan.tokens == 0:
    return _empty_outputs(plan)
  outputs = pl.pallas_call(
    functools.partial(body.kernel, plan),
    grid=(plan.grid_steps + plan.projection_lead,),
    in_specs=(_input_specs(plan),),
    out_specs=_output_specs(plan),
    out_shape=_output_shapes(plan, operands),
    scratch_shapes=(
      jax.tree.map(
        lambda buffer: pltpu.VMEM(buffer.shape, buffer.dtype),
        scratch_shapes(plan),
      ),
    ),
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=_vmem_limit(plan)
    ),
    name="jaxroute_route",
  )(operands)
  counts, chosen = outputs.histogram, outputs.chosen
  return Outputs(
    expert_idx=outputs.expert_idx.T,
    weights=outputs.weights.T,
    load=outputs.load,
    cutoff=outputs.cutoff.reshape(plan.tokens),
    histogram=None if counts is None else counts[: plan.num_experts],
    chosen=None if chosen is None else chosen.T,
  )


def _empty_outputs(plan: Plan) -> Outputs:
  """Returns the results for no tokens."""
  e, k = plan.num_experts, plan.config.top_k
  bins = jnp.zeros((e, histogram.BINS), jnp.int32)
  return Outputs(
    expert_idx=jnp.zeros((0, k), jnp.int32),
    weights=jnp.zeros((0, k), jnp.float32),
    load=jnp.zeros((e,), jnp.int32),
    cutoff=jnp.zeros((0,), jnp.float32),
    histogram=bins if plan.config.histogram else None,
    chosen=jnp.zeros((0, k), jnp.float32) if plan.with_chosen else None,
  )


def _routed_block(plan: Plan) -> Callable[[Any], Any]:
  """Returns a function: grid step to the number of the tokens it routes."""
  if plan.projection_lead:
    return lambda i: jnp.maximum(i - plan.projection_lead, 0)
  return lambda i: i


def _input_specs(plan: Plan) -> InputRefs:
  """Returns the `BlockSpec` of every operand."""
  e, routed = plan.num_experts, _routed_block(plan)
  logits = tokens = router_weight = None
  if plan.width:
    last = plan.grid_steps - 1
    tokens = pl.BlockSpec(
      (plan.block_tokens, plan.width), lambda i: (jnp.minimum(i, last), 0)
    )
    # The weight is the same in all steps: one buffer is enough.
    term = pl.BlockSpec(
      (plan.projected_experts, plan.width),
      lambda i: (0, 0),
      pipeline_mode=pl.Buffered(buffer_count=1),
    )
    router_weight = (term,) * projection.BF16_TERMS
  elif plan.experts_first:
    logits = pl.BlockSpec((e, plan.step_tokens), lambda i: (0, i))
  else:
    logits = pl.BlockSpec((plan.step_tokens, e), lambda i: (i, 0))
  bias = mask = None
  if plan.has_bias:
    bias = pl.BlockSpec((e,), lambda i: (0,))
  if plan.has_mask:
    columns = plan.blocks_per_step * plan.columns
    mask = pl.BlockSpec((None, columns, _LANES), lambda i: (routed(i), 0, 0))
  return InputRefs(
    logits=logits,
    tokens=tokens,
    router_weight=router_weight,
    expert_bias=bias,
    token_mask=mask,
  )


def _output_specs(plan: Plan) -> OutputRefs:
  """Returns the `BlockSpec` of every result."""
  routed = _routed_block(plan)
  per_choice = pl.BlockSpec(
    (plan.config.top_k, plan.step_tokens), lambda i: (0, routed(i))
  )
  bins = _SUBLANES * plan.experts_per_sublane, histogram.BINS
  counts = pl.BlockSpec(bins, lambda i: (0, 0))
  return OutputRefs(
    expert_idx=per_choice,
    weights=per_choice,
    load=pl.BlockSpec((plan.num_experts,), lambda i: (0,)),
    cutoff=pl.BlockSpec((1, plan.step_tokens), lambda i: (0, routed(i))),
    histogram=counts if plan.config.histogram else None,
    chosen=per_choice if plan.with_chosen else None,
  )


def _output_shapes(plan: Plan, operands: InputRefs) -> OutputRefs:
  """Returns the shape, dtype and varying type of every result."""
  # Inside `jax.shard_map` the operands vary alike, and so do the results.
  first_operand = jax.tree.leaves(operands)[0]
  shape = functools.partial(
    jax.ShapeDtypeStruct,
    manual_axis_type=jax.typeof(first_operand).manual_axis_type,
  )
  per_choice = plan.config.top_k, plan.tokens
  bins = _SUBLANES * plan.experts_per_sublane, histogram.BINS
  counts = shape(bins, jnp.int32)
  chosen = shape(per_choice, jnp.float32)
  return OutputRefs(
    expert_idx=shape(per_choice, jnp.int32),
    weights=shape(per_choice, jnp.float32),
    load=shape((plan.num_experts,), jnp.int32),
    cutoff=shape((1, plan.tokens), jnp.float32),
    histogram=counts if plan.config.histogram else None,
    chosen=chosen if plan.with_chosen else None,
  )


def _vmem_limit(plan: Plan) -> int:
  """Computes the bytes of VMEM to ask for: all buffers, with room to spare."""
  scratch = sum(
    buffer.size * buffer.dtype.itemsize
    for buffer in jax.tree.leaves(scratch_shapes(plan))
  )
  # The pipeline has two of each block: of logits, and of three results by
  # choice.
  rows = plan.num_experts + 3 * plan.padded_top_k
  blocks = 2 * plan.step_tokens * rows * 4
  limit = max(_DEFAULT_VMEM, 1.25 * (scratch + blocks))
  return int(limit + projection.vmem_bytes(plan))
