# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The GPU routing kernel, interpreted: the oracle, and XLA bit for bit."""

import functools

import cases
import conformance
import gpu_mesh
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxroute
from jaxroute import types
from jaxroute.kernels.gpu import route as kernel

pytestmark = gpu_mesh.needs_kernels


def _in_turn(t, *rows):
  """[T, E]: some of each of the rows, from their first, one kind after the other."""
  parts = np.array_split(np.arange(t), len(rows))
  kinds = zip(parts, rows, strict=True)
  return np.concatenate([x[: len(part)] for part, x in kinds])


def _kinds(t, e):
  return [cases.logits(kind, t, e) for kind in cases.KINDS]


def _special(t, e):
  """[T, E] of zeros of both signs, infinities of both, and all kinds of `cases`."""
  zeros, infinite = cases.logits("random", t, e), cases.logits("random", t, e)
  zeros[np.abs(zeros) < 2] = 0.0
  zeros = np.where(np.arange(e) % 2 == 0, -zeros, zeros)
  # In most tokens every group of experts has some.
  rng = np.random.default_rng(1)
  infinite[rng.random((t, e)) < 0.2] = np.inf
  infinite[rng.random((t, e)) < 0.2] = -np.inf
  return _in_turn(t, zeros, infinite, *_kinds(t, e))


