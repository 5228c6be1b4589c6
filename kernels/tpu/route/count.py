# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Bits of chosen experts to loads, by bit-sliced counters.

A bit-sliced counter is one bit of each of many words: bit b of word i is bit i
of the count of bit b. To add a word of bits is one half adder for each word of
the counter, and counts 32 experts in every element of a register at once.
"""

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.registers import Ref
from jaxroute.kernels.tpu.route import bits, layout
from jaxroute.kernels.tpu.route.plan import WORD_BITS, Plan
from jaxroute.kernels.tpu.route.refs import Scratch

_LANES, _SUBLANES = device.LANES, device.SUBLANES
# Bits of a field, in which a part of a count is made of the counters' bits.
_FIELD_BITS = 8
_FIELDS = WORD_BITS // _FIELD_BITS
_FIELD_MASK = (1 << _FIELD_BITS) - 1
_LOWEST_OF_FIELDS = 0x01010101


def count_chosen(plan: Plan, scratch: Scratch) -> None:
  """Counts the chosen experts of a block's valid tokens.

  Reads `bits_not_below` and `valid`. Adds to `counters`.

  Args:
    plan: the static shape of the call.
    scratch: buffers.
  """
  for word in range(plan.words_per_sublane):
    counter = [scratch.counters[word, i] for i in range(plan.counter_bits)]
    for column in range(plan.columns):
      rows = layout.column_slice(plan, word, column)
      valid = scratch.valid[pl.ds(column, 1), :]
      carry = scratch.bits_not_below[rows, :] & jnp.broadcast_to(
        valid, (_SUBLANES, _LANES)
      )
      for i in range(plan.counter_bits):
        counter[i], carry = counter[i] ^ carry, counter[i] & carry
    for i, counter_word in enumerate(counter):
      scratch.counters[word, i] = counter_word


def write_load(plan: Plan, scratch: Scratch, load_ref: Ref) -> None:
  """Adds the counts of all lanes and puts the experts on lanes.

  Reads `counters`. Writes the output `load`.

  Args:
    plan: the static shape of the call.
    scratch: buffers.
    load_ref: `[E]` int32.
  """
  # Experts go to lanes by their index modulo 128. Expert s R + r is on sublane
  # s, so that this is the r of the one, if there is one, that goes to a lane.
  register_of_lane = (
    layout.lane_index() - layout.sublane_index() * plan.experts_per_sublane
  ) & (_LANES - 1)
  load = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
  for word in range(plan.words_per_sublane):
    # Eight bits of the counts at a time: four such fields fill a word, and
    # their sums over the lanes are exact in float32.
    for first_bit in range(0, plan.counter_bits, _FIELD_BITS):
      totals = _sum_over_lanes(plan, word, first_bit, register_of_lane, scratch)
      load += bits.shift_left(totals.astype(jnp.int32), first_bit)
  for first in range(0, plan.num_experts, _LANES):
    n = min(_LANES, plan.num_experts - first)
    expert = first + layout.lane_index()
    sublane = layout.divide(expert, plan.experts_per_sublane)
    is_own = sublane == layout.sublane_index()
    # [8, 128] with one sublane's load on each lane -> [1, 128].
    total = jnp.sum(jnp.where(is_own, load, 0), axis=0, keepdims=True)
    load_ref[pl.ds(first, n)] = total[0, :n]


def _sum_over_lanes(
  plan: Plan,
  word: int,
  first_bit: int,
  register_of_lane: jax.Array,
  scratch: Scratch,
) -> jax.Array:
  """Sums eight bits of the counts of a word's experts over all lanes."""
  first = word * WORD_BITS
  experts = range(first, min(plan.experts_per_sublane, first + WORD_BITS))
  end_bit = min(plan.counter_bits, first_bit + _FIELD_BITS)
  totals = jnp.zeros((_SUBLANES, _LANES), jnp.float32)
  for register in experts[:_FIELD_BITS]:
    fields = jnp.zeros((_SUBLANES, _LANES), jnp.int32)
    for i in range(first_bit, end_bit):
      shifted = bits.shift_right(
        scratch.counters[word, i], register % WORD_BITS
      )
      fields += bits.shift_left(shifted & _LOWEST_OF_FIELDS, i - first_bit)
    for field in range(_FIELDS):
      field_register = register + field * _FIELD_BITS
      if field_register in experts:
        count = bits.shift_right(fields, field * _FIELD_BITS) & _FIELD_MASK
        total = jnp.sum(count.astype(jnp.float32), axis=1, keepdims=True)
        totals = jnp.where(register_of_lane == field_register, total, totals)
  return totals
