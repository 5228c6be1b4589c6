# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts: grouped matrix products and the feed-forward layers made of them.

Rows come in expert order, `group_sizes` says how many each expert owns. XLA has
`jax.lax.ragged_dot` for that. On CPU and NVIDIA GPUs it multiplies every row by
every expert, and an older TPU compiler does so for the gradient. So there are
kernels for TPU and for NVIDIA Hopper, and elsewhere the rows are walked in
blocks. The platform's choice is made when a trace is lowered, so that one trace
serves every platform.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_args

import jax
from jax import lax

from jaxroute import checks, ladder
from jaxroute.experts import (
  batched,
  blocks,
  pallas_gpu,
  pallas_tpu,
  products,
  ragged_dot,
  tiled,
)
from jaxroute.experts.params import ExpertParams, check_params
from jaxroute.parallel import mesh

Implementation = Literal[
  "ragged_dot", "tiled", "batched", "pallas_tpu", "pallas_gpu"
]


# The kernel of each platform that has one, and what raises where it cannot run.
_KERNELS = {"tpu": "pallas_tpu", "cuda": "pallas_gpu"}
_CHECKS = {
  "pallas_tpu": pallas_tpu.check_can_run,
  "pallas_gpu": pallas_gpu.check_can_run,
}


def grouped_matmul(
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
  *,
  implementation: Implementation | None = None,
  interpret: Any = False,
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
    implementation: "ragged_dot" (`jax.lax.ragged_dot`), "tiled" (one expert's
      rows at a time, for CPU), "batched" (batches of all experts' rows, for
      NVIDIA GPU), "pallas_tpu" (a kernel for TPU v5e and newer: N from 128 on, D
      and F in multiples of 128), "pallas_gpu" (a kernel for NVIDIA Hopper, compute
      capability 9.0: bfloat16 and float16, N in multiples of 8, D and F in
      multiples of 64, all from 128 on, jax 0.11 or newer), or None for the one of
      the platform that the program is lowered for. For TPU that is the kernel
      before jax 0.12, whose compiler has no grouped gradient, and else "ragged_dot";
      for Hopper the kernel if it can, and else "batched". Only "ragged_dot" has
      forward-mode and second derivatives; "tiled" and the kernels cannot take the
      symbolic N of `jax.export`, and the kernels are lowered for their platform
      alone, not for several at once.
    interpret: whether a kernel is interpreted, on any device. Also what
      `pallas_call` takes.
    expected_rows: of all groups together when they are balanced, where that is
      far below N, as on one shard of the experts; None for N. It only sizes the
      batches of "batched"; it never changes the result.
    preferred_element_type: dtype of the result; None for that of `lhs`. Sums
      are in float32.

  Returns:
    `[N, F]`.

  Raises:
    ValueError: if a rank, shape or dtype does not fit.
    NotImplementedError: if the implementation asked for cannot do this.

  Example:
    >>> import jax.numpy as jnp
    >>> lhs = jnp.ones((3, 1))
    >>> rhs = jnp.array([2.0, 3.0]).reshape(2, 1, 1)
    >>> grouped_matmul(lhs, rhs, jnp.array([1, 1])).ravel()
    Array([2., 3., 0.], dtype=float32)
  """
  lhs, rhs = map(checks.as_jax, (lhs, rhs))
  fix = "Flatten batch axes into N, and cast both to the computation's dtype."
  checks.check_array("lhs", lhs, "[N, D]", "floating point", fix)
  checks.check_array(
    "rhs", rhs, "[E, D, F]", lhs.dtype.name, fix, D=lhs.shape[1]
  )
  _check_group_sizes(group_sizes, rhs.shape[0])
  how = _checked("grouped_matmul", implementation, interpret, expected_rows)
  dtype = lhs.dtype
  if preferred_element_type is not None:
    dtype = checks.as_float_dtype(
      "preferred_element_type", preferred_element_type
    )
  lhs, rhs, group_sizes = mesh.vary_alike((lhs, rhs, group_sizes))
  with jax.named_scope("jaxroute.grouped_matmul"):
    if implementation == "ragged_dot" and not interpret:
      return ragged_dot.PRODUCTS.matmul(lhs, rhs, group_sizes, dtype=dtype)
    return _grouped_matmul(how, dtype, False, lhs, rhs, group_sizes)


def swiglu(
  x: jax.Array,
  params: ExpertParams,
  group_sizes: jax.Array,
  *,
  implementation: Implementation | None = None,
  interpret: Any = False,
  expected_rows: int | None = None,
) -> jax.Array:
  """`(silu(x w_gate) * (x w_up)) w_down`, every row with its expert's matrices.

  Args:
    x: `[N, D]`. Rows in expert order; rows past the groups are not read: they
      give 0, and get gradient 0, even if NaN.
    params: with the E axis, of the dtype of `x`.
    group_sizes: `[E]` int32. Rows per expert.
    implementation: as in `grouped_matmul`.
    interpret: as in `grouped_matmul`.
    expected_rows: as in `grouped_matmul`.

  Returns:
    `[N, D]`, the dtype of `x`. Products are summed in float32.

  Raises:
    ValueError: if a rank, shape or dtype does not fit.
    NotImplementedError: if the implementation asked for cannot do this.
  """
  x, params = jax.tree.map(checks.as_jax, (x, params))
  checks.check_array("x", x, "[N, D]", "floating point", "Flatten axes into N.")
  check_params("params", params, x.shape[1], dtype=x.dtype.name)
  _check_group_sizes(group_sizes, params.w_gate.shape[0])
  how = _checked("swiglu", implementation, interpret, expected_rows)
  x, params, group_sizes = mesh.vary_alike((x, params, group_sizes))
  with jax.named_scope("jaxroute.swiglu"):
    if implementation == "ragged_dot" and not interpret:
      return ragged_dot.PRODUCTS.swiglu(x, params, group_sizes, keep=False)[0]
    return _swiglu(how, x, params, group_sizes)


def dense_swiglu(x: jax.Array, params: ExpertParams) -> jax.Array:
  """`(silu(x w_gate) * (x w_up)) w_down` on every row: a shared expert.

  Args:
    x: `[T, D]`.
    params: `[D, F]` and `[F, D]`, without the E axis.

  Returns:
    `[T, D]`, the dtype of `x`. Products are summed in float32.

  Raises:
    ValueError: if a shape or dtype does not fit.
  """
  x, params = jax.tree.map(checks.as_jax, (x, params))
  checks.check_array("x", x, "[T, D]", "floating point", "Flatten axes into T.")
  check_params("params", params, x.shape[1], dtype=x.dtype.name, is_dense=True)
  gate, up = blocks.dot(x, params.w_gate), blocks.dot(x, params.w_up)
  hidden = products.gate_hidden(gate, up).astype(x.dtype)
  return blocks.dot(hidden, params.w_down).astype(x.dtype)


def _check_group_sizes(group_sizes: jax.Array, num_experts: int) -> None:
  fix = "Pass one count per expert."
  checks.check_array(
    "group_sizes", group_sizes, "[E]", "int32", fix, E=num_experts
  )


class _How(NamedTuple):
  """How groups are multiplied; see `grouped_matmul`."""

  implementation: Implementation | None
  interpret: Any
  expected_rows: int | None


def _checked(
  operation: str,
  implementation: Implementation | None,
  interpret: Any,
  expected_rows: int | None,
) -> _How:
  names = get_args(Implementation)
  ladder.check_names(operation, names, implementation, interpret)
  if expected_rows is not None:
    fix = "None is for groups that own most of the rows."
    expected_rows = checks.as_int("expected_rows", expected_rows, fix, low=0)
  return _How(implementation, interpret, expected_rows)


def _call(
  operation: str, how: _How, product: str, *operands: Any, **static: Any
) -> Any:
  """One of an implementation's `Products`, by name or by platform."""
  functions = _functions(how, product, **static)

  def by_xla(name: str) -> Any:
    ladder.refuse_to_interpret(how.interpret)
    return functions[name](*operands)

  def by_kernel(platform: str, name: str) -> Any:
    call = _kernel(
      operation, platform, functions, operands, how.interpret, by_name=True
    )
    return call(*operands)

  def by_platform() -> Any:
    ladder.refuse_to_interpret(how.interpret)
    return _by_platform(operation, functions, operands)

  # Without a name, all but the first are for kernels that are interpreted.
  rungs: dict[Any, Callable[[], Any]] = {None: by_platform}
  rungs |= {name: functools.partial(by_xla, name) for name in functions}
  for platform, name in _KERNELS.items():
    rungs[name] = functools.partial(by_kernel, platform, name)
  return ladder.climb(operation, rungs, how.implementation)


def _functions(
  how: _How, product: str, **static: Any
) -> dict[str, Callable[..., Any]]:
  """The product of every implementation."""
  by_implementation = {
    "ragged_dot": ragged_dot.PRODUCTS,
    "tiled": tiled.PRODUCTS,
    "batched": batched.products(how.expected_rows),
    "pallas_tpu": pallas_tpu.products(how.interpret),
    "pallas_gpu": pallas_gpu.products(how.interpret),
  }
  # One by one in a batch: there the loops of all would go on until the longest
  # is done, and copy what they carry.
  return {
    name: jax.custom_batching.sequential_vmap(
      functools.partial(getattr(all_products, product), **static)
    )
    for name, all_products in by_implementation.items()
  }


def _kernel(
  operation: str,
  platform: str,
  functions: dict[str, Callable[..., Any]],
  operands: Any,
  interpret: Any,
  *,
  by_name: bool,
) -> Callable[..., Any]:
  """The kernel of a platform; raises `ladder.Refusal` if it cannot multiply this."""
  name = _KERNELS[platform]
  _CHECKS[name](operands, by_name=by_name, interpret=interpret)
  return functools.partial(
    ladder.call_kernel, operation, platform, functions[name], interpret
  )


def _by_platform(
  operation: str, functions: dict[str, Callable[..., Any]], operands: Any
) -> Any:
  """The best product of the platform that the program is lowered for."""
  is_symbolic = not isinstance(operands[0].shape[0], int)
  branches: dict[str, Callable[..., Any]] = dict(
    cpu=functions["batched" if is_symbolic else "tiled"],
    cuda=functions["batched"],
    default=functions["ragged_dot"],
  )
  for platform in _KERNELS:
    with contextlib.suppress(ladder.Refusal):
      # XLA keeps whatever the kernel cannot do.
      branches[platform] = _kernel(
        operation, platform, functions, operands, False, by_name=False
      )
  return lax.platform_dependent(*operands, **branches)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _grouped_matmul(
  how: _How,
  dtype: Any,
  transpose_rhs: bool,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
) -> jax.Array:
  static = dict(dtype=dtype, transpose_rhs=transpose_rhs)
  return _call("grouped_matmul", how, "matmul", lhs, rhs, group_sizes, **static)


def _grouped_matmul_fwd(
  how: _How,
  dtype: Any,
  transpose_rhs: bool,
  lhs: jax.Array,
  rhs: jax.Array,
  group_sizes: jax.Array,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  out = _grouped_matmul(how, dtype, transpose_rhs, lhs, rhs, group_sizes)
  return out, (lhs, rhs, group_sizes)


def _grouped_matmul_bwd(
  how: _How,
  dtype: Any,
  transpose_rhs: bool,
  residuals: tuple[jax.Array, ...],
  d_out: jax.Array,
) -> tuple[jax.Array | None, ...]:
  del dtype
  lhs, rhs, group_sizes = residuals
  d_out = d_out.astype(lhs.dtype)
  d_lhs = _grouped_matmul(
    how, lhs.dtype, not transpose_rhs, d_out, rhs, group_sizes
  )
  pair = (d_out, lhs) if transpose_rhs else (lhs, d_out)
  d_rhs = _call("grouped_matmul", how, "outer", *pair, group_sizes)
  return d_lhs, d_rhs, None


_grouped_matmul.defvjp(_grouped_matmul_fwd, _grouped_matmul_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(
  how: _How, x: jax.Array, params: ExpertParams, group_sizes: jax.Array
) -> jax.Array:
  out, _ = _call("swiglu", how, "swiglu", x, params, group_sizes, keep=False)
  return out


def _swiglu_fwd(
  how: _How, x: jax.Array, params: ExpertParams, group_sizes: jax.Array
) -> tuple[jax.Array, tuple[Any, ...]]:
  out, kept = _call("swiglu", how, "swiglu", x, params, group_sizes, keep=True)
  return out, (x, kept, params, group_sizes)


def _swiglu_bwd(
  how: _How, residuals: tuple[Any, ...], d_out: jax.Array
) -> tuple[jax.Array, ExpertParams, None]:
  d_x, d_params = _call("swiglu", how, "swiglu_gradient", *residuals, d_out)
  return d_x, d_params, None


_swiglu.defvjp(_swiglu_fwd, _swiglu_bwd)
