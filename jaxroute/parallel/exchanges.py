# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What rows are exchanged, and the two ways in which they travel.

The P devices of the expert axis hold E / P experts each. A device has its rows in
expert order, so that those for one expert of one device are a slice of them. What
it receives it wants in expert order, too: for each of its experts, the slices of
all senders. That order is its *stream*. A buffer holds a window of the stream, and
a round brings one window.

`Ragged` sends the slices themselves into their places. `Equal` sends as many slots
to every device and has a window for each pair of devices; indices bring rows into
slots, and slots into expert order.
"""

import dataclasses
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute.parallel import mesh as mesh_lib


class Plan(NamedTuple):
  """What is to be exchanged; `[P, E / P]` int32 by peer and expert.

  Attributes:
    sent: rows of mine for each expert of each peer.
    start: where these begin in my rows.
    at: where these begin in the peer's stream.
    taken: rows of each peer for each of my experts.
    home: where these begin in the peer's rows.
    offset: where these begin in my stream.
  """

  sent: jax.Array
  start: jax.Array
  at: jax.Array
  taken: jax.Array
  home: jax.Array
  offset: jax.Array


def make_plan(group_sizes: jax.Array, axis: str, capacity: int | None) -> Plan:
  """Exchanges a few numbers, so that every device knows what its peers send and take.

  Args:
    group_sizes: `[E]` int32. Rows of this device for each expert.
    axis: the expert axis of the mesh.
    capacity: rows that an expert takes of all devices; None for all.

  Returns:
    A `Plan`.
  """

  def swap(*tables: jax.Array) -> tuple[jax.Array, ...]:
    stacked = jnp.stack(tables, axis=1)
    return jnp.unstack(lax.all_to_all(stacked, axis, 0, 0, tiled=True), axis=1)

  shape = lax.axis_size(axis), -1
  wanted = group_sizes.reshape(shape)
  start = _before(group_sizes).reshape(shape)
  offered, home = swap(wanted, start)
  taken = offered
  if capacity is not None:
    # Of an expert's rows the first are kept, in the order of the devices.
    before = jnp.cumsum(offered, axis=0) - offered
    taken = jnp.clip(capacity - before, 0, offered)
  offset = _before(taken.T.reshape(-1)).reshape(taken.shape[::-1]).T
  sent, at = swap(taken, offset)
  return Plan(sent, start, at, taken, home, offset)


def _before(x: jax.Array) -> jax.Array:
  """The sum of what comes before, along the last axis."""
  return jnp.cumsum(x, axis=-1, dtype=jnp.int32) - x


class Method(Protocol):
  """How rows travel in one round. `give` and `take` are each other's transposes."""

  def num_rounds(self, plan: Plan) -> jax.Array:
    """`[]` int32: rounds that this device needs for all it sends and takes."""
    ...

  def window(self, plan: Plan, number: jax.Array) -> Any:
    """What a round carries; its `sizes`, `[E / P]`, are the rows of my experts."""
    ...

  def give(self, rows: jax.Array, window: Any) -> jax.Array:
    """`[n, D]` rows to the rows `[buffer, D]` of my experts, in their order."""
    ...

  def take(self, outputs: jax.Array, into: jax.Array, window: Any) -> jax.Array:
    """Outputs of my experts to where the rows came from; the others of `into` stay."""
    ...


class _RaggedWindow(NamedTuple):
  """Slices, `[E]` by peer and expert, and the rows of each of my experts."""

  sizes: jax.Array
  from_rows: jax.Array  # where they begin, in the rows of the sender
  sent: jax.Array
  to_buffer: jax.Array  # and in the buffer of the receiver
  from_buffer: jax.Array
  taken: jax.Array
  to_rows: jax.Array


