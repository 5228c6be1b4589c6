# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How tokens and parameters lie on a mesh."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

from jaxroute import checks

Exchange = Literal["ragged", "equal", "all_gather"]

# Fields of `Partition` that name one axis, and what None means.
_ONE_AXIS = {
  "expert_axis": "every device holds all experts",
  "fsdp_axis": "parameters are not sharded beside that",
  "tensor_axis": "no expert is cut",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Partition:
  """How a layer's tokens and experts lie on the mesh in force (`jax.set_mesh`).

  Attributes:
    token_axes: mesh axes that the leading axis of the tokens is sharded over.
      The name of a single one is taken for a tuple of it.
    expert_axis: mesh axis that the experts' parameters are sharded over, or
      None if every device holds all. It may be one of `token_axes`.
    fsdp_axis: mesh axis that parameters are sharded over at rest, beside
      `expert_axis`, or None; a device gathers those it needs. It may be one of
      `token_axes`.
    tensor_axis: mesh axis that F, the width of each expert, is sharded over, or
      None. It is neither of the others.
    exchange: how tokens get to the experts of other devices, where `expert_axis`
      is one of `token_axes`. "ragged" sends every row to the device of its
      expert by `jax.lax.ragged_all_to_all`, "equal" by all-to-alls of as many
      rows for each device, and "all_gather" sends all tokens to all devices. None
      takes "ragged" where the devices that the program is for can, else "equal".
    buffer_factor: the rows that a device takes from others in one round, as a
      multiple of the mean, its own tokens times K; None for 1.25. For "ragged"
      and "equal".
    drop: whether to send one round only: what does not fit is dropped, and
      counted as dropped in `MoEOutput.group_sizes`. What fits depends on the
      number of devices. False drops nothing: there are as many rounds as the
      fullest device needs.

  Raises:
    ValueError: if these are no names of mesh axes, one is given twice, or fields
      do not go together.
  """

  token_axes: tuple[str, ...] = ()
  expert_axis: str | None = None
  fsdp_axis: str | None = None
  tensor_axis: str | None = None
  exchange: Exchange | None = None
  buffer_factor: float | None = None
  drop: bool = False

  def __post_init__(self):
    axes = self.token_axes
    if isinstance(axes, str):
      axes = (axes,)
    if not isinstance(axes, Sequence) or not all(
      isinstance(axis, str) for axis in axes
    ):
      raise ValueError(
        "`token_axes` must be a tuple of names of mesh axes, got"
        f" {self.token_axes!r}. Take () if every device has all tokens."
      )
    if len(set(axes)) < len(axes):
      raise ValueError(
        f"`token_axes` must name every mesh axis once, got {self.token_axes!r}."
      )
    object.__setattr__(self, "token_axes", tuple(axes))
    for name, meaning in _ONE_AXIS.items():
      axis = getattr(self, name)
      if axis == "" or not isinstance(axis, str | None):
        raise ValueError(
          f"`{name}` must be the name of one mesh axis, or None if {meaning}, got"
          f" {getattr(self, name)!r}."
        )
    if self.fsdp_axis is not None and self.fsdp_axis == self.expert_axis:
      raise ValueError(
        f"`fsdp_axis` must be another axis than `expert_axis`={self.expert_axis!r},"
        " which shards the experts already. Leave it out, or name another."
      )
    others = (*axes, self.expert_axis, self.fsdp_axis)
    if self.tensor_axis is not None and self.tensor_axis in others:
      raise ValueError(
        f"`tensor_axis` must be an axis of its own, got {self.tensor_axis!r}, which"
        " shards tokens or parameters already. Name another."
      )
    if self.tensor_axis is not None and self.expert_axis is not None:
      raise ValueError(
        "`tensor_axis` shards experts that every device has a part of, got"
        f" `expert_axis`={self.expert_axis!r} too. Give one of them."
      )
    self._check_exchange()

  def _check_exchange(self):
    fix = "None chooses by the devices."
    drop = checks.as_bool("drop", self.drop, "False drops nothing.")
    object.__setattr__(self, "drop", drop)
    if self.exchange is not None:
      checks.check_choice("exchange", self.exchange, get_args(Exchange), fix)
    if self.buffer_factor is not None:
      fix = "1.0 is for as many rows as a device sends; None for 1.25."
      factor = checks.as_float(
        "buffer_factor", self.buffer_factor, "(0, inf)", fix
      )
      object.__setattr__(self, "buffer_factor", factor)
    is_bounded = drop or self.buffer_factor is not None
    if is_bounded and self.exchange == "all_gather":
      raise ValueError(
        "`buffer_factor` and `drop` are for the exchanges 'ragged' and 'equal', got"
        " `exchange`='all_gather', which has no buffer. Leave them out."
      )
    if (is_bounded or self.exchange is not None) and not self.exchanges_tokens:
      raise ValueError(
        "`exchange`, `buffer_factor` and `drop` are for an `expert_axis` that is one"
        f" of `token_axes`, got {self.expert_axis!r} and {self.token_axes!r}. Leave"
        " them out, or shard the tokens over that axis too."
      )

  @property
  def exchanges_tokens(self) -> bool:
    """Whether a device's experts get tokens of other devices."""
    return self.expert_axis is not None and self.expert_axis in self.token_axes
