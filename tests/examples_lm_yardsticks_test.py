# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What the numbers of a run are held against: right, and of what was run."""

import types
import zlib

import config as config_lib
import numpy as np
import pytest
import yardsticks as yardsticks_lib

pytestmark = pytest.mark.any_jax


def test_unigram_bits_are_those_of_the_counts_and_one():
  train = np.frombuffer(b"aaab", np.uint8)
  held_out = np.frombuffer(b"ab?", np.uint8)
  p = np.array([3 + 1, 1 + 1, 0 + 1]) / (4 + 256)
  assert yardsticks_lib.unigram_bits(train, held_out) == pytest.approx(
    -np.log2(p).mean()
  )


@pytest.mark.parametrize("e, k, tokens", [(16, 2, 2048), (8, 3, 500)])
def test_random_max_vio_is_that_of_routes_at_random(e, k, tokens):
  config = config_lib.Config(num_experts=e, top_k=k, num_layers=3)
  found = yardsticks_lib.random_max_vio(config, tokens, 2000)
  assert found.shape == (2000,)
  rng = np.random.default_rng(1)
  violations = []
  for _ in range(400):
    chosen = rng.random((tokens, e)).argpartition(k, axis=1)[:, :k]
    load = np.bincount(chosen.ravel(), minlength=e)
    violations.append(load.max() / load.mean() - 1)
  assert found.mean() == pytest.approx(np.mean(violations), rel=0.05)
  # That of a run is the mean over its two layers.
  spread = np.std(violations) / np.sqrt(2)
  assert found.std() == pytest.approx(spread, rel=0.15)


def test_one_expert_is_always_balanced():
  config = config_lib.Config(num_experts=1, top_k=1)
  assert (yardsticks_lib.random_max_vio(config, 10, 3) == 0).all()


def test_a_run_has_a_yardstick_for_what_it_reports():
  config = config_lib.Config(
    batch_size=4, seq_len=8, num_layers=3, mesh="data=1"
  )
  text = np.frombuffer(b"to be or not to be" * 9, np.uint8)
  corpus = types.SimpleNamespace(train=text, validation=text[:40])
  load = np.full((2, 16), 4)
  rows = [{"kind": "train"}] * 8
  rows.append(
    {"kind": "validation", "load": load.tolist(), "gap_without_bias": 0.25}
  )
  found = yardsticks_lib.yardsticks(config, corpus, rows, 1000)
  assert found["gap"] == 0.25
  assert found["gzip"] == 8 * len(zlib.compress(bytes(text[:40]), 9)) / 40
  assert found["validation_bits_per_byte"] == yardsticks_lib.unigram_bits(
    corpus.train, corpus.validation
  )
  # Of T = 32 tokens each, 2 of 16 experts: in a validation, 2 x 16 experts.
  assert found["dead_experts"] == pytest.approx(2 * 16 * (14 / 16) ** 32)
  assert found["max_vio_batch_worst"] >= found["max_vio_batch_mean"] > 0
  assert found["step_seconds"] > 0
  assert found["tokens_per_second"] == 32 / found["step_seconds"]
