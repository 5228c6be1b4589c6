# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts: grouped matrix products and the feed-forward layers made of them.

Rows come in expert order, `group_sizes` says how many each expert owns. TPU has an
instruction for that, `jax.lax.ragged_dot`. On CPU and NVIDIA GPUs XLA multiplies
every row by every expert for it, so there the rows are walked in blocks: one
expert's rows at a time on CPU, batches of many experts' on GPU. The choice is made
when a trace is lowered, so that one trace serves every platform.
"""

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import blocks, dispatch, ragged, rounds, tiles, types

MatmulImplementation = Literal["xla", "cpu", "gpu"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParams:
  """Parameters of E SwiGLU experts; of a dense SwiGLU without the E axis.

  Attributes:
    w_gate: `[E, D, F]`. Projection that `silu` is applied to.
    w_up: `[E, D, F]`. Projection it multiplies.
    w_down: `[E, F, D]`. Projection back to the model width.
  """

  w_gate: jax.Array
  w_up: jax.Array
  w_down: jax.Array


def init_expert_params(
  key: jax.Array,
  num_experts: int,
  model_size: int,
  hidden_size: int,
  dtype: Any = jnp.float32,
) -> ExpertParams:
  """Random parameters: normal, of variance 1 / fan-in (LeCun).

  Args:
    key: random key.
    num_experts: E.
    model_size: D.
    hidden_size: F.
    dtype: of the parameters.

  Returns:
    `ExpertParams` with the E axis.
  """
  init = jax.nn.initializers.lecun_normal(batch_axis=(0,))
  up, down = (model_size, hidden_size), (hidden_size, model_size)
  keys = jax.random.split(key, 3)
  return ExpertParams(
    w_gate=init(keys[0], (num_experts, *up), dtype),
    w_up=init(keys[1], (num_experts, *up), dtype),
    w_down=init(keys[2], (num_experts, *down), dtype),
  )


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  implementation: MatmulImplementation | None = None,
  expected_rows: int | None = None,
  preferred_element_type: Any = None,
) -> jax.Array:
  """Multiplies every row by the matrix of the group that owns it.

  Group e owns `group_sizes[e]` rows, after those of the groups before it. Rows
  past the groups are not read: they give 0, and get gradient 0, even if NaN.

  Args:
    lhs: `[N, D]`. Rows in group order.
    rhs: `[E, D, F]`. One matrix per group, the dtype of `lhs`.
    group_sizes: `[E]` int32. At most N in sum; gets no gradient.
    implementation: "xla" (`jax.lax.ragged_dot`), "cpu" (one expert's rows at a
      time), "gpu" (batches of all experts'), or None for the fast one of the
      platform the computation is lowered for.
    expected_rows: of all groups together when they are balanced, where that is
      far below N, as on one shard of the experts; None for N. Sets the batches
      of "gpu", and no value.
    preferred_element_type: dtype of the result; None for that of `lhs`. Sums
      are in float32.

  Returns:
    `[N, F]`.

  Raises:
    ValueError: if a rank, shape or dtype does not fit.

  Example:
    >>> lhs = jnp.ones((3, 1))
    >>> rhs = jnp.array([2.0, 3.0]).reshape(2, 1, 1)
    >>> grouped_matmul(lhs, rhs, jnp.array([1, 1])).ravel()
    Array([2., 3., 0.], dtype=float32)
  """
  _check_matmul("lhs", lhs, "rhs", rhs, group_sizes)
  how = _checked(implementation, expected_rows)
  dtype = jnp.dtype(preferred_element_type or lhs.dtype)
  lhs, rhs, group_sizes = dispatch.vary_alike((lhs, rhs, group_sizes))
  with jax.named_scope("jaxroute.grouped_matmul"):
    return _grouped_matmul(how, dtype, lhs, rhs, group_sizes)


def swiglu(
  x: jax.Array,
  params: ExpertParams,
  group_sizes: jax.Array,
  *,
  implementation: MatmulImplementation | None = None,
  expected_rows: int | None = None,
) -> jax.Array:
  """`(silu(x w_gate) * (x w_up)) w_down`, every row with its expert's matrices.

  Args:
    x: `[N, D]`. Rows in expert order; rows past the groups are not read: they
      give 0, and get gradient 0, even if NaN.
    params: with the E axis, of the dtype of `x`.
    group_sizes: `[E]` int32. Rows per expert.
    implementation: as in `grouped_matmul`.
    expected_rows: as in `grouped_matmul`.

  Returns:
    `[N, D]`, the dtype of `x`. Products are summed in float32.

  Raises:
    ValueError: if a rank, shape or dtype does not fit.
  """
  _check_matmul("x", x, "w_gate", params.w_gate, group_sizes)
  _check_matmul("x", x, "w_up", params.w_up, group_sizes)
  e, d, f = params.w_gate.shape
  if params.w_up.shape != (e, d, f) or params.w_down.shape != (e, f, d):
    raise ValueError(
      f"`w_up` and `w_down` must be [E={e}, D={d}, F={f}] and [E, F, D], got"
      f" {params.w_up.shape} and {params.w_down.shape}."
    )
  if params.w_down.dtype != x.dtype:
    raise ValueError(
      f"`w_down` must have the dtype of `x`, {x.dtype}, got"
      f" {params.w_down.dtype}. Cast the parameters to that of the computation."
    )
  how = _checked(implementation, expected_rows)
  x, params, group_sizes = dispatch.vary_alike((x, params, group_sizes))
  with jax.named_scope("jaxroute.swiglu"):
    return _swiglu(how, x, params, group_sizes)


def dense_swiglu(x: jax.Array, params: ExpertParams) -> jax.Array:
  """`(silu(x w_gate) * (x w_up)) w_down` on every row: a shared expert.

  Args:
    x: `[T, D]`.
    params: `[D, F]` and `[F, D]`, without the E axis.

  Returns:
    `[T, D]`, the dtype of `x`. Products are summed in float32.
  """
  gate, up = blocks.dot(x, params.w_gate), blocks.dot(x, params.w_up)
  hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
  return blocks.dot(hidden, params.w_down).astype(x.dtype)


@functools.partial(jax.jit, static_argnames=("capacity", "implementation"))
def moe(
  x: jax.Array,
  routing: types.Routing,
  params: ExpertParams,
  *,
  capacity: int | None = None,
  implementation: MatmulImplementation | None = None,
) -> tuple[jax.Array, jax.Array]:
  """Sends tokens to the experts of their routes and sums what these return.

  Args:
    x: `[T, D]`. Tokens.
    routing: of those tokens. Tokens that its mask leaves out give 0, or NaN if
      their weights are NaN, and reach no parameter's gradient.
    params: with the E axis, of the dtype of `x`.
    capacity: C. An expert keeps its first C assignments in token order and the
      others are dropped; None drops nothing.
    implementation: as in `grouped_matmul`.

  Returns:
    `[T, D]`, the dtype of `x`, and `group_sizes`, `[E]` int32: the rows each
    expert processed, `min(load, C)`.

  Raises:
    ValueError: if a rank, shape or dtype does not fit.
  """
  num_experts = params.w_gate.shape[0]
  order = dispatch.sort_by_expert(
    routing.expert_idx, num_experts, routing.token_mask, capacity
  )
  rows = dispatch.dispatch(x, order)
  # Of a shard of the experts only its share, though its shapes hold them all.
  expected_rows = -(-rows.shape[0] * num_experts // routing.load.shape[0])
  rows = swiglu(
    rows,
    params,
    order.group_sizes,
    implementation=implementation,
    expected_rows=expected_rows,
  )
  return dispatch.combine(rows, routing.weights, order), order.group_sizes


def _check_matmul(lhs_name, lhs, rhs_name, rhs, group_sizes) -> None:
  if lhs.ndim != 2 or rhs.ndim != 3 or lhs.shape[1] != rhs.shape[1]:
    raise ValueError(
      f"`{lhs_name}` must be [N, D] and `{rhs_name}` [E, D, F] with one D, got"
      f" {lhs.shape} and {rhs.shape}. Flatten batch axes into N."
    )
  if lhs.dtype != rhs.dtype:
    raise ValueError(
      f"`{lhs_name}` and `{rhs_name}` must have one dtype, got {lhs.dtype} and"
      f" {rhs.dtype}. Cast both to that of the computation."
    )
  if group_sizes.shape != rhs.shape[:1] or group_sizes.dtype != jnp.int32:
    raise ValueError(
      f"`group_sizes` must be int32 [E={rhs.shape[0]}], got"
      f" {group_sizes.dtype} {group_sizes.shape}. Pass one count per matrix of"
      f" `{rhs_name}`."
    )


class _How(NamedTuple):
  """How groups are multiplied; see `grouped_matmul`."""

  implementation: MatmulImplementation | None
  expected_rows: int | None

  def call(self, by_blocks, by_xla, *args):
    """`by_blocks(fold, *args)` or `by_xla(*args)`, by name or by platform."""
    by_rounds = functools.partial(rounds.fold, expected_rows=self.expected_rows)
    calls = {
      "cpu": functools.partial(by_blocks, tiles.fold),
      "gpu": functools.partial(by_blocks, by_rounds),
      "xla": by_xla,
    }
    if self.implementation is not None:
      return calls[self.implementation](*args)
    return lax.platform_dependent(
      *args, cpu=calls["cpu"], cuda=calls["gpu"], default=by_xla
    )


def _checked(implementation, expected_rows) -> _How:
  if implementation not in (None, "xla", "cpu", "gpu"):
    raise ValueError(
      "`implementation` must be None, 'xla', 'cpu' or 'gpu', got"
      f" {implementation!r}. None is the fast one of every platform."
    )
  if expected_rows is not None and expected_rows < 0:
    raise ValueError(
      f"`expected_rows` must be None or at least 0, got {expected_rows}. None is"
      " for groups that own most of the rows."
    )
  return _How(implementation, expected_rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(how, dtype, lhs, rhs, group_sizes):
  def by_blocks(fold, *args):
    return blocks.matmul(fold, dtype, *args)

  def by_xla(*args):
    return ragged.matmul(dtype, *args)

  return how.call(by_blocks, by_xla, lhs, rhs, group_sizes)


def _grouped_matmul_fwd(how, dtype, lhs, rhs, group_sizes):
  out = _grouped_matmul(how, dtype, lhs, rhs, group_sizes)
  return out, (lhs, rhs, group_sizes)


def _grouped_matmul_bwd(how, dtype, residuals, d_out):
  del dtype
  lhs, rhs, group_sizes = residuals
  d_out = d_out.astype(lhs.dtype)
  d_lhs = _grouped_matmul(how, lhs.dtype, d_out, rhs.mT, group_sizes)
  d_rhs = how.call(blocks.outer, ragged.outer, lhs, d_out, group_sizes)
  return d_lhs, d_rhs, None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(how, x, params, group_sizes):
  return how.call(
    lambda *args: _swiglu_blocks(*args)[0],
    lambda *args: _swiglu_ragged(*args)[0],
    x,
    params,
    group_sizes,
  )


def _swiglu_fwd(how, x, params, group_sizes):
  out, gate, up = how.call(
    functools.partial(_swiglu_blocks, keep=True),
    _swiglu_ragged,
    x,
    params,
    group_sizes,
  )
  return out, (x, gate, up, params, group_sizes)


def _swiglu_bwd(how, residuals, d_out):
  d_x, d_params = how.call(
    _swiglu_bwd_blocks, _swiglu_bwd_ragged, *residuals, d_out
  )
  return d_x, d_params, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)


def _swiglu_pullback(gate, up, d_hidden):
  """(hidden, d_gate, d_up) of `hidden = silu(gate) * up`, all float32."""
  gate, up = gate.astype(jnp.float32), up.astype(jnp.float32)
  sigmoid = jax.nn.sigmoid(gate)
  silu = gate * sigmoid
  d_gate = d_hidden * up * (sigmoid + silu * (1 - sigmoid))
  return silu * up, d_gate, d_hidden * silu


def _swiglu_blocks(fold, x, params, group_sizes, keep=False):
  """One pass over the rows: what lies between two products stays in cache."""

  def body(block, carry):
    rows = block.read(x)
    gate, up = (
      blocks.dot(rows, block.of(params.w_gate)),
      blocks.dot(rows, block.of(params.w_up)),
    )
    hidden = (jax.nn.silu(gate) * up).astype(x.dtype)
    values = blocks.dot(hidden, block.of(params.w_down)), gate, up
    return tuple(
      block.write(*pair) for pair in zip(carry, values, strict=False)
    )

  n, f = x.shape[0], params.w_gate.shape[2]
  widths = (x.shape[1], f, f) if keep else (x.shape[1],)
  carry = tuple(blocks.zeros((n, width), x.dtype, x) for width in widths)
  return fold(body, carry, group_sizes, n)


def _swiglu_bwd_blocks(fold, x, gate, up, params, group_sizes, d_out):
  def body(block, carry):
    d_x, d_params = carry
    rows, d_rows = block.read(x), block.read(d_out)
    d_hidden = blocks.dot(d_rows, block.of(params.w_down).mT)
    hidden, d_gate, d_up = (
      v.astype(x.dtype)
      for v in _swiglu_pullback(block.read(gate), block.read(up), d_hidden)
    )
    d_x = block.write(
      d_x,
      blocks.dot(d_gate, block.of(params.w_gate).mT)
      + blocks.dot(d_up, block.of(params.w_up).mT),
    )
    d_params = ExpertParams(
      w_gate=block.add(d_params.w_gate, blocks.dot(rows.mT, d_gate)),
      w_up=block.add(d_params.w_up, blocks.dot(rows.mT, d_up)),
      w_down=block.add(d_params.w_down, blocks.dot(hidden.mT, d_rows)),
    )
    return d_x, d_params

  totals = jax.tree.map(lambda w: blocks.zeros(w.shape, jnp.float32, x), params)
  carry = blocks.zeros(x.shape, x.dtype, x), totals
  d_x, totals = fold(body, carry, group_sizes, x.shape[0])
  return d_x, jax.tree.map(lambda t: t.astype(x.dtype), totals)


def _swiglu_ragged(x, params, group_sizes):
  gate = ragged.matmul(x.dtype, x, params.w_gate, group_sizes)
  up = ragged.matmul(x.dtype, x, params.w_up, group_sizes)
  f32 = jnp.float32
  hidden = jax.nn.silu(gate.astype(f32)) * up.astype(f32)
  out = ragged.matmul(
    x.dtype, hidden.astype(x.dtype), params.w_down, group_sizes
  )
  return out, gate, up


def _swiglu_bwd_ragged(x, gate, up, params, group_sizes, d_out):
  def back(d_out, w):
    return ragged.matmul(jnp.float32, d_out, w.mT, group_sizes)

  d_hidden = back(d_out, params.w_down)
  hidden, d_gate, d_up = (
    v.astype(x.dtype) for v in _swiglu_pullback(gate, up, d_hidden)
  )
  d_x = back(d_gate, params.w_gate) + back(d_up, params.w_up)
  d_params = ExpertParams(
    w_gate=ragged.outer(x, d_gate, group_sizes),
    w_up=ragged.outer(x, d_up, group_sizes),
    w_down=ragged.outer(hidden, d_out, group_sizes),
  )
  return d_x.astype(x.dtype), d_params