@dataclasses.dataclass(frozen=True)
class Ragged:
  """By `jax.lax.ragged_all_to_all`; `size` is the rows of the buffer."""

  axis: str
  size: int

  def num_rounds(self, plan: Plan) -> jax.Array:
    return -(-jnp.sum(plan.taken, dtype=jnp.int32) // self.size)

  def window(self, plan: Plan, number: jax.Array) -> _RaggedWindow:
    low = number * self.size

    def cut(begin: jax.Array, count: jax.Array) -> tuple[jax.Array, ...]:
      """Of slices of the stream: skipped rows, where the rest begins, its rows."""
      first = jnp.clip(begin, low, low + self.size)
      rows = jnp.clip(begin + count, low, low + self.size) - first
      # What is empty may begin anywhere, and must not begin outside.
      skipped = jnp.where(rows > 0, first - begin, 0)
      return skipped, jnp.where(rows > 0, first - low, 0), rows

    skipped, to_buffer, sent = cut(plan.at, plan.sent)
    left, from_buffer, taken = cut(plan.offset, plan.taken)
    slices = (
      *(plan.start + skipped, sent, to_buffer),
      *(from_buffer, taken, plan.home + left),
    )
    sizes = jnp.sum(taken, axis=0, dtype=jnp.int32)
    return _RaggedWindow(sizes, *(x.reshape(-1) for x in slices))

  def give(self, rows: jax.Array, window: _RaggedWindow) -> jax.Array:
    # Rows that nothing is written to are past the groups.
    buffer = lax.empty((self.size, rows.shape[1]), rows.dtype)
    buffer, _ = mesh_lib.vary_alike((buffer, rows))
    return lax.ragged_all_to_all(
      rows,
      buffer,
      window.from_rows,
      window.sent,
      window.to_buffer,
      window.taken,
      axis_name=self.axis,
    )

  def take(
    self, outputs: jax.Array, into: jax.Array, window: _RaggedWindow
  ) -> jax.Array:
    return lax.ragged_all_to_all(
      outputs,
      into,
      window.from_buffer,
      window.taken,
      window.to_rows,
      window.sent,
      axis_name=self.axis,
    )


class _Slices(NamedTuple):
  """Slices of rows, and the slots that they travel in: `[P, E / P]` int32."""

  first_row: jax.Array
  first_slot: jax.Array
  count: jax.Array

  def to_slots(self, rows: jax.Array, num_slots: int) -> jax.Array:
    """`[n, D]` rows to their slots; others are arbitrary."""
    row, _ = _find(num_slots, self.first_slot, self.first_row, self.count)
    return _gather(rows, row)

  def to_rows(
    self, slots: jax.Array, num_rows: int
  ) -> tuple[jax.Array, jax.Array]:
    """Slots to their rows, and which those are; others are arbitrary."""
    slot, is_here = _find(num_rows, self.first_row, self.first_slot, self.count)
    return _gather(slots, slot), is_here


def _find(
  size: int, first: jax.Array, first_other: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
  """Maps each index in one layout of the slices to its index in the other.

  Returns:
    `[size]` int32, 0 where there is no slice, and `[size]` bool, where there is.
  """
  # A sum of comparisons: a TPU does E of them sooner than one gather.
  i = jnp.arange(size, dtype=jnp.int32)[:, None]
  first, first_other, count = (
    x.reshape(1, -1) for x in (first, first_other, count)
  )
  is_in = (i >= first) & (i < first + count)
  other = jnp.where(is_in, i - first + first_other, 0)
  return jnp.sum(other, axis=1, dtype=jnp.int32), jnp.any(is_in, axis=1)


def _gather(x: jax.Array, idx: jax.Array) -> jax.Array:
  return x.at[idx].get(mode="promise_in_bounds")


class _EqualWindow(NamedTuple):
  """Slices in the slots that are sent, and in those that are received."""

  sizes: jax.Array
  sent: _Slices
  taken: _Slices


@dataclasses.dataclass(frozen=True)
class Equal:
  """By all-to-alls of `size` slots for every pair of devices."""

  axis: str
  size: int

  def num_rounds(self, plan: Plan) -> jax.Array:
    # Each pair is looked at by the device that receives.
    pairs = jnp.sum(plan.taken, axis=1, dtype=jnp.int32)
    return -(-jnp.max(pairs) // self.size)

  def window(self, plan: Plan, number: jax.Array) -> _EqualWindow:
    low = number * self.size
    peer = jnp.arange(plan.sent.shape[0], dtype=jnp.int32)[:, None]

    def cut(count: jax.Array) -> tuple[jax.Array, ...]:
      """Of the slices of a pair: skipped rows, first slot, rows of this round."""
      begin = _before(count)
      first = jnp.clip(begin, low, low + self.size)
      rows = jnp.clip(begin + count, low, low + self.size) - first
      return first - begin, peer * self.size + first - low, rows

    skipped, slot, count = cut(plan.sent)
    sent = _Slices(plan.start + skipped, slot, count)
    _, slot, count = cut(plan.taken)
    row = _before(count.T.reshape(-1)).reshape(count.shape[::-1]).T
    sizes = jnp.sum(count, axis=0, dtype=jnp.int32)
    return _EqualWindow(sizes, sent, _Slices(row, slot, count))

  def give(self, rows: jax.Array, window: _EqualWindow) -> jax.Array:
    slots = self._exchange(rows, window.sent)
    return window.taken.to_rows(slots, slots.shape[0])[0]

  def take(
    self, outputs: jax.Array, into: jax.Array, window: _EqualWindow
  ) -> jax.Array:
    slots = self._exchange(outputs, window.taken)
    rows, is_here = window.sent.to_rows(slots, into.shape[0])
    return jnp.where(is_here[:, None], rows, into)

  def _exchange(self, rows: jax.Array, slices: _Slices) -> jax.Array:
    num_slots = lax.axis_size(self.axis) * self.size
    slots = slices.to_slots(rows, num_slots)
    return lax.all_to_all(slots, self.axis, 0, 0, tiled=True)
