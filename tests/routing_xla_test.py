# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Few keys are sorted on CUDA, others are found in rounds: with the same results."""

import functools

import cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import jaxroute
from jaxroute import scores
from jaxroute.routing import float_keys, xla

V3 = jaxroute.RouterConfig(
  num_experts=256, top_k=8, num_groups=8, group_top_k=4
)
FEW = xla._FEW_KEYS // 256 - 1
MANY = FEW + 1


def _keys(kind, t, config):
  logits = jnp.asarray(cases.logits(kind, t, config.num_experts))
  return float_keys.to_keys(scores.selection_scores(logits, None, config))


@pytest.mark.parametrize(("t", "e", "k"), cases.SHAPES)
def test_a_sort_finds_what_rounds_find(t, e, k):
  config = jaxroute.RouterConfig(num_experts=e, top_k=k)
  count = min(k + 1, e)
  by_sort = jax.jit(functools.partial(xla._sort, count=count))
  by_rounds = jax.jit(functools.partial(xla._largest, count=count))
  for kind in cases.KINDS:
    keys = _keys(kind, t, config)
    for found, expected in zip(by_sort(keys), by_rounds(keys), strict=True):
      np.testing.assert_array_equal(found, expected, kind)


@pytest.mark.parametrize(
  ("e", "groups", "kept", "k", "group_score"),
  [
    (64, 8, 4, 8, "top2"),
    (64, 4, 2, 8, "top_k"),
    (60, 6, 3, 6, "top1"),
    (15, 5, 1, 3, "top_k"),
  ],
)
def test_the_groups_of_few_keys_are_those_of_many(
  e, groups, kept, k, group_score
):
  config = jaxroute.RouterConfig(
    num_experts=e,
    top_k=k,
    num_groups=groups,
    group_top_k=kept,
    group_score=group_score,
    bias_space="logits",
  )
  of_few, of_many = (
    jax.jit(functools.partial(keep, config=config))
    for keep in (xla._keep_best_groups_of_few, xla._keep_best_groups)
  )
  for kind in cases.KINDS:
    keys = _keys(kind, 70, config)
    np.testing.assert_array_equal(of_few(keys), of_many(keys), kind)
  for value in (jnp.inf, -0.0):
    # Infinite scores in a group with masked experts; zeros of both signs.
    logits = cases.logits("masked", 70, e)
    logits[::3, ::4] = value
    logits[1::3, 1::4] = 0.0
    keys = float_keys.to_keys(jnp.asarray(logits))
    np.testing.assert_array_equal(of_few(keys), of_many(keys))


def _lowered(t, platform):
  logits = jax.ShapeDtypeStruct((t, 256), jnp.float32)
  bias = jax.ShapeDtypeStruct((256,), jnp.float32)

  def route(logits, bias):
    return jaxroute.route(logits, bias, V3, implementation="xla")

  exported = export.export(jax.jit(route), platforms=[platform])(logits, bias)
  return exported.mlir_module()


@pytest.mark.parametrize(
  ("platform", "t", "is_sorted"),
  [
    ("cuda", 16, True),
    ("cuda", FEW, True),
    ("cuda", MANY, False),
    ("cpu", 16, False),
    ("tpu", 16, False),
    ("rocm", 16, False),
  ],
)
def test_only_few_keys_on_cuda_are_sorted(platform, t, is_sorted):
  assert ("chlo.top_k" in _lowered(t, platform)) == is_sorted


def test_a_symbolic_number_of_keys_is_sorted_on_cuda():
  (t,) = export.symbolic_shape("t")
  assert "chlo.top_k" in _lowered(t, "cuda")
  assert "chlo.top_k" not in _lowered(t, "cpu")
