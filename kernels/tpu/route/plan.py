# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The static shape of one call of the TPU routing kernel."""

import dataclasses

from jax.experimental import pallas as pl

from jaxroute import types
from jaxroute.kernels import networks
from jaxroute.kernels.tpu import device

WORD_BITS = 32
"""Bits of the int32 words that hold one bit per expert."""

COLUMN_PITCH = device.SUBLANES + 1
"""Rows from a column's register to the next's, in a buffer by columns."""

_MAX_TOP_K = 16
_MAX_EXPERTS = 1024
_GROUPS = (2, 4, 8, 16, 24, 32)


def unsupported(config: types.RouterConfig) -> str | None:
  """Why the kernel cannot route this way, or None if it can.

  Args:
    config: static router description.

  Returns:
    The reason, for an error message.
  """
  if config.top_k > _MAX_TOP_K:
    return (
      f"`top_k` is at most {_MAX_TOP_K} in the TPU kernel, got {config.top_k}"
    )
  if config.num_experts > _MAX_EXPERTS:
    return (
      f"`num_experts` is at most {_MAX_EXPERTS} in the TPU kernel, got"
      f" {config.num_experts}"
    )
  groups_fit = (
    config.num_groups in _GROUPS and config.num_experts % device.SUBLANES == 0
  )
  if config.limits_groups and not groups_fit:
    return (
      "groups must be 2, 4, 8, 16, 24 or 32 in the TPU kernel and 8 divide"
      f" `num_experts`, got {config.num_groups} groups of"
      f" {config.num_experts} experts"
    )
  return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """The static shape of one call; R stands for `experts_per_sublane`.

  Attributes:
    config: static router description.
    tokens: T.
    width: D of the tokens that are projected here, or 0 if logits are given.
    has_bias: whether there is an `expert_bias`.
    has_mask: whether there is a `token_mask`.
    with_chosen: whether what the weights were made from is returned.
    interpret: whether the kernel is interpreted, compiled by XLA.
    divides_in_software: whether an inverse is approximate in hardware, and
      refined.
  """

  config: types.RouterConfig
  tokens: int
  width: int = 0
  has_bias: bool = True
  has_mask: bool = True
  with_chosen: bool = False
  interpret: bool = False
  divides_in_software: bool = False

  @property
  def num_experts(self) -> int:
    """E."""
    return self.config.num_experts

  @property
  def columns(self) -> int:
    """Columns of 128 tokens in a block; fewer for few tokens, or for memory."""
    most = 8 if self.num_experts <= 512 else 4
    return min(most, max(1, pl.cdiv(self.tokens, device.LANES)))

  @property
  def block_tokens(self) -> int:
    """Tokens that are routed at a time, 128 to 1024."""
    return self.columns * device.LANES

  @property
  def blocks_per_step(self) -> int:
    """Blocks of tokens per grid step: 1 or 2.

    With two, the second's loads and transposes overlap the first's last stages.
    The more experts there are, the longer it takes until the first logits have
    come, so that only a longer grid gains by this.
    """
    blocks = pl.cdiv(self.tokens, self.block_tokens)
    enough = max(4, self.num_experts // 32)
    is_long = self.num_experts <= 512 and blocks >= enough
    return 2 if is_long and blocks % 2 == 0 and not self.width else 1

  @property
  def step_tokens(self) -> int:
    """Tokens of a grid step."""
    return self.blocks_per_step * self.block_tokens

  @property
  def grid_steps(self) -> int:
    """Grid steps that route: each executes every operation once."""
    return pl.cdiv(self.tokens, self.step_tokens)

  @property
  def projection_lead(self) -> int:
    """Grid steps by which the projection of a block is ahead of its routing."""
    return 1 if self.width else 0

  @property
  def counter_bits(self) -> int:
    """Bits per counter: enough for one per column of the whole call."""
    steps = self.grid_steps * self.blocks_per_step
    return (steps * self.columns).bit_length()

  @property
  def experts_first(self) -> bool:
    """Whether the logits come as [E, T]: the layout XLA gives narrow rows."""
    return self.width > 0 or self.num_experts % device.LANES != 0

  @property
  def projected_experts(self) -> int:
    """E, rounded up to whole registers of bfloat16."""
    return pl.cdiv(self.num_experts, 2 * device.SUBLANES) * 2 * device.SUBLANES

  @property
  def experts_per_sublane(self) -> int:
    """R: also how many registers hold all experts, with padding past E."""
    return pl.cdiv(self.num_experts, device.SUBLANES)

  @property
  def segments_per_sublane(self) -> int:
    """Parts of a sublane's experts that belong to different groups."""
    if not self.config.limits_groups:
      return 1
    return max(1, self.config.num_groups // device.SUBLANES)

  @property
  def experts_per_segment(self) -> int:
    """R over the segments of a sublane."""
    return self.experts_per_sublane // self.segments_per_sublane

  @property
  def list_length(self) -> int:
    """K + 1: the chosen scores and the first that is not, for the cutoff."""
    return self.config.top_k + 1

  @property
  def network_levels(self) -> int:
    """Levels of comparisons whose winners and losers are listed apart."""
    return 0 if self.config.limits_groups else 2

  @property
  def list_sizes(self) -> list[int]:
    """Lengths of the lists of one segment of a sublane."""
    return networks.sizes(
      self.experts_per_segment, self.list_length, self.network_levels
    )

  # Pitches, in rows of 128 lanes, are odd: they spread loads over memory banks.

  @property
  def sublane_pitch(self) -> int:
    """Rows from a sublane's experts to the next's, in a buffer by expert."""
    return self.experts_per_sublane | 1

  @property
  def dense_pitch(self) -> int:
    """Rows from a dense register to the next, in a dense buffer."""
    return self.columns | 1

  @property
  def words_per_sublane(self) -> int:
    """Words that hold one bit for each expert of a sublane."""
    return pl.cdiv(self.experts_per_sublane, WORD_BITS)

  @property
  def sublanes_per_word(self) -> int:
    """Sublanes whose bits fit into one word, when packed: 8, 4, 2 or 1."""
    for sublanes in (8, 4, 2):
      if sublanes * self.experts_per_sublane <= WORD_BITS:
        return sublanes
    return 1

  @property
  def padded_top_k(self) -> int:
    """K, rounded up to whole registers."""
    return pl.cdiv(self.config.top_k, device.SUBLANES) * device.SUBLANES
