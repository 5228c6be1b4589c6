# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing on TPU: scores, choice, weights and loads in one pass.

The grid walks blocks of up to 1024 tokens, one or two in a step;
`steps` says how a block is routed. Loads are counted across blocks, and
written by the last.

Memory: the block of logits twice (the pipeline's double buffer), once by columns,
and once more as selection scores: 4 MiB for 256 experts.

`project_and_route` makes the logits itself, a block ahead of the one that it
routes, so that the MXU and the vector units work at the same time: logits are
projected as soon as those of the block before have been read. The first step routes
zeros, which the second forgets. The tokens are what the MXU holds and the experts
pass by, so that few of them leave none of its width empty.
"""

import dataclasses
import functools
import types
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels.tpu import device, registers
from jaxroute.kernels.tpu.route import histogram
from jaxroute.kernels.tpu.route import plan as plan_lib
from jaxroute.kernels.tpu.route import steps

_LANES, _SUBLANES = device.LANES, device.SUBLANES
_PARTS = plan_lib.PARTS
# What is left for a projection of the smallest VMEM, the 64 MiB of v7x.
_MAX_PROJECTION = 20 * 2**20


class Outputs(NamedTuple):
  """What the kernel returns.

  Attributes:
    expert_idx: `[T, K]` int32.
    weights: `[T, K]` float32.
    load: `[E]` int32.
    cutoff: `[T]` float32.
    histogram: `[E, 16]` int32, if `config.histogram`.
    chosen: `[T, K]` float32, if asked for. The logits of the chosen experts, or their
      scores if those depend on the logits of all experts.
  """

  expert_idx: jax.Array
  weights: jax.Array
  load: jax.Array
  cutoff: jax.Array
  histogram: jax.Array | None = None
  chosen: jax.Array | None = None


def unsupported(config: Any) -> str | None:
  """Why the kernel cannot route this way, or None if it can.

  Args:
    config: a `jaxroute.RouterConfig`.

  Returns:
    The reason, for an error message.
  """
  e, g = config.num_experts, config.num_groups
  if config.top_k > 16:
    return f"`top_k` is at most 16 in the TPU kernel, got {config.top_k}"
  if e > 1024:
    return f"`num_experts` is at most 1024 in the TPU kernel, got {e}"
  whole = e % _SUBLANES == 0 and g in (2, 4, 8, 16, 24, 32)
  if config.group_top_k < g and not whole:
    return (
      "groups must be 2, 4, 8, 16, 24 or 32 in the TPU kernel and 8 divide"
      f" `num_experts`, got {g} groups of {e} experts"
    )
  return None


def unsupported_projection(
  config: Any, width: int, dtype: jax.typing.DTypeLike
) -> str | None:
  """Why `project_and_route` cannot take such tokens, or None if it can.

  Args:
    config: a `jaxroute.RouterConfig`.
    width: D.
    dtype: of the tokens.

  Returns:
    The reason, for an error message.
  """
  if reason := unsupported(config):
    return reason
  if config.score_fn == "softmax" and not config.score_after_top_k:
    return "the gradient of a softmax over all experts needs the logits"
  if dtype != jnp.bfloat16:
    return f"tokens must be bfloat16, got {jnp.dtype(dtype)}"
  if (device.generation() or 6) < 6:
    return "TPUs before v6e are faster with the projection apart"
  if width % _LANES:
    return f"D must be a multiple of {_LANES}, got {width}"
  plan = plan_lib.Plan(
    config=config, tokens=_LANES * _SUBLANES, width=width
  )
  size = _projection_bytes(plan)
  if size > _MAX_PROJECTION:
    return (
      f"tokens and projection take {size >> 20} MiB of VMEM, of which there are"
      f" {_MAX_PROJECTION >> 20}"
    )
  return None


def _projection_bytes(plan):
  """Of two blocks of tokens and the parts of the projection."""
  rows = 2 * plan.block + _PARTS * plan.projected_rows
  return rows * plan.width * 2


def grid(config: Any, tokens: int) -> int:
  """How often the body of `route` runs.

  Args:
    config: a `jaxroute.RouterConfig`.
    tokens: T.

  Returns:
    The steps of the grid, in each of which every operation is executed once.
  """
  return plan_lib.Plan(config=config, tokens=tokens).grid


def _divides_in_software(interpret):
  """Whether an inverse is approximate: on TPUs before v6e, or not known."""
  return not interpret and (device.generation() or 0) < 6


@functools.partial(
  jax.jit, static_argnames=("config", "with_chosen", "interpret")
)
def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  *,
  config: Any,
  with_chosen: bool = False,
  interpret: Any = False,
) -> Outputs:
  """Routes tokens; see `jaxroute.route`, which checks the arguments.

  Args:
    logits: `[T, E]` floating point.
    expert_bias: `[E]` float32, or None.
    token_mask: `[T]` bool, or None.
    config: a `jaxroute.RouterConfig` that is not `unsupported`; static.
    with_chosen: whether to return what the weights were made from; static.
    interpret: what `pallas_call` takes: False, True, or parameters of the TPU
      simulator.

  Returns:
    `Outputs`. No gradient is defined.
  """
  plan = _plan(config, logits, expert_bias, token_mask, with_chosen, interpret)
  e, block = plan.num_experts, plan.step_tokens
  if plan.transposed:
    logits, spec = logits.T, pl.BlockSpec((e, block), lambda i: (0, i))
  else:
    spec = pl.BlockSpec((block, e), lambda i: (i, 0))
  return _call(plan, [logits], [spec], expert_bias, token_mask, interpret)


@functools.partial(
  jax.jit, static_argnames=("config", "with_chosen", "interpret")
)
def project_and_route(
  tokens: jax.Array,
  router_weight: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  *,
  config: Any,
  with_chosen: bool = False,
  interpret: Any = False,
) -> Outputs:
  """As `route`, of the logits `tokens @ router_weight`, which are not written to HBM.

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
  plan = _plan(config, tokens, expert_bias, token_mask, with_chosen, interpret)
  plan = dataclasses.replace(plan, width=tokens.shape[1])
  last = max(plan.grid - 1, 0)
  in_specs = [
    pl.BlockSpec((plan.block, plan.width), lambda i: (jnp.minimum(i, last), 0)),
    # The same in all steps: one buffer is enough.
    *[
      pl.BlockSpec(
        (plan.projected_rows, plan.width),
        lambda i: (0, 0),
        pipeline_mode=pl.Buffered(buffer_count=1),
      )
    ]
    * _PARTS,
  ]
  operands = [tokens, *_in_parts(plan, router_weight)]
  return _call(plan, operands, in_specs, expert_bias, token_mask, interpret)


def _plan(config, inputs, expert_bias, token_mask, with_chosen, interpret):
  return plan_lib.Plan(
    config=config,
    tokens=inputs.shape[0],
    has_bias=expert_bias is not None,
    has_mask=token_mask is not None,
    with_chosen=with_chosen,
    interpret=bool(interpret),
    divides_in_software=_divides_in_software(interpret),
  )


def _in_parts(plan, router_weight):
  """`[E', D]` bfloat16, of what the earlier ones left of `[D, E]` float32."""
  pad = plan.projected_rows - plan.num_experts
  rest = jnp.pad(router_weight.astype(jnp.float32).T, ((0, pad), (0, 0)))
  parts = []
  for _ in range(_PARTS):
    # XLA may keep more bits through a cast to bfloat16 and back, not here.
    part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    rest -= part
    parts.append(part.astype(jnp.bfloat16))
  return parts


def _call(plan, operands, in_specs, expert_bias, token_mask, interpret):
  """Calls the kernel on blocks of tokens, which its first operand has."""
  config, with_chosen = plan.config, plan.with_chosen
  t, e, k = plan.tokens, plan.num_experts, config.top_k
  if t == 0:
    bins = jnp.zeros((e, histogram.BINS), jnp.int32)
    return Outputs(
      expert_idx=jnp.zeros((0, k), jnp.int32),
      weights=jnp.zeros((0, k), jnp.float32),
      load=jnp.zeros((e,), jnp.int32),
      cutoff=jnp.zeros((0,), jnp.float32),
      histogram=bins if config.histogram else None,
      chosen=jnp.zeros((0, k), jnp.float32) if with_chosen else None,
    )
  block, c = plan.step_tokens, plan.blocks * plan.columns

  def routed(i):
    return jnp.maximum(i - 1, 0) if plan.lag else i

  tokens_last = pl.BlockSpec((k, block), lambda i: (0, routed(i)))
  experts = pl.BlockSpec((e,), lambda i: (0,))
  if expert_bias is not None:
    operands.append(expert_bias)
    in_specs.append(experts)
  if token_mask is not None:
    mask = jnp.pad(token_mask.astype(jnp.int32), (0, plan.grid * block - t))
    operands.append(mask.reshape(plan.grid, c, _LANES))
    in_specs.append(
      pl.BlockSpec((None, c, _LANES), lambda i: (routed(i), 0, 0))
    )

  # Inside `jax.shard_map` the operands vary alike, and so do the results.
  out = functools.partial(
    jax.ShapeDtypeStruct,
    manual_axis_type=jax.typeof(operands[0]).manual_axis_type,
  )
  buffers = plan.buffers()
  bins = _SUBLANES * plan.rows, histogram.BINS
  idx, weights, load, cutoff, *others = pl.pallas_call(
    functools.partial(_kernel, plan),
    grid=(plan.grid + plan.lag,),
    in_specs=in_specs,
    out_specs=[
      tokens_last,
      tokens_last,
      experts,
      pl.BlockSpec((1, block), lambda i: (0, routed(i))),
      *([pl.BlockSpec(bins, lambda i: (0, 0))] if config.histogram else ()),
      *([tokens_last] if with_chosen else ()),
    ],
    out_shape=[
      out((k, t), jnp.int32),
      out((k, t), jnp.float32),
      out((e,), jnp.int32),
      out((1, t), jnp.float32),
      *([out(bins, jnp.int32)] if config.histogram else ()),
      *([out((k, t), jnp.float32)] if with_chosen else ()),
    ],
    scratch_shapes=[pltpu.VMEM(*buffer) for buffer in buffers.values()],
    interpret=interpret,
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("arbitrary",), vmem_limit_bytes=_vmem_limit(plan)
    ),
    name="jaxroute_route",
  )(*operands)
  return Outputs(
    expert_idx=idx.T,
    weights=weights.T,
    load=load,
    cutoff=cutoff.reshape(t),
    histogram=others.pop(0)[:e] if config.histogram else None,
    chosen=others[-1].T if with_chosen else None,
  )


