# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The programs whose cycles `tpu_cycles.py` estimates, and their sizes."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jaxroute

TopK = Callable[[jax.Array, int], jax.Array]

WIDTH = 2048
"""D of the tokens that are projected, and of the rows that experts take."""

EXPERT_WIDTH = 1024
"""F of the experts."""

MOVES = ("combine", "dispatch grad", "combine grad")
"""Programs that move rows."""

EXPERTS = ("swiglu", "swiglu grad")
"""Programs that multiply rows by the matrices of experts."""


def shapes(
  t: int, config: jaxroute.RouterConfig, candidate: str
) -> list[jax.ShapeDtypeStruct]:
  """The operands of a program.

  Args:
    t: T.
    config: what is routed by.
    candidate: a key of `programs`.

  Returns:
    Abstract arrays, in order.
  """
  e, k = config.num_experts, config.top_k
  if candidate in EXPERTS:
    rows, sizes = ((t * k, WIDTH), jnp.bfloat16), ((e,), jnp.int32)
    into = (e, WIDTH, EXPERT_WIDTH), jnp.bfloat16
    back = (e, EXPERT_WIDTH, WIDTH), jnp.bfloat16
    operands = [rows, into, into, back, sizes]
    operands += [rows] if "grad" in candidate else []
    return [jax.ShapeDtypeStruct(*operand) for operand in operands]
  if candidate == "sort pairs":
    pairs = ((t * k,), jnp.int32), ((t * k,), jnp.float32)
    return [jax.ShapeDtypeStruct(*operand) for operand in pairs]
  if candidate in MOVES:
    numbers = [((t * k,), jnp.int32), ((t * k,), jnp.int32), ((e,), jnp.int32)]
    rows, tokens = ((t * k, WIDTH), jnp.bfloat16), ((t, WIDTH), jnp.bfloat16)
    weights = (t, k), jnp.float32
    operands = {
      "combine": [rows, weights],
      "dispatch grad": [rows],
      "combine grad": [rows, weights, tokens],
    }[candidate]
    return [jax.ShapeDtypeStruct(*x) for x in operands + numbers]
  operands = [((t, e), jnp.float32), ((e,), jnp.float32)]
  if candidate in ("sort", "argsort"):
    operands = [((t, k), jnp.int32)]
  if "project" in candidate:
    operands[:1] = [((t, WIDTH), jnp.bfloat16), ((WIDTH, e), jnp.float32)]
  if "grad" in candidate:
    operands.append(((t, k), jnp.float32))
  return [jax.ShapeDtypeStruct(*operand) for operand in operands]


def programs(
  config: jaxroute.RouterConfig, interpret: bool = False
) -> dict[str, Callable[..., Any]]:
  """Candidate to function of its operands; see the docstring of `tpu_cycles`.

  Args:
    config: what is routed by.
    interpret: whether the kernels are interpreted, on any device.
  """
  return (
    _plain_programs(config)
    | _our_programs(config, interpret)
    | _move_programs(config)
    | _expert_programs()
  )


def _plain_programs(
  config: jaxroute.RouterConfig,
) -> dict[str, Callable[..., Any]]:
  """What one writes without jaxroute."""

  def plain(logits, bias):
    return _plain_route(
      config, lambda x, k: jax.lax.top_k(x, k)[1], logits, bias
    )

  def tokamax(logits, bias):
    from tokamax.ops import router_topk

    return _plain_route(config, lambda x, k: router_topk(x, k)[1], logits, bias)

  def argsort(expert_idx):
    permutation = jnp.argsort(expert_idx.reshape(-1), stable=True)
    load = jnp.zeros(config.num_experts, jnp.int32).at[expert_idx].add(1)
    return permutation, jnp.argsort(permutation), load

  return {
    "plain": plain,
    "tokamax": tokamax,
    "plain grad": _with_gradient(plain),
    "argsort": argsort,
  }


def _our_programs(
  config: jaxroute.RouterConfig, interpret: bool
) -> dict[str, Callable[..., Any]]:
  """The kernels, asked for by name."""
  kernel: Any = dict(implementation="pallas_tpu", interpret=interpret)
  counted = dataclasses.replace(config, histogram=True)

  def ours(logits, bias):
    r = jaxroute.route(logits, bias, config, **kernel)
    return r.expert_idx, r.weights, r.load, r.cutoff

  def histogram(logits, bias):
    r = jaxroute.route(logits, bias, counted, **kernel)
    return r.expert_idx, r.weights, r.load, r.counts.histogram

  def project(tokens, router_weight, bias):
    return ours(jaxroute.routing.project(tokens, router_weight), bias)

  def project_fused(tokens, router_weight, bias):
    r = jaxroute.routing.project_and_route(
      tokens, router_weight, bias, config, **kernel
    )
    return r.expert_idx, r.weights, r.load, r.cutoff

  def sort(expert_idx):
    return jaxroute.dispatch.sort_by_expert(
      expert_idx, config.num_experts, **kernel
    )

  return {
    "jaxroute": ours,
    "jaxroute grad": _with_gradient(ours),
    "jaxroute histogram": histogram,
    "project": project,
    "project fused": project_fused,
    "sort": sort,
  }


