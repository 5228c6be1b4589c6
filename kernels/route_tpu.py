# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing on TPU: scores, choice, weights and loads in one pass.

The grid walks blocks of up to 1024 tokens, 8 columns of 128, one or two in a step.
Two layouts of a vector register [8, 128] alternate:

  column  8 experts x 128 tokens of one column. The experts are cut into 8 chunks
          of R = ceil(E / 8); row r holds expert s * R + r on sublane s, so a
          sublane, or a part of its rows, lies within one expert group.
  dense   8 columns x 128 tokens, one number for each of 1024 tokens.

To change layout is to store registers and to load them with a stride. Loads that
are a multiple of 8 rows apart meet in one memory bank, so every such buffer has an
odd pitch.

  1. column: logits are transposed, scored, biased; the selection scores are
     written to `chosen_from`, and every later step reads them from there. A
     selection network keeps the K + 1 largest values of every sublane, no indices.
     The columns take turns in two buffers of transposed logits: else all that
     is transposed would come first, with nothing to do beside it.
  2. dense: the 8 sublanes' lists are merged. Group scores are sums of the heads
     of lists; a group that is not kept is taken out as a whole. The last merge
     leaves the K-th largest value, the threshold, and the next, the cutoff.
  3. column: a score sets one bit if it is above the threshold, one if it is not
     below: two 32-bit words per sublane for every 32 rows.
  4. dense: where more than K are not below, as many of the equal ones as are
     wanted are taken from the lowest index on. K bits are left per token, in
     index order; they are pulled out one by one. Short words of several sublanes
     are packed into one for that.
  5. column: the logits of the chosen experts are gathered.
  6. dense: they are scored again, sorted by score, weighted and normalised. Only
     their order depends on the scores being the same as in step 1.
  7. column: the bits of valid tokens are added to counters of one bit per plane.
     The last block turns the planes into loads.
  8. If asked for, column: the selection scores once more, for their distances from
     the cutoff (`histogram_tpu`).