def _vmem_limit(plan):
  scratch = sum(
    np.prod(shape) * np.dtype(dtype).itemsize
    for shape, dtype in plan.buffers().values()
  )
  blocks = 2 * plan.step_tokens * (plan.num_experts + 3 * plan.chosen_rows) * 4
  limit = max(16 * 2**20, 1.25 * (scratch + blocks))
  return int(limit + _projection_bytes(plan))


def _kernel(plan, inputs_ref, *refs):
  refs = list(refs)
  parts_refs = [refs.pop(0) for _ in range(_PARTS if plan.width else 0)]
  bias_ref = refs.pop(0) if plan.has_bias else None
  mask_ref = refs.pop(0) if plan.has_mask else None
  idx_ref, weights_ref, load_ref, cutoff_ref, *refs = refs
  histogram_ref = refs.pop(0) if plan.config.histogram else None
  chosen_ref = refs.pop(0) if plan.with_chosen else None
  scratch = refs
  buf = types.SimpleNamespace(**dict(zip(plan.buffers(), scratch, strict=True)))
  # -1 in the step that only projects.
  step = pl.program_id(0) - plan.lag
  logits_ref = buf.projected if plan.width else inputs_ref

  if plan.width:

    @pl.when(step < 0)
    def _nothing():
      buf.projected[...] = jnp.zeros_like(buf.projected)

  @pl.when(step <= 0)
  def _start():
    buf.planes[...] = jnp.zeros_like(buf.planes)
    if plan.has_bias:
      steps.spread_bias(plan, bias_ref, buf)
    if histogram_ref is not None:
      buf.distances[...] = jnp.zeros_like(buf.distances)
      histogram_ref[...] = jnp.zeros_like(histogram_ref)

  outputs = idx_ref, weights_ref, cutoff_ref, chosen_ref
  for b in range(plan.blocks):
    _route_block(plan, step, b, logits_ref, mask_ref, outputs, buf)
  if plan.width:
    steps.project(plan, inputs_ref, parts_refs, buf)
  if histogram_ref is not None:
    period = histogram.FLUSH // plan.blocks
    flush = step % period == period - 1

    @pl.when(flush | (step == plan.grid - 1))
    def _flush():
      registers.unroll(
        plan.rows,
        lambda r: histogram.add_up(
          buf.distances, r, plan.rows, histogram_ref
        ),
        plan.interpret,
      )
      buf.distances[...] = jnp.zeros_like(buf.distances)

  @pl.when(step == plan.grid - 1)
  def _finish():
    steps.write_load(plan, buf, load_ref)


