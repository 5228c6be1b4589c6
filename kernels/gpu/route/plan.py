# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The static sizes of a call of the routing kernel."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxroute import types
from jaxroute.kernels.gpu import twins
from jaxroute.kernels.gpu.threads import THREADS, WARP, Threads

_MAX_EXPERTS, _MAX_TOP_K, _MAX_GROUPS = 1024, 16, 32
# Shared memory that a block of a Hopper GPU may have.
_MAX_SHARED_BYTES = 227 * 1024
# Blocks of two such GPUs' worth of multiprocessors: fewer leave some idle.
_ENOUGH_BLOCKS = 4 * 132
# With so many experts a thread, shared memory has room for four blocks at once.
_FEW_EXPERTS = 64


def unsupported(config: types.RouterConfig) -> str | None:
  """Why the kernel cannot do what a router wants, or None if it can.

  Args:
    config: what to compute.

  Returns:
    The reason, for an error message.
  """
  if config.num_experts > _MAX_EXPERTS:
    return f"`num_experts` may be at most {_MAX_EXPERTS}, got {config.num_experts}"
  if config.top_k > _MAX_TOP_K:
    return f"`top_k` may be at most {_MAX_TOP_K}, got {config.top_k}"
  if config.limits_groups and config.num_groups > _MAX_GROUPS:
    return f"there may be at most {_MAX_GROUPS} groups, got {config.num_groups}"
  if config.logit_soft_cap is not None:
    # Mosaic's tanh is another than XLA's, and its last bits would change routes.
    return "`logit_soft_cap` is not supported"
  return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What a call computes, in sizes.

  A token is shared by `lanes` threads, each of which has a part of its experts: a
  *row*. A block has 128 rows, a *tile* of tokens.

  Attributes:
    config: what to compute.
    tokens: T.
    dtype: of the logits.
    has_bias: whether there is a bias.
    has_mask: whether there is a token mask.
    with_chosen: whether to return the logits of the chosen experts.
    with_rank: whether to return what `rank.py` finds the order of experts by.
    lanes: threads for a token: 1, 2, 4 or 8.
    interpret: whether the kernel is interpreted.
  """

  config: types.RouterConfig
  tokens: int
  dtype: Any
  has_bias: bool
  has_mask: bool
  with_chosen: bool
  with_rank: bool
  lanes: int
  interpret: bool

  @property
  def threads(self) -> Threads:
    """The operations of a thread."""
    return twins.Twins() if self.interpret else Threads()

  @property
  def num_experts(self) -> int:
    """E."""
    return self.config.num_experts

  @functools.cached_property
  def width(self) -> int:
    """Experts of a chunk, which are loaded and compared together."""
    return _width(self.config, self.dtype, self.lanes)

  @property
  def padded_experts(self) -> int:
    """E and more, a multiple of the chunks of a token."""
    unit = self.lanes * self.width
    return -(-self.num_experts // unit) * unit

  @property
  def part(self) -> int:
    """Experts of a row."""
    return self.padded_experts // self.lanes

  @property
  def chunks(self) -> int:
    """Chunks of a row."""
    return self.part // self.width

  @property
  def list_length(self) -> int:
    """Values to keep: the K largest and the next, the cutoff."""
    return min(self.config.top_k + 1, self.num_experts)

  @property
  def groups(self) -> int:
    """Expert groups of a row; 0 without a limit of groups."""
    if not self.config.limits_groups:
      return 0
    return self.config.num_groups // self.lanes

  @property
  def group_list_length(self) -> int:
    """Values to keep of a group."""
    return min(self.list_length, self.config.group_size)

  @property
  def tile_tokens(self) -> int:
    """Tokens of a tile."""
    return THREADS // self.lanes

  @property
  def warp_tokens(self) -> int:
    """Tokens of a warp."""
    return WARP // self.lanes

  @property
  def padded_tokens(self) -> int:
    """T and more: a tile at least, and whole tiles of 8 rows of memory."""
    unit = max(8 // self.lanes, 1)
    return max(-(-self.tokens // unit) * unit, self.tile_tokens)

  @property
  def tiles(self) -> int:
    """Blocks. The last tile ends with the last token and may begin in the one before."""
    return -(-self.tokens // self.tile_tokens)

  @property
  def slots(self) -> int:
    """Threads for the K chosen of a token."""
    return next(n for n in (4, 8, 16) if n >= self.config.top_k)

  @property
  def rounds(self) -> int:
    """Rounds in which a warp goes over the slots of its tokens."""
    return max(self.warp_tokens * self.slots // WARP, 1)

  @property
  def needs_softmax_sums(self) -> bool:
    """Whether the largest logit and the sum of all exponentials are needed."""
    config = self.config
    selects = config.needs_row_softmax and not config.selects_on_logits
    return selects or config.weighs_all_logits

  @property
  def bias_pitch(self) -> int:
    """Numbers from the bias of a part to the next: four more than these have.

    Threads of one token read the same place of their parts at once, which are then
    in different banks of memory.
    """
    return self.part + 4

  @property
  def count_pitch(self) -> int:
    """Counts of a tile in memory: of E experts and of what is not counted."""
    return -(-(self.num_experts + 1) // 8) * 8

  @property
  def super_tiles(self) -> int:
    """Tiles whose counts are also summed together; `order.rank` has them at once."""
    fitting = _MAX_SHARED_BYTES // (4 * (self.num_experts + 1)) - 1
    return min(max(8, -(-self.tiles // 256)), fitting)


def _widths(config: types.RouterConfig, dtype: Any) -> tuple[int, ...]:
  """Chunks that memory can be copied in, the widest first."""
  # A row of a chunk has to have 32 bytes.
  smallest = 32 // jnp.dtype(dtype).itemsize
  widths = [w for w in (32, 16, 8) if w >= smallest]
  # A wider chunk than the experts need is padding.
  return tuple(
    w for w in widths if w == smallest or config.num_experts > w // 2
  )


def _width(config: types.RouterConfig, dtype: Any, lanes: int) -> int:
  """The widest chunk that fits parts and groups, or else the widest."""
  widths, e = _widths(config, dtype), config.num_experts
  size = config.group_size if config.limits_groups else 0
  for width in widths:
    if e % (lanes * width) == 0 and (size % width == 0 or width % size == 0):
      return width
  return widths[0]


def _splits(config: types.RouterConfig, dtype: Any, lanes: int) -> bool:
  """Whether a token's experts can be shared by so many threads."""
  if lanes == 1:
    return True
  unit, e = lanes * _width(config, dtype, lanes), config.num_experts
  if config.limits_groups:
    # A group lies within a part.
    return e % unit == 0 and config.num_groups % lanes == 0
  # Experts are padded to a multiple of the smallest chunk at most.
  smallest = _widths(config, dtype)[-1]
  return -(-e // unit) * unit == -(-e // smallest) * smallest


def choose_lanes(config: types.RouterConfig, tokens: int, dtype: Any) -> int:
  """Threads for a token: as few as keep all multiprocessors busy.

  More threads a token cost instructions, for their lists have to be merged; fewer
  need more shared memory, so that fewer blocks run at once. On one H100, of 65,536
  tokens and 256 experts, a prototype with 1, 2, 4 and 8 took 61, 43, 38 and 50
  microseconds; of 4,096 tokens, with 4 and 8, 5.3 and 5.1.

  Args:
    config: what to compute.
    tokens: T.
    dtype: of the logits.

  Returns:
    1, 2, 4 or 8.
  """
  possible = [n for n in (1, 2, 4, 8) if _splits(config, dtype, n)]
  for lanes in possible:
    part = config.num_experts // lanes
    blocks = tokens * lanes // THREADS
    if part <= _FEW_EXPERTS and blocks >= _ENOUGH_BLOCKS:
      return lanes
  # Below a chunk of 32 experts a thread, merging is most of the work.
  large = [n for n in possible if config.num_experts // n >= 32]
  return max(large, default=1)