Memory: the block of logits twice (the pipeline's double buffer), once by columns,
and once more as selection scores: 4 MiB for 256 experts. No step branches on the
data: ties cost the same as none.

`project_and_route` makes the logits itself, a block ahead of the one that it
routes, so that the MXU and the vector units work at the same time: logits are
projected as soon as those of the block before have been read. The first step routes
zeros, which the second forgets. The tokens are what the MXU holds and the experts
pass by, so that few of them leave none of its width empty.
"""

import dataclasses
import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxroute.kernels import histogram_tpu, networks

# Older versions of jax have it among what is not TPU's alone.
_reciprocal = getattr(pltpu, "reciprocal", None) or pl.reciprocal

_LANES = 128
_SUBLANES = 8
_WORD = 32
# Of a column in a buffer that is stored by columns and loaded dense.
_PITCH = _SUBLANES + 1
# An even and an odd row share the two bits of their pair in a word.
_EVEN = np.int32(0x55555555)
_ODD = np.int32(-0x55555556)
# Keeps a sum of tiny scores away from the floats that TPUs flush to zero.
_SCALE = 2.0**40
# Its inverse is a normal float.
_LARGE = np.float32(2.0**125)
_NEG_INF = np.float32(-np.inf)
_NAN = np.float32(np.nan)
# Numbers of bfloat16 that add up to one of float32.
_PARTS = 3
# What is left for them of the smallest VMEM, the 64 MiB of v7x.
_MAX_PROJECTION = 20 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Plan:
  """The static shape of one call."""

  config: Any
  tokens: int
  width: int = 0  # D of tokens that are projected here
  has_bias: bool = True
  has_mask: bool = True
  with_chosen: bool = False
  interpret: bool = False
  divides_in_software: bool = False

  @property
  def num_experts(self) -> int:
    return self.config.num_experts

  @property
  def columns(self) -> int:
    """Columns of 128 tokens in a block; fewer for few tokens, or for memory."""
    most = 8 if self.num_experts <= 512 else 4
    return min(most, max(1, pl.cdiv(self.tokens, _LANES)))

  @property
  def block(self) -> int:
    return self.columns * _LANES

  @property
  def blocks(self) -> int:
    """Of a grid step: one of two begins while the other ends.

    With many experts a step has enough to do, and its first logits are long in
    coming.
    """
    count = pl.cdiv(self.tokens, self.block)
    small = self.num_experts <= 192 and not self.width
    return 2 if small and count > 2 and count % 2 == 0 else 1

  @property
  def step_tokens(self) -> int:
    return self.blocks * self.block

  @property
  def grid(self) -> int:
    return pl.cdiv(self.tokens, self.step_tokens)

  @property
  def lag(self) -> int:
    """Grid steps between the projection of a block and its routing."""
    return 1 if self.width else 0

  @property
  def transposed(self) -> bool:
    """Whether the logits come as [E, T]: the layout XLA gives narrow rows."""
    return self.width > 0 or self.num_experts % _LANES != 0

  @property
  def projected_rows(self) -> int:
    """E, rounded up to whole registers of bfloat16."""
    return pl.cdiv(self.num_experts, 2 * _SUBLANES) * 2 * _SUBLANES

  @property
  def rows(self) -> int:
    """R, experts per sublane; those past E are masked."""
    return pl.cdiv(self.num_experts, _SUBLANES)

  @property
  def row_pitch(self) -> int:
    return self.rows | 1

  @property
  def column_pitch(self) -> int:
    return self.columns | 1

  @property
  def words(self) -> int:
    """Words of bits per sublane."""
    return pl.cdiv(self.rows, _WORD)

  @property
  def packed(self) -> int:
    """Sublanes whose bits fit one word in the dense layout."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or n * self.rows <= _WORD)

  @property
  def listed(self) -> int:
    """Length of lists: the K chosen and the first that is not, for the cutoff."""
    return self.config.top_k + 1

  @property
  def chosen_rows(self) -> int:
    """K, rounded up to whole registers."""
    return pl.cdiv(self.config.top_k, _SUBLANES) * _SUBLANES

  @property
  def planes(self) -> int:
    """Bits that one position of a counter can reach: columns of all blocks."""
    return (self.grid * self.blocks * self.columns).bit_length()

  @property
  def grouped(self) -> bool:
    return self.config.group_top_k < self.config.num_groups

  @property
  def segments(self) -> int:
    """Parts of a sublane's rows that belong to different groups."""
    if not self.grouped:
      return 1
    return max(1, self.config.num_groups // _SUBLANES)

  @property
  def segment_rows(self) -> int:
    return self.rows // self.segments

  @property
  def logit_space(self) -> bool:
    config = self.config
    return config.score_after_top_k or config.bias_space == "logits"

  @property
  def row_softmax(self) -> bool:
    """Whether scores need the maximum and sum over all experts of a token."""
    config = self.config
    return config.score_fn == "softmax" and not config.score_after_top_k

  def buffers(self) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name, shape and dtype of every scratch buffer."""
    c, seg = self.columns, self.segments
    f32, i32 = jnp.float32, jnp.int32
    rows = _SUBLANES * self.rows
    by_column, dense = c * _PITCH, _SUBLANES * self.column_pitch
    chosen = self.chosen_rows // _SUBLANES
    buffers: dict[str, tuple[tuple[int, ...], Any]] = {
      "transposed": ((2, _SUBLANES * self.row_pitch, _LANES), f32),
      "logits": ((c, rows, _LANES), f32),
      "chosen_from": ((c, rows, _LANES), f32),
      "bias": ((_SUBLANES * self.row_pitch, _LANES), f32),
      "bias_row": ((1, pl.cdiv(rows, _LANES) * _LANES), f32),
      "lists": ((seg * self.listed * by_column, _LANES), f32),
      "not_below": ((seg * dense, _LANES), f32),
      "above": ((seg * dense, _LANES), f32),
      "bits_not_below": ((self.words * by_column, _LANES), i32),
      "bits_above": ((self.words * by_column, _LANES), i32),
      "idx": ((self.chosen_rows * self.column_pitch, _LANES), i32),
      "weights": ((self.chosen_rows * self.column_pitch, _LANES), f32),
      "chosen": ((self.chosen_rows * self.column_pitch, _LANES), f32),
      "picked": ((chosen * by_column, _LANES), f32),
      "peak": ((c, _LANES), f32),
      "inverse_total": ((c, _LANES), f32),
      "cutoff": ((c, _LANES), f32),
      "valid": ((c, _LANES), i32),
      "planes": ((self.words, self.planes, _SUBLANES, _LANES), i32),
    }
    if self.width:
      buffers["projected"] = (self.projected_rows, self.block), f32
    if self.config.histogram:
      words = self.rows, histogram_tpu.WORDS, _SUBLANES, _LANES
      buffers["distances"] = words, i32
    return buffers


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
  if pltpu.is_tpu_device() and pltpu.get_tpu_info().generation < 6:
    return "TPUs before v6e are faster with the projection apart"
  if width % _LANES:
    return f"D must be a multiple of {_LANES}, got {width}"
  plan = _Plan(config=config, tokens=_LANES * _SUBLANES, width=width)
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
  return _Plan(config=config, tokens=tokens).grid


def runs_here() -> bool:
  """Whether JAX runs on a TPU that has the gathers: v5e, v5p or newer.

  Returns:
    True or False; on v4 Mosaic does not compile the kernel.
  """
  if jax.default_backend() != "tpu":
    return False
  return pltpu.get_tpu_info().generation >= 5


def _divides_in_software(interpret):
  """Whether an inverse is approximate: on TPUs before v6e, or not known."""
  if interpret:
    return False
  return not pltpu.is_tpu_device() or pltpu.get_tpu_info().generation < 6


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
) -> tuple[Any, ...]:
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
    `expert_idx` `[T, K]` int32, `weights` `[T, K]` float32, `load` `[E]` int32,
    `cutoff` `[T]` float32, `histogram` `[E, 16]` int32 or None, and, if asked for,
    the logits of the chosen experts, `[T, K]` float32, or their scores if those
    depend on all logits. No gradient is defined.
  """
  plan = _Plan(
    config=config,
    tokens=logits.shape[0],
    has_bias=expert_bias is not None,
    has_mask=token_mask is not None,
    with_chosen=with_chosen,
    interpret=bool(interpret),
    divides_in_software=_divides_in_software(interpret),
  )
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
  kernel: jax.Array,
  expert_bias: jax.Array | None,
  token_mask: jax.Array | None,
  *,
  config: Any,
  with_chosen: bool = False,
  interpret: Any = False,
) -> tuple[Any, ...]:
  """As `route`, of the logits `tokens @ kernel`, which are not written to HBM.

  Args:
    tokens: `[T, D]` bfloat16.
    kernel: `[D, E]` floating point, taken as float32.
    expert_bias: `[E]` float32, or None.
    token_mask: `[T]` bool, or None.
    config: one for which this is no `unsupported_projection`; static.
    with_chosen: as in `route`.
    interpret: as in `route`.

  Returns:
    What `route` does. Products are exact, and their sums float32.
  """
  plan = _Plan(
    config=config,
    tokens=tokens.shape[0],
    width=tokens.shape[1],
    has_bias=expert_bias is not None,
    has_mask=token_mask is not None,
    with_chosen=with_chosen,
    interpret=bool(interpret),
    divides_in_software=_divides_in_software(interpret),
  )
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
  operands = [tokens, *_in_parts(plan, kernel)]
  return _call(plan, operands, in_specs, expert_bias, token_mask, interpret)


def _in_parts(plan, kernel):
  """`[E', D]` bfloat16, of what the earlier ones left of `[D, E]` float32."""
  pad = plan.projected_rows - plan.num_experts
  rest = jnp.pad(kernel.astype(jnp.float32).T, ((0, pad), (0, 0)))
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
    empty = jnp.zeros((0, k), jnp.int32), jnp.zeros((0, k), jnp.float32)
    others = jnp.zeros((e,), jnp.int32), jnp.zeros((0,), jnp.float32)
    none = jnp.zeros((e, histogram_tpu.BINS), jnp.int32)
    counts = none if config.histogram else None
    return *empty, *others, counts, *(empty[1:] if with_chosen else ())
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
  bins = _SUBLANES * plan.rows, histogram_tpu.BINS
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
  counts = others.pop(0)[:e] if config.histogram else None
  chosen = [x.T for x in others]
  return idx.T, weights.T, load, cutoff.reshape(t), counts, *chosen


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
      _spread_bias(plan, bias_ref, buf)
    if histogram_ref is not None:
      buf.distances[...] = jnp.zeros_like(buf.distances)
      histogram_ref[...] = jnp.zeros_like(histogram_ref)

  outputs = idx_ref, weights_ref, cutoff_ref, chosen_ref
  for b in range(plan.blocks):
    _route_block(plan, step, b, logits_ref, mask_ref, outputs, buf)
  if plan.width:
    _project(plan, inputs_ref, parts_refs, buf)
  if histogram_ref is not None:
    each_row = functools.partial(_each, plan, plan.rows)
    steps = histogram_tpu.FLUSH // plan.blocks
    flush = step % steps == steps - 1

    @pl.when(flush | (step == plan.grid - 1))
    def _flush():
      each_row(
        lambda r: histogram_tpu.add_up(
          buf.distances, r, plan.rows, histogram_ref
        )
      )
      buf.distances[...] = jnp.zeros_like(buf.distances)

  @pl.when(step == plan.grid - 1)
  def _finish():
    _write_load(plan, buf, load_ref)


def _route_block(plan, step, b, logits_ref, mask_ref, outputs, buf):
  """Routes block b of a step: 1024 tokens."""
  tokens = pl.ds(b * plan.block, plan.block)
  if plan.blocks > 1:
    at = (slice(None), tokens) if plan.transposed else (tokens, slice(None))
    logits_ref = logits_ref.at[at]
    outputs = [x if x is None else x.at[:, tokens] for x in outputs]
    if mask_ref is not None:
      mask_ref = mask_ref.at[pl.ds(b * plan.columns, plan.columns)]
  each_column = functools.partial(_each, plan, plan.columns)
  each_column(lambda c: _score_column(plan, c, logits_ref, buf))
  kept = _threshold(plan, buf)
  each_column(lambda c: _compare_column(plan, c, buf))
  chosen = _pull_bits(plan, _settle_ties(plan, buf), buf)
  each_column(lambda c: _gather_column(plan, c, buf))
  _weigh(plan, step * plan.blocks + b, chosen, kept, mask_ref, buf)
  each_column(lambda c: _write_column(plan, c, buf, *outputs))
  _count(plan, buf)
  if plan.config.histogram:
    _store_prices(plan, kept, buf)
    _each(plan, plan.rows, lambda r: _count_distances(plan, r, buf))


def _each(plan, count, body):
  """Calls `body` with 0 to `count` - 1."""
  if plan.interpret:
    # A CPU compiles it slowly unrolled, or as part of what surrounds it.
    count = _pin(plan, jnp.int32(count))
    lax.fori_loop(jnp.int32(0), count, lambda i, _: body(i), None)
  else:
    for i in range(count):
      body(i)


def _project(plan, tokens_ref, parts_refs, buf):
  """The logits of the next block, [E', tokens]."""
  rows = plan.projected_rows
  # As one operand, so that tokens are loaded into the MXU once.
  logits = lax.dot_general(
    jnp.concatenate([ref[...] for ref in parts_refs]),
    tokens_ref[...],
    dimension_numbers=(((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  rest = logits[rows : 2 * rows] + logits[2 * rows :]
  buf.projected[...] = _pin(plan, logits[:rows] + rest)


# Buffers and layouts.


def _iota(axis):
  return lax.broadcasted_iota(jnp.int32, (_SUBLANES, _LANES), axis)


def _dense(ref, row, plan):
  """A row of every column, of a buffer that was stored by columns."""
  return _pin(plan, ref[pl.ds(row, plan.columns, stride=_PITCH), :])


def _column(ref, row, c, plan):
  """8 rows of column c, of a buffer whose rows were stored dense."""
  start = row * plan.column_pitch + c
  return _pin(plan, ref[pl.ds(start, _SUBLANES, stride=plan.column_pitch), :])


def _column_rows(row, c, plan):
  """Where column c of the 8 rows from `row` on is, in a buffer by columns."""
  start = row // _SUBLANES * plan.columns * _PITCH
  return pl.ds(start + c * _PITCH, _SUBLANES)


def _dense_rows(row, plan):
  return pl.ds(row * plan.column_pitch, plan.columns)


def _store_experts(plan, ref, first, tile):
  """Stores experts `first`, ... `[n, 128]` to their chunks."""
  end = min(first + tile.shape[0], plan.num_experts)
  e = first
  while e < end:
    chunk, r = divmod(e, plan.rows)
    n = min(plan.rows - r, end - e)
    ref[pl.ds(chunk * plan.row_pitch + r, n), :] = tile[e - first :][:n]
    e += n


def _experts(plan, ref, r):
  """Row r of all chunks, [8, 128]."""
  return ref[pl.ds(r, _SUBLANES, stride=plan.row_pitch), :]


def _spread_bias(plan, bias_ref, buf):
  """The bias of every expert, the same on all lanes; a NaN selects nothing."""
  bias = bias_ref[...].reshape(1, plan.num_experts)
  buf.bias_row[:, : plan.num_experts] = jnp.where(
    jnp.isnan(bias), _NEG_INF, bias
  )
  for first in range(0, plan.num_experts, _LANES):
    row = buf.bias_row[:, first : first + _LANES]
    tile = jnp.broadcast_to(row, (_LANES, _LANES)).T
    _store_experts(plan, buf.bias, first, tile)


# Scores.


def _prepare(plan, logits):
  """Multiplier and soft cap; -inf stays -inf."""
  config = plan.config
  if config.logit_multiplier != 1.0:
    logits = logits * np.float32(config.logit_multiplier)
  if config.logit_soft_cap is not None:
    cap = np.float32(config.logit_soft_cap)
    capped = cap * jnp.tanh(logits / cap)
    logits = jnp.where(logits == _NEG_INF, _NEG_INF, capped)
  return logits


def _score(plan, logits, peak=0.0, inverse_total=1.0):
  """Scores of prepared logits; the softmax of a row needs its two statistics."""
  if plan.config.score_fn == "sigmoid":
    scores = _sigmoid(plan, logits)
  elif plan.config.score_fn == "softmax":
    scores = jnp.exp(logits - peak) * inverse_total
  else:
    # sqrt(softplus(x)); below -15 that is exp(x / 2) to the last bit or so.
    near = jnp.sqrt(
      jnp.maximum(logits, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    )
    scores = jnp.where(logits < -15.0, jnp.exp(logits / 2), near)
  return _pin(plan, scores)


def _sigmoid(plan, x):
  if not plan.divides_in_software:
    return jax.nn.sigmoid(x)
  # One Newton step, without the special cases of a division, of which only
  # infinity can come up.
  divisor = 1.0 + jnp.exp(-x)
  divisor = jnp.where(divisor > _LARGE, _LARGE, divisor)
  inverse = _reciprocal(divisor, approx=True)
  return inverse + inverse * (1.0 - divisor * inverse)


def _pin(plan, x):
  """Keeps XLA from computing `x` anew, with other bits, where it is used.

  Interpreted only: Mosaic has no such freedom, and no barrier. It also keeps
  the steps of a kernel apart, which XLA would be long in compiling as one.
  """
  return lax.optimization_barrier(x) if plan.interpret else x


def _bias_scores(plan, logits, scores, bias):
  """Selection scores: never NaN, and -inf wherever the logit is -inf or NaN."""
  selection = scores if bias is None else scores + bias
  if plan.logit_space:
    valid = selection > _NEG_INF
  else:
    valid = logits > _NEG_INF
    if plan.config.score_fn != "sigmoid":
      valid = valid & (selection > _NEG_INF)
  return _pin(plan, jnp.where(valid, selection, _NEG_INF))


def _score_column(plan, c, logits_ref, buf):
  """Fills a column of `chosen_from`, and every sublane's list of the best."""
  tokens = pl.ds(c * _LANES, _LANES)
  ref = buf.transposed.at[c % 2]
  if plan.transposed:
    tile = logits_ref[:, tokens].astype(jnp.float32)
    _store_experts(plan, ref, 0, tile)
  else:
    for first in range(0, plan.num_experts, _LANES):
      tile = logits_ref[tokens, first : first + _LANES].astype(jnp.float32)
      _store_experts(plan, ref, first, tile.T)

  def logits(r):
    x = _prepare(plan, _experts(plan, ref, r))
    if (_SUBLANES - 1) * plan.rows + r >= plan.num_experts:
      expert = _iota(0) * plan.rows + r
      x = jnp.where(expert < plan.num_experts, x, _NEG_INF)
    return x

  statistics = ()
  if plan.row_softmax:
    statistics = _softmax_statistics(plan, logits)
    for row, value in zip(
      (buf.peak, buf.inverse_total), statistics, strict=True
    ):
      row[pl.ds(c, 1), :] = value

  def selection(r):
    x = logits(r)
    buf.logits[c, pl.ds(r * _SUBLANES, _SUBLANES), :] = _experts(plan, ref, r)
    scores = x if plan.logit_space else _score(plan, x, *statistics)
    bias = _experts(plan, buf.bias, r) if plan.has_bias else None
    x = _bias_scores(plan, x, scores, bias)
    buf.chosen_from[c, pl.ds(r * _SUBLANES, _SUBLANES), :] = x
    return x

  rows, listed = plan.segment_rows, plan.listed
  run = min(_SUBLANES, 1 << (listed - 1).bit_length())
  for segment in range(plan.segments):
    best = []
    for first in range(0, rows, run):
      start = segment * rows
      here = range(start + first, start + min(rows, first + run))
      part = networks.sort([selection(r) for r in here])[:listed]
      best = networks.merge(best, part, listed)
    for i, value in enumerate(best):
      start = (segment * listed + i) * plan.columns * _PITCH
      buf.lists[pl.ds(start + c * _PITCH, _SUBLANES), :] = value


def _softmax_statistics(plan, logits):
  """Row maximum and 1 / row sum over the logits that are not NaN, [1, 128]."""
  rows = [logits(r) for r in range(plan.rows)]
  rows = [jnp.where(x > _NEG_INF, x, _NEG_INF) for x in rows]
  peak = functools.reduce(jnp.maximum, rows)
  peak = jnp.max(peak, axis=0, keepdims=True)
  peak = jnp.where(peak == _NEG_INF, 0.0, peak)
  total = functools.reduce(jnp.add, [jnp.exp(x - peak) for x in rows])
  total = jnp.sum(total, axis=0, keepdims=True)
  return peak, 1.0 / jnp.where(total == 0.0, 1.0, total)


# The threshold and the bits.


def _threshold(plan, buf):
  """Writes the K-th largest selection score and the cutoff; the groups kept."""
  listed = plan.listed
  pitch = plan.columns * _PITCH
  lists = [
    [
      _dense(buf.lists, (segment * listed + i) * pitch + s, plan)
      for i in range(min(listed, plan.segment_rows))
    ]
    for s in range(_SUBLANES)
    for segment in range(plan.segments)
  ]
  kept = None
  if plan.grouped:
    size = len(lists) // plan.config.num_groups
    lists = [
      _merge_all(lists[i : i + size], listed)
      for i in range(0, len(lists), size)
    ]
    kept = _keep_groups(plan, lists)
    lists = [
      [jnp.where(keep, x, _NEG_INF) for x in group]
      for keep, group in zip(kept, lists, strict=True)
    ]
  half = len(lists) // 2
  best = networks.largest(
    _merge_all(lists[:half], listed), _merge_all(lists[half:], listed), listed
  )
  # The two smallest of them.
  cutoff = threshold = jnp.full_like(best[0], np.float32(np.inf))
  for x in best:
    threshold = jnp.minimum(threshold, jnp.maximum(cutoff, x))
    cutoff = jnp.minimum(cutoff, x)
  if len(best) < listed:
    cutoff, threshold = jnp.full_like(cutoff, _NEG_INF), cutoff
  # Not -0: the sign of a distance is that of a difference from it.
  buf.cutoff[...] = jnp.where(cutoff == 0.0, 0.0, cutoff)

  # No score is above, or not below, NaN. Where the groups that are kept have too
  # few experts, all masked ones tie, those of other groups included.
  outside = jnp.where(threshold == _NEG_INF, _NEG_INF, _NAN)
  for i in range(_SUBLANES * plan.segments):
    s, segment = divmod(i, plan.segments)
    rows = _dense_rows(segment * _SUBLANES + s, plan)
    not_below = above = threshold
    if kept is not None:
      keep = kept[_group(plan, s, segment)]
      not_below = jnp.where(keep, threshold, outside)
      above = jnp.where(keep, threshold, _NAN)
      buf.above[rows, :] = above
    buf.not_below[rows, :] = not_below
  return kept


def _group(plan, s, segment):
  """The group of a segment of the rows of sublane s."""
  part = s * plan.segments + segment
  return part * plan.config.num_groups // (_SUBLANES * plan.segments)


def _merge_all(lists, k):
  merge = functools.partial(networks.merge, count=k)
  while len(lists) > 1:
    pairs = [lists[i : i + 2] for i in range(0, len(lists), 2)]
    lists = [functools.reduce(merge, pair) for pair in pairs]
  return lists[0]


def _keep_groups(plan, lists):
  """Dense masks of the `group_top_k` best groups, the first ones on ties."""
  config = plan.config
  count = {
    "top1": 1,
    "top2": 2,
    "top_k": config.top_k // config.group_top_k,
  }[config.group_score]
  scores = []
  for best in lists:
    score = functools.reduce(jnp.add, best[:count])
    # inf + -inf: a group with an infinite member is the best there is.
    scores.append(jnp.where(best[0] == np.float32(np.inf), best[0], score))
  worse_than = [jnp.zeros_like(scores[0], jnp.int32) for _ in scores]
  for b in range(len(scores)):
    for a in range(b):
      first = jnp.where(scores[a] >= scores[b], 1, 0).astype(jnp.int32)
      worse_than[b] += first
      worse_than[a] += 1 - first
  return [n < config.group_top_k for n in worse_than]


def _compare_column(plan, c, buf):
  """The bits of scores that are not below the threshold, or above it."""
  for w in range(plan.words):
    # Both bits of a row in one word: row r at r and at r ^ 1. Even and odd rows
    # have a word each, which are shuffled into the two words wanted.
    halves = [jnp.zeros((_SUBLANES, _LANES), jnp.int32)] * 2
    for r in range(w * _WORD, min(plan.rows, (w + 1) * _WORD)):
      x = buf.chosen_from[c, pl.ds(r * _SUBLANES, _SUBLANES), :]
      row = r // plan.segment_rows * _SUBLANES
      not_below = _column(buf.not_below, row, c, plan)
      above = not_below
      if plan.grouped:
        above = _column(buf.above, row, c, plan)
      in_bit, both = _bit(r), _bit(r) | _bit(r ^ 1)
      in_or_out = jnp.where(x >= not_below, in_bit, np.int32(0))
      halves[r % 2] |= jnp.where(x > above, both, in_or_out)
    even, odd = halves
    rows = pl.ds((w * plan.columns + c) * _PITCH, _SUBLANES)
    buf.bits_not_below[rows, :] = (even & _EVEN) | (odd & _ODD)
    buf.bits_above[rows, :] = (lax.shift_right_logical(even, 1) & _EVEN) | (
      lax.shift_left(odd, 1) & _ODD
    )


def _bit(r):
  return np.uint32(1 << (r % _WORD)).astype(np.int32)


def _cells(plan, ref):
  """Lists of words, dense: of one sublane, or of several packed into a word."""
  pitch = plan.columns * _PITCH
  sublanes = [
    [_dense(ref, w * pitch + s, plan) for w in range(plan.words)]
    for s in range(_SUBLANES)
  ]
  if plan.packed == 1:
    return sublanes
  cells = []
  for first in range(0, _SUBLANES, plan.packed):
    word = sublanes[first][0]
    for i in range(1, plan.packed):
      word |= lax.shift_left(sublanes[first + i][0], _like(word, i * plan.rows))
    cells.append([word])
  return cells


def _store_cells(plan, ref, cells):
  """The inverse of `_cells`."""
  pitch = plan.columns * _PITCH
  for s in range(_SUBLANES):
    cell, i = divmod(s, plan.packed)
    for w, word in enumerate(cells[cell]):
      if plan.packed > 1:
        shifted = lax.shift_right_logical(word, _like(word, i * plan.rows))
        word = shifted & np.int32((1 << plan.rows) - 1)
      rows = pl.ds(w * pitch + s, plan.columns, stride=_PITCH)
      ref[rows, :] = word


def _like(x, value):
  return jnp.full_like(x, value)


def _settle_ties(plan, buf):
  """Cells with K bits per token, which replace the bits not below."""
  not_below = _cells(plan, buf.bits_not_below)
  above = _cells(plan, buf.bits_above)
  left = plan.config.top_k - _population(w for cell in above for w in cell)
  # Of the words with equal ones the first are taken whole, then one in part.
  taken = []
  part = wanted = jnp.zeros_like(left)
  for cell, cell_above in zip(not_below, above, strict=True):
    for word, word_above in zip(cell, cell_above, strict=True):
      equal = word & ~word_above
      n = lax.population_count(equal)
      partly = (left > 0) & (left < n)
      part = jnp.where(partly, equal, part)
      wanted = jnp.where(partly, left, wanted)
      taken.append((word, word_above, n <= left, partly))
      left = jnp.maximum(left - n, 0)
  # How many low bits of it have `wanted` ones: a binary search.
  low = jnp.zeros_like(left)
  for width in (16, 8, 4, 2, 1):
    longer = low + width
    few = lax.population_count(part & _ones(longer)) <= wanted
    low = jnp.where(few, longer, low)
  part = part & _ones(low)

  words = [
    jnp.where(whole, word, jnp.where(partly, above | part, above))
    for word, above, whole, partly in taken
  ]
  cells = [words[i : i + plan.words] for i in range(0, len(words), plan.words)]
  _store_cells(plan, buf.bits_not_below, cells)
  return cells


def _population(words):
  return functools.reduce(jnp.add, map(lax.population_count, words))


def _ones(n):
  """Words with the n lowest bits set, n < 32."""
  return lax.shift_left(jnp.ones_like(n), n) - 1


def _pull_bits(plan, cells, buf):
  """The K experts of every token, in index order."""
  # The cell being emptied, and where the next one that is not empty starts.
  size = plan.packed * plan.rows
  current = [jnp.zeros_like(cells[0][0])] * plan.words
  start = jnp.zeros_like(current[0])
  following, after = [], _like(start, len(cells) * size)
  for i in reversed(range(len(cells))):
    following.insert(0, after)
    some = functools.reduce(jnp.bitwise_or, cells[i]) != 0
    after = jnp.where(some, np.int32(i * size), after)

  chosen = []
  for _ in range(plan.config.top_k):
    empty = functools.reduce(jnp.bitwise_or, current) == 0
    start = jnp.where(empty, after, start)
    entered = jnp.where(empty, after, np.int32(-1))
    for i, cell in enumerate(cells):
      # The i-th cell is entered by the first bit or by a later one.
      here = entered == np.int32(i * size)
      current = [
        jnp.where(here, a, b) for a, b in zip(cell, current, strict=True)
      ]
      after = jnp.where(here, following[i], after)
    # The lowest bit of the first word that has one.
    word, at = current[-1], np.int32((plan.words - 1) * _WORD)
    for w in reversed(range(plan.words - 1)):
      some = current[w] != 0
      word = jnp.where(some, current[w], word)
      at = jnp.where(some, np.int32(w * _WORD), at)
    chosen.append(start + at + lax.population_count((word & -word) - 1))
    buf.idx[_dense_rows(len(chosen) - 1, plan), :] = chosen[-1]
    none = None
    for w, word in enumerate(current):
      less = word & (word - 1)
      current[w] = less if none is None else jnp.where(none, less, word)
      none = word == 0 if none is None else none & (word == 0)
  return chosen


# The chosen experts.


def _quotient(expert, n):
  """Indices of experts, below 1024, over n."""
  if n & (n - 1) == 0:
    return lax.shift_right_logical(expert, _like(expert, n.bit_length() - 1))
  return (expert * np.int32(2**20 // n + 1)) >> 20


def _gather_column(plan, c, buf):
  """The logits of the chosen experts."""
  for first in range(0, plan.chosen_rows, _SUBLANES):
    expert = _column(buf.idx, first, c, plan)
    chunk = _quotient(expert, plan.rows)
    r = expert - chunk * np.int32(plan.rows)
    bits = [(r & (1 << i)) != 0 for i in range((plan.rows - 1).bit_length())]
    rows = _column_rows(first, c, plan)
    buf.picked[rows, :] = _pick(plan, buf.logits.at[c], chunk, bits, 0)


def _pick(plan, ref, chunk, bits, start):
  """Of the rows from `start` on, the one of number `bits`, at its chunk."""
  if not bits:
    return jnp.take_along_axis(
      ref[pl.ds(start * _SUBLANES, _SUBLANES), :],
      chunk,
      axis=0,
      mode="promise_in_bounds",
    )
  # Depth first: breadth first, the compiler runs out of registers.
  *lower, bit = bits
  low = _pick(plan, ref, chunk, lower, start)
  middle = start + (1 << len(lower))
  if middle >= plan.rows:
    return low
  return jnp.where(bit, _pick(plan, ref, chunk, lower, middle), low)


def _weigh(plan, step, chosen, kept, mask_ref, buf):
  """Sorts the chosen experts by score and weighs them."""
  config, pitch = plan.config, plan.columns * _PITCH
  idx, selection, scores, picked = list(chosen), [], [], []
  for k, expert in enumerate(idx):
    row = k // _SUBLANES * pitch + k % _SUBLANES
    picked.append(_dense(buf.picked, row, plan))
    logits = _prepare(plan, picked[-1])
    if plan.row_softmax:
      score = _score(plan, logits, buf.peak[...], buf.inverse_total[...])
    elif config.score_fn == "softmax":
      score = logits  # over the chosen ones, below
    else:
      score = _score(plan, logits)
    bias = _look_up_bias(plan, expert, buf) if plan.has_bias else None
    x = logits if plan.logit_space else score
    x = _bias_scores(plan, logits, x, bias)
    if kept is not None:
      x = jnp.where(_in_kept_group(plan, expert, kept), x, _NEG_INF)
    selection.append(x)
    scores.append(score)

  if plan.row_softmax:
    picked = list(scores)
  sorted_ = [selection, idx, scores] + ([picked] if plan.with_chosen else [])
  for i, j in networks.exchanges(config.top_k):
    later = (selection[i] == selection[j]) & (idx[i] > idx[j])
    swap = (selection[i] < selection[j]) | later
    for x in sorted_:
      x[i], x[j] = jnp.where(swap, x[j], x[i]), jnp.where(swap, x[i], x[j])

  weights = _normalize(plan, scores)
  bad = jnp.isnan(functools.reduce(jnp.add, weights))
  valid = jnp.where(bad, 0, -1).astype(jnp.int32)
  weights = [jnp.where(bad, _NAN, w) for w in weights]
  if plan.has_mask:
    real = mask_ref[...] != 0
    valid = jnp.where(real, valid, 0)
    weights = [jnp.where(real, w, 0.0) for w in weights]
  if plan.tokens % plan.step_tokens:
    shape = (plan.columns, _LANES)
    token = lax.broadcasted_iota(jnp.int32, shape, 0) * _LANES
    token += lax.broadcasted_iota(jnp.int32, shape, 1) + step * plan.block
    valid = jnp.where(token < plan.tokens, valid, 0)
  buf.valid[...] = valid
  for k in range(config.top_k):
    buf.idx[_dense_rows(k, plan), :] = idx[k]
    buf.weights[_dense_rows(k, plan), :] = weights[k]
    if plan.with_chosen:
      buf.chosen[_dense_rows(k, plan), :] = picked[k]


def _look_up_bias(plan, idx, buf):
  """The bias of experts `[columns, 128]`, from 128 lanes at a time."""
  # A gather from one row is not the kind that Mosaic takes.
  wide = jnp.broadcast_to(idx, (max(2, plan.columns), _LANES))
  found = jnp.zeros(wide.shape, jnp.float32)
  for first in range(0, plan.num_experts, _LANES):
    row = jnp.broadcast_to(buf.bias_row[:, first : first + _LANES], wide.shape)
    here = jnp.take_along_axis(
      row, wide & (_LANES - 1), axis=1, mode="promise_in_bounds"
    )
    found = here if first == 0 else jnp.where(wide >= first, here, found)
  return found[: plan.columns]


def _in_kept_group(plan, expert, kept):
  """Whether an expert is in a group that is kept."""
  group = _quotient(expert, plan.config.group_size)
  bits = functools.reduce(
    jnp.bitwise_or,
    [jnp.where(keep, _bit(g), np.int32(0)) for g, keep in enumerate(kept)],
  )
  return lax.shift_right_logical(bits, group) & 1 != 0


def _normalize(plan, scores):
  """Weights of the chosen experts' scores, or logits under a softmax of them."""
  config = plan.config
  if config.score_fn == "softmax" and config.score_after_top_k:
    peak = functools.reduce(jnp.maximum, scores)
    peak = jnp.where(peak == _NEG_INF, 0.0, peak)
    scores = [jnp.exp(x - peak) for x in scores]
    total = functools.reduce(jnp.add, scores)
    total = jnp.where(total == 0.0, 1.0, total)
    scores = [x / total for x in scores]
  if not config.normalize_weights:
    return [x * np.float32(config.scaling_factor) for x in scores]
  total = functools.reduce(jnp.add, scores) * np.float32(_SCALE)
  total += np.float32(config.norm_eps * _SCALE)
  factor = np.float32(config.scaling_factor * _SCALE) / total
  return [x * factor for x in scores]


def _write_column(plan, c, buf, idx_ref, weights_ref, cutoff_ref, chosen_ref):
  tokens = pl.ds(c * _LANES, _LANES)
  k, pitch = plan.config.top_k, plan.column_pitch
  for first in range(0, k, _SUBLANES):
    n = min(_SUBLANES, k - first)
    rows = pl.ds(first * pitch + c, n, stride=pitch)
    idx_ref[pl.ds(first, n), tokens] = buf.idx[rows, :]
    weights_ref[pl.ds(first, n), tokens] = buf.weights[rows, :]
    if plan.with_chosen:
      chosen_ref[pl.ds(first, n), tokens] = buf.chosen[rows, :]
  cutoff_ref[:, tokens] = buf.cutoff[pl.ds(c, 1), :]


# The loads.


def _count(plan, buf):
  """Adds the bits of the block to the planes, a binary counter per bit."""
  for w in range(plan.words):
    planes = [buf.planes[w, i] for i in range(plan.planes)]
    for c in range(plan.columns):
      rows = pl.ds((w * plan.columns + c) * _PITCH, _SUBLANES)
      valid = buf.valid[pl.ds(c, 1), :]
      carry = buf.bits_not_below[rows, :] & jnp.broadcast_to(
        valid, (_SUBLANES, _LANES)
      )
      for i in range(plan.planes):
        planes[i], carry = planes[i] ^ carry, planes[i] & carry
    for i, plane in enumerate(planes):
      buf.planes[w, i] = plane


def _write_load(plan, buf, load_ref):
  """Adds the counters of all lanes, and puts the experts on lanes."""
  # The row whose load goes to a lane, if it has one of its sublane.
  wanted = (_iota(1) - _iota(0) * plan.rows) & (_LANES - 1)
  load = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
  for w in range(plan.words):
    rows = range(w * _WORD, min(plan.rows, (w + 1) * _WORD))
    # Eight planes at a time: four counts in a word, exact sums in float32.
    for first in range(0, plan.planes, 8):
      totals = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
      for r in rows[:8]:
        four = jnp.zeros_like(load)
        for i in range(first, min(plan.planes, first + 8)):
          bits = lax.shift_right_logical(
            buf.planes[w, i], _like(load, r % _WORD)
          )
          four += lax.shift_left(bits & 0x01010101, _like(load, i - first))
        for shift in range(0, _WORD, 8):
          row = r + shift
          if row in rows:
            count = lax.shift_right_logical(four, _like(load, shift)) & 0xFF
            total = jnp.sum(count.astype(jnp.float32), axis=1, keepdims=True)
            totals = jnp.where(wanted == row, total, totals)
      load += lax.shift_left(totals.astype(jnp.int32), _like(load, first))
  for first in range(0, plan.num_experts, _LANES):
    n = min(_LANES, plan.num_experts - first)
    mine = _quotient(first + _iota(1), plan.rows) == _iota(0)
    total = jnp.sum(jnp.where(mine, load, 0), axis=0, keepdims=True)
    load_ref[pl.ds(first, n)] = total[0, :n]


# The distances.


def _store_prices(plan, kept, buf):
  """Cutoffs in place of the bounds `above`; NaN where nothing is to be counted."""
  price = jnp.where(buf.valid[...] != 0, buf.cutoff[...], _NAN)
  for s in range(_SUBLANES):
    for segment in range(plan.segments):
      mine = price
      if kept is not None:
        mine = jnp.where(kept[_group(plan, s, segment)], price, _NAN)
      buf.above[_dense_rows(segment * _SUBLANES + s, plan), :] = mine


def _count_distances(plan, r, buf):
  """Adds the block's distances of row r to the bytes of their bins."""
  experts = pl.ds(r * _SUBLANES, _SUBLANES)
  row = r // plan.segment_rows * _SUBLANES
  words = histogram_tpu.count_row(
    plan.columns,
    lambda c: buf.chosen_from[c, experts, :],
    lambda c: _column(buf.above, row, c, plan),
  )
  for i, word in enumerate(words):
    buf.distances[r, i] += word
