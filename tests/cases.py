# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""One table of shapes and one of router families, for tests and benchmarks."""

from typing import Any

import numpy as np

from jaxroute.types import RouterConfig

# (T, E, K): odd sizes, one token, none, K = 1, K = E, real models.
SHAPES = (
  (0, 8, 2),
  (1, 1, 1),
  (1, 8, 2),
  (3, 4, 4),
  (7, 5, 3),
  (64, 8, 1),
  (33, 64, 6),
  (130, 96, 8),
  (257, 128, 8),
  (40, 256, 8),
  (17, 384, 8),
  (21, 512, 10),
)

# Router families, at E = 64 and K = 8.
FAMILIES = {
  "deepseek_v2": dict(
    score_fn="softmax",
    num_groups=8,
    group_top_k=4,
    group_score="top1",
    normalize_weights=False,
    scaling_factor=16.0,
  ),
  "deepseek_v3": dict(num_groups=8, group_top_k=4, scaling_factor=2.5),
  "deepseek_v4": dict(score_fn="sqrtsoftplus", scaling_factor=1.5),
  "megatron_groups": dict(num_groups=4, group_top_k=2, group_score="top_k"),
  "mixtral": dict(score_fn="softmax", score_after_top_k=True),
  "olmoe": dict(score_fn="softmax", normalize_weights=False),
  "longcat": dict(score_fn="softmax", bias_space="scores"),
  "lfb": dict(score_fn="softmax", bias_space="logits"),
  "sigmoid_logit_bias": dict(bias_space="logits"),
  "sigmoid_after": dict(score_after_top_k=True),
  "soft_cap": dict(logit_soft_cap=3.0, logit_multiplier=0.5),
}

# What `logits` can make.
KINDS = ("random", "ties", "constant", "masked", "saturated", "nan")


def family(
  name: str, num_experts: int = 64, top_k: int = 8, **kwargs: Any
) -> RouterConfig:
  return RouterConfig(
    num_experts=num_experts, top_k=top_k, **FAMILIES[name], **kwargs
  )


def logits(kind: str, t: int, e: int, seed: int = 0) -> np.ndarray:
  """[T, E] float32 logits: "random", "ties", "constant", "masked" or "nan"."""
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(t, e)).astype(np.float32) * 2
  if kind == "ties":
    x = np.round(x)
  elif kind == "constant":
    x[:] = 0.5
  elif kind == "masked":
    x[rng.random((t, e)) < 0.6] = -np.inf
    x[::5] = -np.inf
  elif kind == "saturated":
    x *= 200
  elif kind == "nan":
    x[rng.random((t, e)) < 0.5] = np.nan
    x[::4] = np.nan
  elif kind != "random":
    raise ValueError(f"unknown kind of logits: {kind}")
  return x


def extreme_logits(e: int) -> np.ndarray:
  """[T, E] float32 logits of every size: scores that underflow, tails, 3e38."""
  rng = np.random.default_rng(0)
  rest = [0.0] * (e - 2)
  rows = [
    [-75.0, -76.0, *rest],
    [3e38, -3e38, *rest],
    np.linspace(-17.2, -16.8, e),
    np.linspace(-15.2, -14.8, e),
    *([x] * e for x in (0.0, -88.0, -1e18, 1e18, -3e38, 3e38)),
  ]
  for mean in (0, -10, -23, -46, -60, -80, -88, -100, -300, 88, 1e4, -1e4):
    rows += [mean + spread * rng.normal(size=e) for spread in (0.1, 3, 30)]
  rows += [size * rng.normal(size=e) for size in (1e6, 1e18, 1e37)]
  return np.array(rows, np.float32)
