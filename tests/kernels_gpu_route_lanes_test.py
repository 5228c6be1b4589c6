# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The sizes of the GPU routing kernel, and which routers it takes."""

import dataclasses

import cases
import hypothesis
import jax.numpy as jnp
import pytest
from hypothesis import strategies as st

from jaxroute import types
from jaxroute.kernels.gpu import order
from jaxroute.kernels.gpu.route import lanes as lanes_lib
from jaxroute.kernels.gpu.route import plan as plan_lib
from jaxroute.kernels.gpu.route import refs
from jaxroute.kernels.gpu.threads import THREADS

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)
# Shared memory that a block may have on Hopper and Blackwell.
_HARDWARE_BYTES = 227 * 1024
_TOKENS = (0, 1, 16, 127, 128, 4096, 4097, 65536, 10**6)

# Experts, K, and the groups and how many are kept, of models in use.
_PUBLISHED = {
  "Mixtral 8x7B": (8, 2, 1, 1),
  "Llama 4 Maverick": (128, 1, 1, 1),
  "Qwen1.5-MoE": (60, 4, 1, 1),
  "DeepSeek-MoE": (64, 6, 1, 1),
  "OLMoE": (64, 8, 1, 1),
  "gpt-oss 120B": (128, 4, 1, 1),
  "Qwen3 235B": (128, 8, 1, 1),
  "DeepSeek-V2": (160, 6, 8, 3),
  "DeepSeek-V3": (256, 8, 8, 4),
  "Kimi K2": (384, 8, 1, 1),
  "Qwen3-Next": (512, 10, 1, 1),
}


def _plan(config, lanes, tokens=4096, dtype=jnp.float32, **fields):
  everything = dict(
    has_bias=True, has_mask=True, with_chosen=True, with_rank=True
  )
  return plan_lib.Plan(
    config=config,
    tokens=tokens,
    dtype=jnp.dtype(dtype),
    lanes=lanes,
    interpret=False,
    **everything | fields,
  )


def _published(name):
  e, k, groups, kept = _PUBLISHED[name]
  return types.RouterConfig(
    num_experts=e, top_k=k, num_groups=groups, group_top_k=kept
  )


def _assert_is_sound(config, tokens, dtype):
  """What `choose` takes fits into memory, and covers tokens and experts."""
  lanes = lanes_lib.choose(config, tokens, dtype)
  assert lanes in (1, 2, 4, 8)
  plan = _plan(config, lanes, tokens, dtype)
  assert refs.shared_bytes(plan) <= _HARDWARE_BYTES
  assert plan.chunks * plan.width * lanes == plan.padded_experts
  assert plan.padded_experts >= config.num_experts
  # Of a chunk, a thread has a bit of 32 for each expert.
  assert plan.width <= 32
  # A row of a chunk is copied in pieces of 32 bytes at least.
  assert plan.width * jnp.dtype(dtype).itemsize in (32, 64, 128)
  assert plan.tile_tokens * plan.tiles >= tokens
  if tokens:
    assert plan.tile_tokens * (plan.tiles - 1) < tokens
  assert plan.padded_tokens >= max(tokens, plan.tile_tokens)
  assert plan.padded_tokens * lanes % 8 == 0
  assert plan.slots >= config.top_k
  assert plan.rounds * 32 >= plan.warp_tokens * plan.slots
  if config.limits_groups:
    # A group is of one thread.
    assert plan.groups * lanes == config.num_groups
    assert lanes == 1 or plan.part % config.group_size == 0
  # `order.rank` keeps the counts of a short span in shared memory.
  assert plan.count_pitch > config.num_experts
  assert order.SPANS[0] * plan.count_pitch * 4 <= _HARDWARE_BYTES


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("name", _PUBLISHED)
def test_it_takes_published_routers(name, dtype):
  config = _published(name)
  assert lanes_lib.unsupported(config, dtype) is None
  for tokens in _TOKENS:
    _assert_is_sound(config, tokens, dtype)


@pytest.mark.parametrize("name", cases.FAMILIES)
def test_it_takes_every_family_but_a_soft_cap(name):
  config = cases.family(name)
  for dtype in _DTYPES:
    reason = lanes_lib.unsupported(config, dtype)
    if name == "soft_cap":
      assert reason == "`logit_soft_cap` is not supported"
    else:
      assert reason is None
      _assert_is_sound(config, 4096, dtype)


@pytest.mark.parametrize("shape", cases.SHAPES, ids=str)
def test_it_takes_every_shape(shape):
  t, e, k = shape
  for dtype in _DTYPES:
    config = types.RouterConfig(num_experts=e, top_k=k)
    assert lanes_lib.unsupported(config, dtype) is None
    _assert_is_sound(config, t, dtype)


