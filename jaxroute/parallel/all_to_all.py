# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Rows to the devices of their experts and back, inside `jax.shard_map`.

Each device sends the rows of its tokens in rounds: a round fills the buffers, runs
the experts on them and sends the outputs back to where the rows came from. Most
often one round is enough. `exchanges` has the ways in which rows travel.

Sending rows out and sending outputs back are each other's transposes: the gradient
of the outputs takes the way of the rows, and the gradient of the rows that of the
outputs. The first round keeps what its experts need for their gradient; later
rounds send their rows a second time, since how many rounds there are is not known
when the memory is laid out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import types
from jaxroute.parallel import exchanges
from jaxroute.parallel import mesh as mesh_lib

# (rows in expert order, parameters of experts, rows of each expert) -> outputs
RunExperts = Callable[[jax.Array, types.PyTree, jax.Array], jax.Array]

_BUFFER_FACTOR = 1.25
# A buffer is a whole number of the TPU's tiles.
_BUFFER_MULTIPLE = 8
# From this number of chips on, the compiler refuses the exchange on a v5e slice.
_LIMITED_V5E = 64


def choose(
  partition: types.Partition, mesh: jax.sharding.AbstractMesh
) -> types.Exchange:
  """The exchange that a layer works by.

  Args:
    partition: what the caller says; its `expert_axis` is one of its `token_axes`.
    mesh: the one in force, which tells what devices the program is for.

  Returns:
    `partition.exchange`, or the best that these devices have.

  Raises:
    NotImplementedError: if they cannot do what was asked for.
  """
  if partition.exchange not in (None, "ragged"):
    return partition.exchange
  refusal = _no_ragged(mesh)
  if partition.exchange is None:
    return "equal" if refusal else "ragged"
  if refusal:
    raise NotImplementedError(
      f"`exchange`='ragged' cannot: {refusal}. Use None, 'equal' or 'all_gather'."
    )
  return "ragged"


def _no_ragged(mesh: jax.sharding.AbstractMesh) -> str | None:
  """Why the devices of a mesh have no ragged exchange, or None if they have."""
  device: Any = mesh.abstract_device
  if device is None:
    device = jax.devices()[0]
  if device.platform == "cpu":
    return "XLA has no ragged all-to-all for CPUs"
  if (
    device.device_kind in ("TPU v5 lite", "TPU v5e")
    and mesh.size >= _LIMITED_V5E
  ):
    return (
      f"the compiler has no ragged all-to-all for a v5e slice of {_LIMITED_V5E} chips"
      f" or more, and this has {mesh.size}"
    )
  return None


def buffer_rows(partition: types.Partition, num_rows: int, devices: int) -> int:
  """The rows that a device takes in one round.

  Args:
    partition: `buffer_factor` of it is used.
    num_rows: the rows that a device sends, its tokens times K: the mean of what a
      device receives.
    devices: how many send to it, itself among them.

  Returns:
    `buffer_factor * num_rows`, but no more than all of them send, rounded up to a
    multiple of 8.

  Raises:
    ValueError: if that is less than one row.
  """
  factor = partition.buffer_factor
  rows = num_rows * min(_BUFFER_FACTOR if factor is None else factor, devices)
  if num_rows and rows < 1:
    raise ValueError(
      f"`buffer_factor`={factor} must leave a device at least one row of the"
      f" {num_rows} that it receives in the mean, got {rows:g}. Take a larger one;"
      " 1.0 is for the mean."
    )
  multiple = _BUFFER_MULTIPLE
  return max(math.ceil(rows / multiple), 1) * multiple


