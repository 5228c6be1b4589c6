# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts: grouped matrix products and the feed-forward layers made of them.

Rows come in expert order, `group_sizes` says how many each expert owns. TPU has
an instruction for that, `jax.lax.ragged_dot`. On CPU and NVIDIA GPUs XLA
multiplies every row by every expert for it, so there the rows are walked in
blocks. The choice is made when a trace is lowered, so that one trace serves
every platform.
"""

import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import ladder
from jaxroute.experts import batched, blocks, products, ragged_dot, tiled
from jaxroute.experts.params import ExpertParams
from jaxroute.parallel import mesh

Implementation = Literal["ragged_dot", "tiled", "batched"]


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  implementation: Implementation | None = None,
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
    implementation: "ragged_dot" (`jax.lax.ragged_dot`, for TPU), "tiled" (one
      expert's rows at a time, for CPU), "batched" (batches of all experts'
      rows, for NVIDIA GPU), or None for the fast one of the platform that the
      program is lowered for. Only "ragged_dot" has forward-mode and second
      derivatives; only "tiled" cannot take the symbolic N of `jax.export`.
    expected_rows: of all groups together when they are balanced, where that is
      far below N, as on one shard of the experts; None for N. It only sizes the
      batches of "batched"; it never changes the result.
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
  lhs, rhs, group_sizes = mesh.vary_alike((lhs, rhs, group_sizes))
  with jax.named_scope("jaxroute.grouped_matmul"):
    if implementation == "ragged_dot":
      return ragged_dot.PRODUCTS.matmul(lhs, rhs, group_sizes, dtype=dtype)
    return _grouped_matmul(how, dtype, lhs, rhs, group_sizes)


def swiglu(
  x: jax.Array,
  params: ExpertParams,
  group_sizes: jax.Array,
  *,
  implementation: Implementation | None = None,
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
      f" {params.w_up.shape} and {params.w_down.shape}. Transpose or reshape them"
      " to fit `w_gate`."
    )
  if params.w_down.dtype != x.dtype:
    raise ValueError(
      f"`w_down` must have the dtype of `x`, {x.dtype}, got"
      f" {params.w_down.dtype}. Cast the parameters to that of the computation."
    )
  how = _checked(implementation, expected_rows)
  x, params, group_sizes = mesh.vary_alike((x, params, group_sizes))
  with jax.named_scope("jaxroute.swiglu"):
    if implementation == "ragged_dot":
      return ragged_dot.PRODUCTS.swiglu(x, params, group_sizes, keep=False)[0]
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
  hidden = products.gate_hidden(gate, up).astype(x.dtype)
  return blocks.dot(hidden, params.w_down).astype(x.dtype)


def _check_matmul(
  lhs_name: str,
  lhs: jax.Array,
  rhs_name: str,
  rhs: jax.Array,
  group_sizes: jax.Array,
) -> None:
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

  implementation: Implementation | None
  expected_rows: int | None


def _checked(
  implementation: Implementation | None, expected_rows: int | None
) -> _How:
  if expected_rows is not None and expected_rows < 0:
    raise ValueError(
      f"`expected_rows` must be None or at least 0, got {expected_rows}. None is"
      " for groups that own most of the rows."
    )
  return _How(implementation, expected_rows)


def _call(how: _How, product: str, *operands: Any, **static: Any) -> Any:
  """One of an implementation's `Products`, by name or by platform."""
  all_products = {
    "ragged_dot": ragged_dot.PRODUCTS,
    "tiled": tiled.PRODUCTS,
    "batched": batched.products(how.expected_rows),
  }
  # One by one in a batch: there the loops of all would go on until the longest
  # is done, and copy what they carry.
  functions = {
    name: jax.custom_batching.sequential_vmap(
      functools.partial(getattr(products, product), **static)
    )
    for name, products in all_products.items()
  }

  def by_platform():
    is_symbolic = not isinstance(operands[0].shape[0], int)
    return lax.platform_dependent(
      *operands,
      cpu=functions["batched" if is_symbolic else "tiled"],
      cuda=functions["batched"],
      default=functions["ragged_dot"],
    )

  by_name = {
    name: functools.partial(function, *operands)
    for name, function in functions.items()
  }
  return ladder.climb(
    "grouped_matmul", {None: by_platform} | by_name, how.implementation
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _grouped_matmul(
  how: _How,
  dtype: Any,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
) -> jax.Array:
  return _call(how, "matmul", lhs, rhs, group_sizes, dtype=dtype)


def _grouped_matmul_fwd(
  how: _How,
  dtype: Any,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  out = _grouped_matmul(how, dtype, lhs, rhs, group_sizes)
  return out, (lhs, rhs, group_sizes)


def _grouped_matmul_bwd(
  how: _How, dtype: Any, residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array | None, ...]:
  del dtype
  lhs, rhs, group_sizes = residuals
  d_out = d_out.astype(lhs.dtype)
  d_lhs = _grouped_matmul(how, lhs.dtype, d_out, rhs.mT, group_sizes)
  d_rhs = _call(how, "outer", lhs, d_out, group_sizes)
  return d_lhs, d_rhs, None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(
  how: _How, x: jax.Array, params: ExpertParams, group_sizes: jax.Array
) -> jax.Array:
  out, _ = _call(how, "swiglu", x, params, group_sizes, keep=False)
  return out


def _swiglu_fwd(
  how: _How, x: jax.Array, params: ExpertParams, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
  out, kept = _call(how, "swiglu", x, params, group_sizes, keep=True)
  return out, (x, kept, params, group_sizes)


def _swiglu_bwd(
  how: _How, residuals: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array, ExpertParams, None]:
  d_x, d_params = _call(how, "swiglu_gradient", *residuals, d_out)
  return d_x, d_params, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
