# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What the numbers of a run are to be compared with: computed, not typed in."""

import math
import time
import zlib
from typing import Any

import data as data_lib
import jax
import jax.numpy as jnp
import numpy as np
import report as report_lib
from config import Config


def yardsticks(
  config: Config,
  corpus: data_lib.Corpus,
  rows: list[dict[str, Any]],
  active_parameters: int,
) -> dict[str, float]:
  """A number for each of the summary's that has something to be held against.

  Args:
    config: the settings.
    corpus: what was trained on, and held out.
    rows: of metrics.jsonl.
    active_parameters: those that a token meets.

  Returns:
    Numbers by the keys of the summary, and "gzip", in bits per byte.
  """
  train = [r for r in rows if r["kind"] == "train"]
  last = [r for r in rows if r["kind"] == "validation"][-1]
  tokens = config.batch_size * config.seq_len
  held_out = int(np.sum(last["load"][0])) // config.top_k
  late = len(report_lib.last_quarter(train))
  at_random = random_max_vio(config, tokens, late)
  missed = (1 - config.top_k / config.num_experts) ** held_out
  devices = math.prod(config.mesh_shape)
  flops = 6 * active_parameters * tokens
  seconds = flops / (devices * _flops_per_second())
  return {
    "validation_bits_per_byte": unigram_bits(corpus.train, corpus.validation),
    "gzip": 8
    * len(zlib.compress(corpus.validation.tobytes(), 9))
    / len(corpus.validation),
    "max_vio_global": float(random_max_vio(config, held_out, 100).mean()),
    "max_vio_batch_mean": float(at_random.mean()),
    "max_vio_batch_worst": float(at_random.max()),
    "gap": last["gap_without_bias"],
    "dead_experts": (config.num_layers - 1) * config.num_experts * missed,
    "step_seconds": seconds,
    "tokens_per_second": tokens / seconds,
  }


def unigram_bits(train: np.ndarray, held_out: np.ndarray) -> float:
  """Bits per byte of a text, by how often each byte is in another.

  Args:
    train: `[bytes]` uint8. One is added to each of its 256 counts.
    held_out: `[bytes]` uint8.
  """
  counts = np.bincount(train, minlength=256) + 1
  bits = -np.log2(counts / counts.sum())
  return float(bits[held_out].mean())


def random_max_vio(config: Config, tokens: int, count: int) -> np.ndarray:
  """MaxVio of batches in which every token has K of the E experts at random.

  Loads are drawn as the normal distribution with the right covariance: of
  variance `T p (1 - p)`, p = K / E, and the same sum in every batch.

  Args:
    config: K, E and the number of layers.
    tokens: T.
    count: batches.

  Returns:
    `[count]` float64, each the mean over the layers; the same in every call.
  """
  e, share = config.num_experts, config.top_k / config.num_experts
  rng = np.random.default_rng(0)
  noise = rng.standard_normal((count, config.num_layers - 1, e))
  noise -= noise.mean(axis=-1, keepdims=True)
  variance = tokens * share * (1 - share) * e / max(1, e - 1)
  excess = np.sqrt(variance) * noise.max(axis=-1)
  return (excess / (tokens * share)).mean(axis=-1)


def _flops_per_second() -> float:
  """Of one device, in a large product of the parameters' dtype, float32."""
  size = 1024 if jax.default_backend() == "cpu" else 8192
  x = jnp.ones((size, size), jnp.float32)
  product = jax.jit(jnp.matmul)
  product(x, x).block_until_ready()
  times = []
  for _ in range(5):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    times.append(time.perf_counter() - start)
  return 2 * size**3 / min(times)