def _biases(e):
  """None is small; then with NaNs; then with infinities; then zeros of both signs."""
  small = conformance.bias(e)
  with_nan, infinite = small.copy(), small.copy()
  with_nan[:: max(e // 3, 2)] = np.nan
  infinite[0], infinite[-1] = -np.inf, np.inf
  return small, with_nan, infinite, np.zeros(e, np.float32) * -1


@functools.partial(jax.jit, static_argnames=("config", "lanes"))
def _both(logits, expert_bias, token_mask, *, config, lanes):
  """Of one program: the kernel's outputs, XLA's, and the selection scores."""

  def by_xla(*args):
    return jaxroute.route(*args, implementation="xla")

  out = kernel.route(
    logits,
    expert_bias,
    token_mask,
    config=config,
    with_chosen=True,
    with_rank=True,
    lanes=lanes,
    interpret=True,
  )
  xla, selection = conformance.with_selection(by_xla)(
    logits, expert_bias, config, token_mask
  )
  return out, xla, selection


def _assert_is_right(logits, bias, mask, config, lanes, is_ordinary=True):
  """Held to XLA; and to the oracle, if no infinity makes weights of its own."""
  out, xla, selection = _both(logits, bias, mask, config=config, lanes=lanes)
  out, xla = jax.tree.map(np.asarray, (out, xla))
  np.testing.assert_array_equal(out.expert_idx, xla.expert_idx)
  np.testing.assert_array_equal(out.load, xla.load)
  if config.histogram:
    np.testing.assert_array_equal(out.histogram, xla.counts.histogram)
    assert out.histogram.any() or not is_ordinary
  np.testing.assert_array_equal(out.token_mask, xla.token_mask)
  # The sum of a softmax is taken in another order than by XLA.
  rtol = 3e-6 if config.needs_row_softmax else 0
  np.testing.assert_allclose(out.cutoff, xla.cutoff, rtol)
  np.testing.assert_allclose(out.weights, xla.weights, 2e-6, 1e-37)
  x = np.asarray(logits)
  chosen = np.take_along_axis(x, xla.expert_idx, axis=1)
  np.testing.assert_array_equal(np.float32(out.chosen), np.float32(chosen))
  assert out.chosen.dtype == x.dtype
  np.testing.assert_array_equal(
    out.rank, oracle.ranks(xla.expert_idx, xla.token_mask)
  )
  if is_ordinary:
    routing = conformance.routing_of(out)
    conformance.assert_is_oracle(
      lambda *args: (routing, selection),
      np.float32(logits),
      bias,
      config,
      mask,
      rtol,
    )


_V2 = dict(cases.FAMILIES["deepseek_v2"], num_groups=8, group_top_k=3)
# Router, threads for a token, tokens, dtype, whether there is a token mask; without
# one there is no bias either, where logits are bfloat16.
_CASES = {
  "160 in groups of 20": (
    types.RouterConfig(num_experts=160, top_k=6, **_V2),
    *(1, 20, "float32", True),
  ),
  "deepseek_v3": (
    cases.family("deepseek_v3", histogram=True),
    *(2, 71, "float32", True),
  ),
  "deepseek_v4": (
    cases.family("deepseek_v4", 60, 6, histogram=True),
    *(1, 101, "float32", True),
  ),
  "megatron_groups": (
    cases.family("megatron_groups", 32, 6),
    *(4, 31, "float32", True),
  ),
  "mixtral": (
    cases.family("mixtral", 8, 2, histogram=True),
    *(1, 40, "bfloat16", False),
  ),
  "olmoe": (cases.family("olmoe", 64, 8), 8, 35, "float32", True),
  "longcat": (cases.family("longcat", 32, 3), 2, 30, "float16", False),
  "lfb": (cases.family("lfb", 16, 1), 1, 31, "float32", False),
  "sigmoid_logit_bias": (
    cases.family("sigmoid_logit_bias", 32, 4),
    *(2, 31, "bfloat16", True),
  ),
  "sigmoid_after": (
    cases.family("sigmoid_after", 4, 4, histogram=True),
    *(1, 101, "float32", False),
  ),
}


@pytest.mark.parametrize("name", _CASES)
def test_it_is_the_oracle_and_xla_bit_for_bit(name):
  config, lanes, t, dtype, has_mask = _CASES[name]
  e = config.num_experts
  mask = np.random.default_rng(0).random(t) < 0.7 if has_mask else None
  check = functools.partial(_assert_is_right, config=config, lanes=lanes)
  small, *others = _biases(e)
  if not has_mask and dtype == "bfloat16":
    small, others = None, [None]
  ordinary = jnp.asarray(_in_turn(t, *_kinds(t, e))).astype(dtype)
  check(ordinary, small, mask)
  special = jnp.asarray(_special(t, e)).astype(dtype)
  for bias in others:
    check(special, bias, mask, is_ordinary=False)


@pytest.mark.parametrize(
  "fields",
  (
    dict(),
    dict(score_fn="softmax", normalize_weights=False),
  ),
  ids=str,
)
def test_weights_of_logits_of_every_size(fields):
  config = types.RouterConfig(num_experts=8, top_k=3, **fields)
  # The bias makes three experts the best, however improbable.
  bias = np.float32([0, 0, 9, 0, 9, 9, 0, 0])

  def weigh(x):
    routing = jaxroute.route(
      x, bias, config, implementation="pallas_gpu", interpret=True
    )
    return routing.weights, routing.expert_idx

  # The gradient is taken from log scores, which are rounded.
  conformance.assert_weights_are_exact(
    weigh, cases.extreme_logits(8), config, rtol=2e-5
  )


def test_no_tokens_route_to_nothing():
  x, config = (
    np.zeros((0, 8), np.float16),
    types.RouterConfig(num_experts=8, top_k=2, histogram=True),
  )
  how = dict(config=config, with_chosen=True, with_rank=True, interpret=True)
  out = kernel.route(x, conformance.bias(8), np.zeros(0, bool), **how)
  assert {name: (x.shape, x.dtype) for name, x in out._asdict().items()} == {
    "expert_idx": ((0, 2), np.int32),
    "weights": ((0, 2), np.float32),
    "load": ((8,), np.int32),
    "cutoff": ((0,), np.float32),
    "token_mask": ((0,), np.bool_),
    "histogram": ((8, 16), np.int32),
    "chosen": ((0, 2), np.float16),
    "rank": ((0, 2), np.int32),
  }
  assert not out.load.any() and not out.histogram.any()


def test_every_family_that_it_takes_is_tried():
  tried = {*_CASES, "deepseek_v2", "soft_cap"}
  assert set(cases.FAMILIES) <= tried
  assert kernel.unsupported(cases.family("soft_cap"), jnp.float32)
