# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The static sizes of a call of the routing kernel."""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp

from jaxroute import types
from jaxroute.kernels.gpu import twins
from jaxroute.kernels.gpu.threads import THREADS, WARP, Threads

MAX_SHARED_BYTES = 227 * 1024
"""Shared memory of a block on Hopper."""


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
    with_rank: whether to return ranks, and what `order.rank` needs for them.
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
    return twins.operations(self.interpret)

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
    """Blocks. The last tile ends with the last token, whatever the one before has."""
    return -(-self.tokens // self.tile_tokens)

  @property
  def shares_tokens(self) -> bool:
    """Whether a tile has tokens of another, or some that are not there."""
    return self.tiles * self.tile_tokens != self.tokens

  @property
  def slots(self) -> int:
    """Threads for the K chosen of a token."""
    return next(n for n in (4, 8, 16) if n >= self.config.top_k)

  @property
  def rounds(self) -> int:
    """Rounds in which a warp goes over the slots of its tokens."""
    return max(self.warp_tokens * self.slots // WARP, 1)

  @property
  def has_spare_lanes(self) -> bool:
    """Whether a warp has more lanes than slots of its tokens."""
    return self.warp_tokens * self.slots < WARP

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
    fits_groups = not size or size % width == 0 or width % size == 0
    if e % (lanes * width) == 0 and fits_groups:
      return width
  return widths[0]
