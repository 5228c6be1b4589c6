# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Routers that kernels are held to on a device, their inputs, and what holds them."""

import dataclasses

import cases
import conformance
import experts_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute import ladder
from jaxroute.types import RouterConfig


@dataclasses.dataclass(frozen=True)
class Case:
  """One compiled program of `route`, and what its inputs are like.

  Attributes:
    t: T.
    config: the router.
    dtype: of the logits.
    has_bias: whether there is an `expert_bias`.
    has_mask: whether there is a `token_mask`.
  """

  t: int
  config: RouterConfig
  dtype: str
  has_bias: bool
  has_mask: bool

  def inputs(self, seed: int) -> tuple[np.ndarray | None, ...]:
    """Logits of the kind that the seed comes to, bias and token mask."""
    e = self.config.num_experts
    kind = cases.KINDS[seed % len(cases.KINDS)]
    logits = cases.logits(kind, self.t, e, seed).astype(jnp.dtype(self.dtype))
    mask = np.random.default_rng(seed).random(self.t) < 0.8
    return (
      logits,
      conformance.bias(e, seed) if self.has_bias else None,
      mask if self.has_mask else None,
    )

  def finite(self) -> tuple[jax.Array | None, ...]:
    """Inputs with a gradient, on the device: random logits."""
    return jax.device_put(self.inputs(0))


def _of(
  t,
  num_experts,
  top_k,
  family=None,
  *,
  dtype="float32",
  bias=True,
  mask=True,
  **kwargs,
):
  fields = dict(num_experts=num_experts, top_k=top_k) | kwargs
  if family:
    fields = cases.FAMILIES[family] | fields
  return Case(t, RouterConfig(**fields), dtype, bias, mask)


_OF_20 = dict(num_groups=8, group_top_k=3)

# T is one token, fewer than a tile, whole tiles, no multiple of anything, or so
# large that a token has fewer threads.
CASES = {
  "V3, T=1": _of(1, 256, 8, "deepseek_v3"),
  "V3, T=15": _of(15, 256, 8, "deepseek_v3"),
  "V3, T=4096": _of(4096, 256, 8, "deepseek_v3", mask=False),
  "V3, T=17003": _of(17_003, 256, 8, "deepseek_v3"),
  "V3, bfloat16": _of(301, 256, 8, "deepseek_v3", dtype="bfloat16"),
  "V2, 8 groups of 20, K=6": _of(203, 160, 6, "deepseek_v2", **_OF_20),
  "sigmoid, 8 groups of 20, K=6": _of(129, 160, 6, **_OF_20),
  "megatron, 4 groups of 16": _of(130, 64, 8, "megatron_groups"),
  "sigmoid, 2 of 8": _of(257, 8, 2),
  "sigmoid, 2 of 256": _of(17, 256, 2),
  "sigmoid, 6 of 60": _of(200, 60, 6),
  "softmax, 4 of 60, bfloat16": _of(33, 60, 4, "olmoe", dtype="bfloat16"),
  "softmax, 6 of 64, T=34001": _of(34_001, 64, 6, score_fn="softmax"),
  "softmax + bias in logits, float16": _of(128, 64, 8, "lfb", dtype="float16"),
  "softmax after, 8 of 128": _of(131, 128, 8, "mixtral", bias=False),
  "sqrtsoftplus, 8 of 256": _of(190, 256, 8, "deepseek_v4"),
  "sigmoid, 8 of 384": _of(129, 384, 8, scaling_factor=2.827),
  "softmax, 10 of 512": _of(77, 512, 10, "longcat", bias=False),
  "sigmoid, 10 of 512": _of(4100, 512, 10, mask=False),
  "sigmoid, 8 of 1024": _of(50, 1024, 8),
  "sigmoid, 16 of 256": _of(100, 256, 16, normalize_weights=False),
  "sigmoid, 1 of 128": _of(513, 128, 1),
  "sigmoid + bias in logits": _of(31, 64, 8, "sigmoid_logit_bias"),
  "sigmoid after": _of(65, 64, 8, "sigmoid_after"),
  "sigmoid, multiplied logits": _of(
    64, 64, 8, "sigmoid_logit_bias", logit_multiplier=0.3
  ),
}