@pytest.mark.parametrize(
  ("name", "tokens", "lanes"),
  (
    ("DeepSeek-V3", 16, 8),
    ("DeepSeek-V3", 4096, 8),
    ("DeepSeek-V3", 16384, 4),
    ("DeepSeek-V3", 65536, 4),
    ("Qwen3 235B", 65536, 2),
    ("DeepSeek-MoE", 16, 8),
    ("DeepSeek-MoE", 10**6, 1),
    ("Mixtral 8x7B", 16, 1),
    # Groups of 20 are of one thread, and 60 has no parts of whole chunks.
    ("DeepSeek-V2", 65536, 1),
    ("Kimi K2", 65536, 4),
  ),
)
def test_threads_for_a_token(name, tokens, lanes):
  assert lanes_lib.choose(_published(name), tokens, jnp.float32) == lanes


@pytest.mark.parametrize(
  ("fields", "words"),
  (
    (dict(num_experts=1025), ("num_experts", "1024", "1025")),
    (dict(num_experts=64, top_k=17), ("top_k", "16", "17")),
    (
      dict(num_experts=132, num_groups=66, group_top_k=4),
      ("at most 32 groups", "66"),
    ),
    (dict(num_experts=8, logit_soft_cap=3.0), ("logit_soft_cap",)),
    (
      dict(num_experts=1020, num_groups=2, group_top_k=1),
      ("2 groups of 510", "shared memory"),
    ),
  ),
)
def test_what_it_cannot_do_is_said(fields, words):
  config = types.RouterConfig(**dict(top_k=2) | fields)
  reason = lanes_lib.unsupported(config, jnp.float32)
  for word in words:
    assert word in reason


def test_groups_that_limit_nothing_are_no_limit():
  config = types.RouterConfig(
    num_experts=132, top_k=2, num_groups=66, group_top_k=66
  )
  assert lanes_lib.unsupported(config, jnp.float32) is None
  assert _plan(config, 1).groups == 0


@st.composite
def _configs(draw):
  groups = draw(st.sampled_from((1, 1, 2, 3, 4, 7, 8, 16, 32, 33)))
  size = draw(st.integers(1 if groups == 1 else 2, 1100 // groups))
  kept = draw(st.integers(1, groups))
  return types.RouterConfig(
    num_experts=groups * size,
    top_k=draw(st.integers(1, min(18, kept * size))),
    num_groups=groups,
    group_top_k=kept,
    group_score=draw(st.sampled_from(("top1", "top2"))),
    score_fn=draw(st.sampled_from(("sigmoid", "softmax", "sqrtsoftplus"))),
    logit_soft_cap=draw(st.sampled_from((None, None, None, 3.0))),
  )


@hypothesis.given(_configs(), st.integers(0, 10**6), st.sampled_from(_DTYPES))
def test_every_router_is_taken_or_refused_with_words(config, tokens, dtype):
  reason = lanes_lib.unsupported(config, dtype)
  if reason is None:
    _assert_is_sound(config, tokens, dtype)
  else:
    assert len(reason.split()) > 3
    # Without what is too much, it is taken.
    smaller = dataclasses.replace(
      config,
      num_experts=64,
      top_k=min(config.top_k, 16),
      num_groups=1,
      group_top_k=1,
      logit_soft_cap=None,
    )
    assert lanes_lib.unsupported(smaller, dtype) is None


def test_a_tile_that_others_share():
  config = types.RouterConfig(num_experts=64, top_k=2)
  assert not _plan(config, 2, tokens=128).shares_tokens
  assert _plan(config, 2, tokens=127).shares_tokens
  assert _plan(config, 2, tokens=1).shares_tokens
  assert _plan(config, 2, tokens=65).tiles == 2


def test_memory_is_only_for_what_is_asked_for():
  config = types.RouterConfig(num_experts=64, top_k=2)
  plan = _plan(config, 1, has_bias=False, with_rank=False)
  assert set(refs.buffer_shapes(plan)) == {
    "logits",
    "chosen",
    "is_counted",
    "bits",
  }
  softmax = dataclasses.replace(
    config, score_fn="softmax", num_groups=4, group_top_k=2
  )
  everything = _plan(softmax, 1, dtype=jnp.bfloat16)
  assert set(refs.buffer_shapes(everything)) == {
    "logits",
    "selection_scores",
    "chosen",
    "is_counted",
    "bits",
    "expert_bias",
    "lists",
    "softmax_sums",
    "ranks",
  }
  assert refs.shared_bytes(everything) > refs.shared_bytes(plan)
  assert THREADS * 64 * 4 < refs.shared_bytes(plan)
