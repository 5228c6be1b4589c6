# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The static shape of one call of the TPU routing kernel, and its memory."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxroute.kernels.tpu import device, networks
from jaxroute.kernels.tpu.route import histogram

WORD = 32
PITCH = device.SUBLANES + 1
"""Of a column in a buffer that is stored by columns and loaded dense."""

PARTS = 3
"""Numbers of bfloat16 that add up to one of float32."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
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
    return min(most, max(1, pl.cdiv(self.tokens, device.LANES)))

  @property
  def block(self) -> int:
    return self.columns * device.LANES

  @property
  def blocks(self) -> int:
    """Of a grid step: one of two begins while the other ends.

    The more experts, the longer are the first logits in coming, so that it takes a
    longer grid to win by that.
    """
    count = pl.cdiv(self.tokens, self.block)
    enough = self.num_experts <= 512 and count >= max(4, self.num_experts // 32)
    return 2 if enough and count % 2 == 0 and not self.width else 1

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
    return self.width > 0 or self.num_experts % device.LANES != 0

  @property
  def projected_rows(self) -> int:
    """E, rounded up to whole registers of bfloat16."""
    return pl.cdiv(self.num_experts, 2 * device.SUBLANES) * 2 * device.SUBLANES

  @property
  def rows(self) -> int:
    """R, experts per sublane; those past E are masked."""
    return pl.cdiv(self.num_experts, device.SUBLANES)

  @property
  def row_pitch(self) -> int:
    return self.rows | 1

  @property
  def column_pitch(self) -> int:
    return self.columns | 1

  @property
  def words(self) -> int:
    """Words of bits per sublane."""
    return pl.cdiv(self.rows, WORD)

  @property
  def packed(self) -> int:
    """Sublanes whose bits fit one word in the dense layout."""
    return next(n for n in (8, 4, 2, 1) if n == 1 or n * self.rows <= WORD)

  @property
  def listed(self) -> int:
    """Length of lists: the K chosen and the first that is not, for the cutoff."""
    return self.config.top_k + 1

  @property
  def levels(self) -> int:
    """Of comparisons whose winners and losers are merged apart."""
    return 0 if self.grouped else 2

  @property
  def list_sizes(self) -> list[int]:
    """Lengths of the lists of one segment of a sublane."""
    return networks.sizes(self.segment_rows, self.listed, self.levels)

  @property
  def chosen_rows(self) -> int:
    """K, rounded up to whole registers."""
    return pl.cdiv(self.config.top_k, device.SUBLANES) * device.SUBLANES

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
    return max(1, self.config.num_groups // device.SUBLANES)

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
    rows = device.SUBLANES * self.rows
    by_column, dense = c * PITCH, device.SUBLANES * self.column_pitch
    chosen = self.chosen_rows // device.SUBLANES
    buffers: dict[str, tuple[tuple[int, ...], Any]] = {
      "transposed": ((2, device.SUBLANES * self.row_pitch, device.LANES), f32),
      "logits": ((c, rows, device.LANES), f32),
      "chosen_from": ((c, rows, device.LANES), f32),
      "bias": ((device.SUBLANES * self.row_pitch, device.LANES), f32),
      "bias_row": ((1, pl.cdiv(rows, device.LANES) * device.LANES), f32),
      "lists": ((seg * sum(self.list_sizes) * by_column, device.LANES), f32),
      "not_below": ((seg * dense, device.LANES), f32),
      "above": ((seg * dense, device.LANES), f32),
      "bits_not_below": ((self.words * by_column, device.LANES), i32),
      "bits_above": ((self.words * by_column, device.LANES), i32),
      "idx": ((self.chosen_rows * self.column_pitch, device.LANES), i32),
      "weights": ((self.chosen_rows * self.column_pitch, device.LANES), f32),
      "chosen": ((self.chosen_rows * self.column_pitch, device.LANES), f32),
      "picked": ((chosen * by_column, device.LANES), f32),
      "peak": ((c, device.LANES), f32),
      "inverse_total": ((c, device.LANES), f32),
      "cutoff": ((c, device.LANES), f32),
      "valid": ((c, device.LANES), i32),
      "planes": ((self.words, self.planes, device.SUBLANES, device.LANES), i32),
    }
    if self.width:
      buffers["projected"] = (self.projected_rows, self.block), f32
    if self.config.histogram:
      words = self.rows, histogram.WORDS, device.SUBLANES, device.LANES
      buffers["distances"] = words, i32
    return buffers