ZEROS = RouterConfig(
  num_experts=64, top_k=4, score_after_top_k=True, bias_space="logits"
)
"""A router that compares logits as they are, -0.0 and 0.0 among them."""


def zeros_of_both_signs() -> np.ndarray:
  """[40, 64] logits for `ZEROS`: a few zeros in a row, and otherwise -1."""
  rng = np.random.default_rng(0)
  logits = np.full((40, ZEROS.num_experts), -1, np.float32)
  for row in logits:
    at = rng.choice(ZEROS.num_experts, rng.integers(3, 9), replace=False)
    row[at] = rng.choice(np.float32([-0.0, 0.0]), at.size)
  return logits


def compiled(function, *args):
  """`function` for arguments of these shapes; it cannot be compiled again.

  A router that the kernel leaves to XLA is skipped, with its reason.
  """
  try:
    return jax.jit(function).lower(*args).compile()
  except ladder.Refusal as reason:
    pytest.skip(str(reason))


def assert_routed_alike(ours, theirs, selection, config, *, exact=True):
  """Equal bit for bit; by a softmax over all experts, to its last bits.

  Args:
    ours: a `Routing`.
    theirs: a `Routing` by XLA.
    selection: `[T, E]`, what XLA compared.
    config: the router.
    exact: whether the kernel's scores are the bits of XLA's where they are not
      those of a softmax over all experts.
  """
  ours, theirs, selection = jax.device_get((ours, theirs, selection))
  rtol, atol, weights_rtol = 0.0, 0.0, 1e-6 if exact else 2e-5
  if config.needs_row_softmax:
    weights_rtol = max(weights_rtol, 5e-6)
  if not config.selects_on_logits and (config.needs_row_softmax or not exact):
    rtol, atol = 2e-6, 1e-7
  if rtol:
    chosen = (
      np.take_along_axis(selection, r.expert_idx, axis=1)
      for r in (ours, theirs)
    )
    np.testing.assert_allclose(*chosen, rtol=rtol, atol=atol)
  else:
    np.testing.assert_array_equal(ours.expert_idx, theirs.expert_idx)
    np.testing.assert_array_equal(ours.load, theirs.load)
  np.testing.assert_allclose(ours.cutoff, theirs.cutoff, rtol=rtol, atol=atol)
  same = np.all(ours.expert_idx == theirs.expert_idx, axis=1)
  np.testing.assert_array_equal(ours.token_mask[same], theirs.token_mask[same])
  expected = theirs.weights[same]
  largest = np.max(np.nan_to_num(np.abs(expected)), axis=1, keepdims=True)
  np.testing.assert_allclose(
    ours.weights[same] / np.where(largest, largest, 1),
    expected / np.where(largest, largest, 1),
    rtol=weights_rtol,
    atol=weights_rtol,
  )
  e = config.num_experts
  counted = ours.expert_idx[ours.token_mask].reshape(-1)
  np.testing.assert_array_equal(ours.load, np.bincount(counted, minlength=e))


def loss(route, config):
  """A sum of weights by factors of both signs, so that no gradient cancels."""

  def loss(logits, bias, mask):
    weights = route(logits, bias, config, mask).weights
    factor = jnp.cos(jnp.arange(weights.size, dtype=jnp.float32))
    return jnp.sum(weights * factor.reshape(weights.shape))

  return loss


def check_gradient(kernel, xla, case, tolerance):
  """Holds the gradient to the logits of one `route` to that of another.

  Args:
    kernel: the one that is tried.
    xla: the other.
    case: what is routed.
    tolerance: relative, of float32 logits.
  """
  args = case.finite()
  ours, theirs = (
    compiled(jax.grad(loss(route, case.config)), *args)(*args)
    for route in (kernel, xla)
  )
  assert ours.dtype == theirs.dtype == args[0].dtype
  if case.dtype != "float32":
    tolerance = 1e-2
  experts_cases.assert_close(ours, theirs, tolerance)
  assert jnp.any(ours != 0)
