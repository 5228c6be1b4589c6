# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The call of the routing kernel: operands, blocks, results and memory."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import types
from jaxroute.kernels.gpu import mosaic, order, threads
from jaxroute.kernels.gpu.route import (
  count,
  histogram,
  score,
  select,
  weigh,
)
from jaxroute.kernels.gpu.route import (
  lanes as lanes_lib,
)
from jaxroute.kernels.gpu.route.plan import Plan
from jaxroute.kernels.gpu.route.refs import (
  Buffers,
  Operands,
  Results,
  scratch_types,
)
from jaxroute.kernels.gpu.route.tile import Tile, tile_of


class Outputs(NamedTuple):
  """What the kernel returns.

  Attributes:
    expert_idx: `[T, K]` int32.
    weights: `[T, K]` float32.
    load: `[E]` int32.
    cutoff: `[T]` float32.
    token_mask: `[T]` bool. The tokens that are counted.
    histogram: `[E, 16]` int32, if `config.histogram`.
    chosen: `[T, K]`, if asked for. The logits of the chosen experts.
    rank: `[T, K]` int32, if asked for. See `jaxroute.types.Routing`.
  """

  expert_idx: jax.Array
  weights: jax.Array
  load: jax.Array
  cutoff: jax.Array
  token_mask: jax.Array
  histogram: jax.Array | None = None
  chosen: jax.Array | None = None
  rank: jax.Array | None = None


@functools.partial(
  jax.jit,
  static_argnames=("config", "with_chosen", "with_rank", "lanes", "interpret"),
)
def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  *,
  config: types.RouterConfig,
  with_chosen: bool = False,
  with_rank: bool = False,
  lanes: int | None = None,
  interpret: Any = False,
) -> Outputs:
  """Routes tokens; see `jaxroute.route`, which checks the arguments.

  Args:
    logits: `[T, E]` float32, bfloat16 or float16.
    expert_bias: `[E]` float32, or None.
    token_mask: `[T]` bool, or None.
    config: one that is not `unsupported`; static.
    with_chosen: whether to return the logits of the chosen experts; static.
    with_rank: whether to return ranks; static.
    lanes: threads for a token, of `lanes.possible`; None to choose by shape; static.
    interpret: whether Pallas interprets the kernel.

  Returns:
    `Outputs`. No gradient is defined.

  Raises:
    ValueError: if so many threads cannot share a token.
  """
  tokens = logits.shape[0]
  possible = lanes_lib.possible(config, logits.dtype)
  if lanes is not None and lanes not in possible:
    raise ValueError(
      f"`lanes` must be one of {possible} for this router, got {lanes}. Leave it"
      " out to choose by shape."
    )
  plan = Plan(
    config=config,
    tokens=tokens,
    dtype=logits.dtype,
    has_bias=expert_bias is not None,
    has_mask=token_mask is not None,
    with_chosen=with_chosen,
    with_rank=with_rank,
    lanes=lanes or lanes_lib.choose(config, tokens, logits.dtype),
    interpret=bool(interpret),
  )
  if tokens == 0:
    return _empty_outputs(plan)
  arrays, refs = _operands(plan, logits, expert_bias, token_mask)
  shapes = _result_shapes(plan)
  results = mosaic.call(
    functools.partial(_kernel, plan, tuple(arrays), tuple(shapes)),
    tuple(shapes.values()),
    name="route",
    blocks=plan.tiles,
    scratch_types=scratch_types(plan),
    interpret=plan.interpret,
  )(*arrays.values())
  return _outputs(plan, refs, dict(zip(shapes, results, strict=True)))


def _operands(
  plan: Plan,
  logits: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
) -> tuple[dict[str, Any], dict[str, Any]]:
  """Fields of `Operands` by name; and of them, those that the kernel adds to."""
  pad_tokens = plan.padded_tokens - plan.tokens
  pad_experts = plan.padded_experts - plan.num_experts
  if pad_tokens or pad_experts:
    # An expert that is not there comes last, and no token chooses it.
    minus_inf = jnp.array(-jnp.inf, logits.dtype)
    widths = (0, pad_tokens, 0), (0, pad_experts, 0)
    logits = lax.pad(logits, minus_inf, widths)
  arrays = {
    "rows": logits.reshape(-1, plan.part),
    "logits": logits.reshape(-1),
  }
  if expert_bias is not None:
    arrays["expert_bias"] = expert_bias
  if token_mask is not None:
    arrays["token_mask"] = token_mask
  sums = {}
  if plan.tiles > 1:
    sums["load"] = _zeros(plan.num_experts)
    if plan.config.histogram:
      sums["histogram"] = _zeros(types.HISTOGRAM_BINS * plan.num_experts)
    if plan.with_rank:
      spans = sum(order.span_rows(plan.tiles))
      sums["span_counts"] = _zeros(spans * plan.count_pitch)
  return arrays | sums, sums


def _zeros(size: int) -> Any:
  return jax.new_ref(jnp.zeros(size, jnp.int32))


