# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Histograms of distances to the cutoff: XLA and kernel against the oracle."""

import dataclasses
import functools

import cases
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import jaxroute
from jaxroute import scores
from jaxroute.routing import bias_histogram

pytestmark = pytest.mark.optimized

_route = jax.jit(
  functools.partial(jaxroute.route, implementation="xla"),
  static_argnames="config",
)

_with_selection = jax.jit(
  conformance.with_selection(_route), static_argnames="config"
)


def _on_scores(e, k, **kwargs):
  """A router whose selection scores are its logits."""
  return jaxroute.RouterConfig(
    num_experts=e, top_k=k, bias_space="logits", histogram=True, **kwargs
  )


def _assert_is_oracle(t, config, kind, masked=False):
  e = config.num_experts
  logits, bias = cases.logits(kind, t, e), conformance.bias(e)
  mask = np.random.default_rng(0).random(t) < 0.7 if masked else None
  counted = dataclasses.replace(config, histogram=True)
  r, selection = _with_selection(logits, bias, counted, mask)
  selection = np.asarray(selection)
  expected = oracle.histogram(selection, config, np.asarray(r.token_mask))
  np.testing.assert_array_equal(r.counts.histogram, expected)
  assert r.counts.histogram.dtype == jnp.int32
  # All else is as without it, and held to the oracle like that.
  ids, cutoff = oracle.select(selection, config)
  np.testing.assert_array_equal(r.expert_idx, ids)
  conformance.assert_cutoff(r.cutoff, cutoff, config)
  assert _route(logits, bias, config, mask).counts.histogram is None


@pytest.mark.parametrize("shape", conformance.rows(cases.SHAPES))
def test_every_shape(shape):
  t, e, k = shape
  config = jaxroute.RouterConfig(num_experts=e, top_k=k)
  for kind in cases.KINDS:
    _assert_is_oracle(t, config, kind)


@pytest.mark.parametrize("name", conformance.rows(cases.FAMILIES))
def test_every_family(name):
  for kind in ("random", "nan", "masked"):
    _assert_is_oracle(23, cases.family(name), kind, masked=True)


def test_edges_are_powers_of_eight():
  upper = bias_histogram.EDGES[9:]
  np.testing.assert_array_equal(upper, oracle.UPPER_EDGES)
  np.testing.assert_array_equal(bias_histogram.EDGES[:8], -upper[::-1])
  assert len(bias_histogram.EDGES) == bias_histogram.BINS + 1


def test_a_distance_on_an_edge_belongs_to_the_bin_above():
  # With the cutoff at 0, minus the logit is the distance. Powers of two are
  # exact.
  above = np.concatenate([[0.0], oracle.UPPER_EDGES]).astype(np.float32)
  above[-1] = 1e30
  logits = -np.stack([np.full(9, -40.0), np.zeros(9), above], axis=1)
  below_edge = np.nextafter(logits, np.inf, dtype=np.float32)
  config = _on_scores(3, 1)
  on = _route(np.float32(logits), None, config).counts.histogram
  np.testing.assert_array_equal(on[2, 8:], [1, 1, 1, 1, 1, 1, 1, 2])
  below = _route(np.float32(below_edge[1:8]), None, config).counts.histogram
  np.testing.assert_array_equal(below[2, 8:], [1, 1, 1, 1, 1, 1, 1, 0])


def test_counts_of_many_tokens_do_not_overflow_their_fields():
  config = _on_scores(3, 1)
  logits = jnp.broadcast_to(jnp.array([1.0, 0.0, -8.0]), (5000, 3))
  h = _route(logits, None, config).counts.histogram
  np.testing.assert_array_equal(h.sum(1), 5000)
  assert h[0, 1] == h[1, 8] == h[2, 15] == 5000


@functools.partial(conformance.jit_interpreted, static_argnames="config")
def _kernel(logits, bias, config, mask):
  return jaxroute.route(
    logits, bias, config, mask, implementation="pallas_tpu", interpret=True
  )


@pytest.mark.cpu("it interprets the kernel of a TPU")
@pytest.mark.parametrize(
  ("t", "config"),
  (
    (40, cases.family("deepseek_v3")),
    (1100, jaxroute.RouterConfig(num_experts=21, top_k=3)),
    (40, jaxroute.RouterConfig(num_experts=8, top_k=8)),
  ),
  ids=("groups", "blocks", "all"),
)
def test_the_kernel_counts_the_same(t, config):
  config = dataclasses.replace(config, histogram=True)
  bias = conformance.bias(config.num_experts)
  mask = np.random.default_rng(0).random(t) < 0.7
  for kind in cases.KINDS:
    logits = cases.logits(kind, t, config.num_experts)
    actual = _kernel(logits, bias, config, mask)
    selection = np.asarray(scores.selection_scores(logits, bias, config))
    expected = oracle.histogram(
      selection, config, np.asarray(actual.token_mask)
    )
    np.testing.assert_array_equal(actual.counts.histogram, expected)
    assert actual.counts.histogram.dtype == jnp.int32


@pytest.mark.any_jax
@pytest.mark.cpu("it interprets the kernel of a TPU")
def test_the_kernel_counts_distances_of_all_sizes_in_many_blocks():
  # More blocks than the fields between two sums have room for.
  rng, config = np.random.default_rng(0), _on_scores(5, 2)
  logits = rng.normal(size=(34_000, 5)) * np.exp(
    rng.normal(size=(34_000, 1)) * 9
  )
  logits[::7, 3], logits[::11, 2], logits[::13] = np.inf, -np.inf, 0.0
  logits[::17, 1] = -0.0
  logits = np.float32(logits)
  expected = _route(logits, None, config)
  assert (np.asarray(expected.counts.histogram) > 0).all()
  actual = _kernel(logits, None, config, None)
  np.testing.assert_array_equal(
    actual.counts.histogram, expected.counts.histogram
  )
  np.testing.assert_array_equal(actual.load, expected.load)


@pytest.mark.parametrize("dtype", (jnp.int8, jnp.uint8, jnp.int32))
def test_narrow_indices_are_those_of_experts(dtype):
  selection = jnp.linspace(0.0, 1.0, 200)[None]
  idx = jnp.array([[199, 198] if dtype != jnp.int8 else [126, 127]], dtype)
  found = bias_histogram.count(
    selection, idx, jnp.array([0.5]), jnp.array([True])
  )
  assert found.shape == (200, 16)
  assert int(jnp.sum(found[np.asarray(idx[0], np.int32)])) == 2