def run(
  run_experts: RunExperts,
  rows: jax.Array,
  params: types.PyTree,
  group_sizes: jax.Array,
  *,
  partition: types.Partition,
  exchange: types.Exchange,
  capacity: int | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Has every row's expert run, wherever that is.

  Call it inside `jax.shard_map`.

  Args:
    run_experts: differentiable; outputs are shaped like the rows. Rows past the
      groups are arbitrary, and what becomes of them is not read.
    rows: `[n, D]`, in the order of the experts of all devices.
    params: of the E / P experts of this device.
    group_sizes: `[E]` int32, rows per expert.
    partition: its axes, `buffer_factor` and `drop`.
    exchange: "ragged" or "equal".
    capacity: rows that an expert accepts, those of the first device first; None
      for all.

  Returns:
    `[n, D]`, the outputs where the rows were: 0 for those that no expert took, and
    for those past the groups. And `[E / P]` int32, the rows that each expert of this
    device took.
  """
  axis: Any = partition.expert_axis
  devices = lax.axis_size(axis)
  size = buffer_rows(partition, rows.shape[0], devices)
  if exchange == "equal":
    method: exchanges.Method = exchanges.Equal(axis, -(-size // devices))
  else:
    method = exchanges.Ragged(axis, size)
  plan = exchanges.make_plan(group_sizes, axis, capacity)
  rows, params, plan = mesh_lib.vary_alike((rows, params, plan))
  if partition.drop:
    num_rounds = None
    taken = method.window(plan, jnp.int32(0)).sizes
  else:
    # All devices go round as often, so that all take part in every exchange.
    num_rounds = lax.pmax(method.num_rounds(plan), partition.token_axes)
    taken = jnp.sum(plan.taken, axis=0, dtype=jnp.int32)
  return _run((run_experts, method), rows, params, plan, num_rounds), taken


_How = tuple[RunExperts, exchanges.Method]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(
  how: _How,
  rows: jax.Array,
  params: types.PyTree,
  plan: exchanges.Plan,
  num_rounds: jax.Array | None,
) -> jax.Array:
  """Outputs where the rows were, of so many rounds; None for one."""
  return _run_fwd(how, rows, params, plan, num_rounds)[0]


def _run_fwd(
  how: _How,
  rows: jax.Array,
  params: types.PyTree,
  plan: exchanges.Plan,
  num_rounds: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:
  run_experts, method = how

  def run_round(number: jax.Array, into: jax.Array) -> tuple[jax.Array, Any]:
    window = method.window(plan, number)
    received = method.give(rows, window)
    outputs, pull = jax.vjp(
      lambda x, w: run_experts(x, w, window.sizes), received, params
    )
    return method.take(outputs, into, window), pull

  outputs, pull = run_round(jnp.int32(0), jnp.zeros_like(rows))
  outputs = _more_rounds(
    num_rounds, lambda number, into: run_round(number, into)[0], outputs
  )
  kept = None if num_rounds is None else (rows, params)
  return outputs, (pull, plan, num_rounds, kept)


def _run_bwd(
  how: _How, residuals: tuple[Any, ...], d_outputs: jax.Array
) -> tuple[Any, ...]:
  run_experts, method = how
  pull, plan, num_rounds, kept = residuals

  def pull_round(
    number: jax.Array, into: jax.Array, pull: Any
  ) -> tuple[jax.Array, types.PyTree]:
    window = method.window(plan, number)
    d_rows, d_params = pull(method.give(d_outputs, window))
    return method.take(d_rows, into, window), d_params

  d_rows, d_params = pull_round(jnp.int32(0), jnp.zeros_like(d_outputs), pull)

  def add_round(
    number: jax.Array, carry: tuple[jax.Array, types.PyTree]
  ) -> tuple[jax.Array, types.PyTree]:
    rows, params = kept
    window = method.window(plan, number)
    _, pull = jax.vjp(
      lambda x, w: run_experts(x, w, window.sizes),
      method.give(rows, window),
      params,
    )
    d_rows, more = pull_round(number, carry[0], pull)
    return d_rows, jax.tree.map(jnp.add, carry[1], more)

  d_rows, d_params = _more_rounds(num_rounds, add_round, (d_rows, d_params))
  return d_rows, d_params, None, None


def _more_rounds(
  num_rounds: jax.Array | None,
  body: Callable[[jax.Array, Any], Any],
  carry: Any,
) -> Any:
  """The rounds after the first."""
  if num_rounds is None:
    return carry
  return lax.fori_loop(jnp.ones_like(num_rounds), num_rounds, body, carry)


_run.defvjp(_run_fwd, _run_bwd)