def _result_shapes(plan: Plan) -> dict[str, jax.ShapeDtypeStruct]:
  """Fields of `Results` by name."""
  shape = jax.ShapeDtypeStruct
  choices = plan.tokens * plan.config.top_k
  shapes = {
    "expert_idx": shape((choices,), jnp.int32),
    "weights": shape((choices,), jnp.float32),
    "cutoff": shape((plan.tokens,), jnp.float32),
    "token_mask": shape((plan.tokens,), jnp.bool_),
  }
  if plan.with_chosen:
    shapes["chosen"] = shape((choices,), plan.dtype)
  if plan.with_rank:
    shapes["rank"] = shape((choices,), jnp.int32)
  if plan.tiles == 1:
    shapes["load"] = shape((plan.num_experts,), jnp.int32)
    if plan.config.histogram:
      size = types.HISTOGRAM_BINS * plan.num_experts
      shapes["histogram"] = shape((size,), jnp.int32)
  elif plan.with_rank:
    shapes["counts"] = shape((plan.tiles * plan.count_pitch,), jnp.int32)
  return shapes


def _outputs(
  plan: Plan, sums: dict[str, Any], results: dict[str, jax.Array]
) -> Outputs:
  """What the kernel wrote, in the shapes of the caller."""
  choices = plan.tokens, plan.config.top_k
  rank, chosen = results.get("rank"), results.get("chosen")
  # XLA moves an update of a slice by a result, as of the stack of a scan, into one
  # fusion with the kernel: the result is then in the stack, and what the kernel has
  # added, through the pointer of its operand, is lost.
  counts = results | lax.optimization_barrier(
    {name: ref[...] for name, ref in sums.items()}
  )
  if rank is not None and plan.tiles > 1:
    rank = order.rank(
      results["expert_idx"],
      rank,
      counts["counts"],
      counts["span_counts"],
      num_experts=plan.num_experts,
      tile_choices=plan.tile_tokens * plan.config.top_k,
      interpret=plan.interpret,
    )
  by_bin = counts.get("histogram")
  if by_bin is not None:
    by_bin = by_bin.reshape(types.HISTOGRAM_BINS, plan.num_experts)
  return Outputs(
    expert_idx=results["expert_idx"].reshape(choices),
    weights=results["weights"].reshape(choices),
    load=counts["load"],
    cutoff=results["cutoff"],
    token_mask=results["token_mask"],
    histogram=None if by_bin is None else by_bin.T,
    chosen=None if chosen is None else chosen.reshape(choices),
    rank=None if rank is None else rank.reshape(choices),
  )


def _empty_outputs(plan: Plan) -> Outputs:
  """The results for no tokens."""
  choices = 0, plan.config.top_k
  bins = plan.num_experts, types.HISTOGRAM_BINS
  return Outputs(
    expert_idx=jnp.zeros(choices, jnp.int32),
    weights=jnp.zeros(choices, jnp.float32),
    load=jnp.zeros((plan.num_experts,), jnp.int32),
    cutoff=jnp.zeros((0,), jnp.float32),
    token_mask=jnp.zeros((0,), jnp.bool_),
    histogram=jnp.zeros(bins, jnp.int32) if plan.config.histogram else None,
    chosen=jnp.zeros(choices, plan.dtype) if plan.with_chosen else None,
    rank=jnp.zeros(choices, jnp.int32) if plan.with_rank else None,
  )


def _kernel(
  plan: Plan,
  operands: tuple[str, ...],
  results: tuple[str, ...],
  *refs: Any,
  **scratch: Any,
) -> None:
  """What a block does; see the table in `__init__.py`."""
  inputs, outputs = refs[: len(operands)], refs[len(operands) :]
  run_tile(
    tile_of(
      plan,
      Operands(**dict(zip(operands, inputs, strict=True))),
      Results(**dict(zip(results, outputs, strict=True))),
      Buffers(**({"selection_scores": scratch["logits"]} | scratch)),
    )
  )


def run_tile(tile: Tile) -> None:
  """Routes the tokens of a block."""
  plan = tile.plan
  score.start_copies(tile)
  score.load_bias(tile)
  total = score.softmax_sums(tile) if plan.needs_softmax_sums else None
  top, kept = select.threshold(tile, total)
  k = plan.config.top_k
  cutoff = top[k] if k < len(top) else threads.full(score.NEG_INF)
  weigh.write_cutoff(tile, cutoff)
  picked = select.choose(tile, top[k - 1], kept)
  plan.threads.warp_barrier()
  weigh.weigh(tile)
  plan.threads.warp_barrier()
  count.transpose_chosen(tile, picked)
  if plan.config.histogram:
    histogram.write_distances(tile, cutoff, kept)
  plan.threads.block_barrier()
  count.count(tile)
  if plan.config.histogram:
    histogram.count(tile)
  if plan.with_rank:
    plan.threads.block_barrier()
    count.write_ranks(tile)