def _route_block(plan, step, b, logits_ref, mask_ref, outputs, buf):
  """Routes block b of a step: 1024 tokens."""
  tokens = pl.ds(b * plan.block, plan.block)
  if plan.blocks > 1:
    at = (slice(None), tokens) if plan.transposed else (tokens, slice(None))
    logits_ref = logits_ref.at[at]
    outputs = [x if x is None else x.at[:, tokens] for x in outputs]
    if mask_ref is not None:
      mask_ref = mask_ref.at[pl.ds(b * plan.columns, plan.columns)]

  def each_column(body):
    registers.unroll(plan.columns, body, plan.interpret)

  each_column(lambda c: steps.score_column(plan, c, logits_ref, buf))
  kept = steps.threshold(plan, buf)
  each_column(lambda c: steps.compare_column(plan, c, buf))
  chosen = steps.pull_bits(plan, steps.settle_ties(plan, buf), buf)
  each_column(lambda c: steps.gather_column(plan, c, buf))
  steps.weigh(plan, step * plan.blocks + b, chosen, kept, mask_ref, buf)
  each_column(lambda c: steps.write_column(plan, c, buf, *outputs))
  steps.count(plan, buf)
  if plan.config.histogram:
    steps.store_prices(plan, kept, buf)
    registers.unroll(
      plan.rows,
      lambda r: steps.count_distances(plan, r, buf),
      plan.interpret,
    )