def _move_programs(
  config: jaxroute.RouterConfig,
) -> dict[str, Callable[..., Any]]:
  """Rows to tokens and back, as the target takes it."""
  k = config.top_k

  def combine(rows, weights, *numbers):
    permutation = _permutation(*numbers)
    return jaxroute.dispatch.combine(rows, weights, permutation)

  def dispatch_grad(d_rows, *numbers):
    permutation = _permutation(*numbers)
    x = jax.ShapeDtypeStruct((d_rows.shape[0] // k, WIDTH), d_rows.dtype)
    copy = functools.partial(
      jaxroute.dispatch.dispatch, permutation=permutation
    )
    return jax.linear_transpose(copy, x)(d_rows)

  def combine_grad(rows, weights, d_out, *numbers):
    def of(rows, weights):
      return combine(rows, weights, *numbers)

    return jax.vjp(of, rows, weights)[1](d_out)

  def sort_pairs(keys, values):
    return jax.lax.sort((keys, values), num_keys=1, is_stable=False)

  programs = combine, dispatch_grad, combine_grad
  return dict(zip(MOVES, programs, strict=True)) | {"sort pairs": sort_pairs}


def _expert_programs() -> dict[str, Callable[..., Any]]:
  """The experts by the kernels, asked for by name."""

  def swiglu(x, w_gate, w_up, w_down, group_sizes):
    params = jaxroute.experts.ExpertParams(
      w_gate=w_gate, w_up=w_up, w_down=w_down
    )
    return jaxroute.experts.swiglu(
      x, params, group_sizes, implementation="pallas_tpu"
    )

  def swiglu_grad(x, w_gate, w_up, w_down, group_sizes, d_y):
    def of(*operands):
      return swiglu(*operands, group_sizes)

    y, pull = jax.vjp(of, x, w_gate, w_up, w_down)
    return y, pull(d_y)

  return dict(zip(EXPERTS, (swiglu, swiglu_grad), strict=True))


def _permutation(*numbers: jax.Array) -> jaxroute.dispatch.Permutation:
  permutation, inverse, group_sizes = numbers
  return jaxroute.dispatch.Permutation(
    permutation=permutation,
    inverse_permutation=inverse,
    group_sizes=group_sizes,
  )


def _with_gradient(route: Callable[..., Any]) -> Callable[..., Any]:
  """The forward pass, and the gradient of the weights to the logits."""

  def grad(logits, bias, d_weights):
    def weights(logits):
      expert_idx, weights, load, *_ = route(logits, bias)
      return weights, (expert_idx, load)

    out, pull, aux = jax.vjp(weights, logits, has_aux=True)
    return out, aux, pull(d_weights)

  return grad


def _plain_route(
  config: jaxroute.RouterConfig,
  top_k: TopK,
  logits: jax.Array,
  bias: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Experts, weights and load, by somebody's top-k."""
  e = config.num_experts
  scores = logits.astype(jnp.float32)
  is_softmax = config.score_fn == "softmax"
  scores = jax.nn.softmax(scores) if is_softmax else jax.nn.sigmoid(scores)
  selection = scores + bias
  if config.num_groups > 1:
    grouped = selection.reshape(-1, config.num_groups, config.group_size)
    best = jax.lax.top_k(grouped, 2)[0].sum(-1)
    kept = jax.lax.top_k(best, config.group_top_k)[1]
    keep = jax.nn.one_hot(kept, config.num_groups, dtype=bool).any(1)
    selection = jnp.where(keep[..., None], grouped, -jnp.inf).reshape(-1, e)
  idx = top_k(selection, config.top_k)
  # Gathers and scatters cost more than all the rest; these are sums of
  # comparisons.
  chosen = idx[:, :, None] == jnp.arange(e)
  weights = jnp.sum(jnp.where(chosen, scores[:, None], 0.0), axis=2)
  weights /= weights.sum(1, keepdims=True)
  return idx, weights, jnp.sum(chosen, axis=(0, 1), dtype=jnp.int32)
