# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a run says first: its size, its devices, how far it goes."""

import dataclasses

import config as config_lib
import header as header_lib
import jax
import model as model_lib
import pytest

pytestmark = [pytest.mark.any_jax, pytest.mark.implicit_promotion]

CONFIG = config_lib.Config(
  batch_size=16, model_size=32, num_heads=2, out="runs/a b", mesh="data=1"
)


def _header(config, *, last_step=0, device_count=8):
  model = model_lib.Transformer(config)
  tokens = jax.ShapeDtypeStruct((1, config.seq_len), "int32")
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)
  text = header_lib.header(
    config, shapes["params"], "a corpus", last_step, device_count
  )
  return dict(line.split(maxsplit=1) for line in text.splitlines())


def test_it_says_what_is_trained_and_where_it_is_found():
  lines = _header(CONFIG)
  d, f, e, k, layers = 32, 64, 16, 2, 3
  # Embedding; attention and two norms of 4 layers, the last norm; the dense
  # layer; routers and shared experts.
  others = 256 * d + 4 * (4 * d * d + 2 * d) + d
  others += 3 * d * (k * f + 64) + layers * (d * e + 3 * d * 64)
  expert = 3 * d * f
  assert lines["model"].split(" parameters, ") == [
    f"{others + layers * e * expert:,}",
    f"{others + layers * k * expert:,} of them active for a token",
  ]
  assert lines["corpus"] == "a corpus"
  assert lines["experts"] == (
    "16 in each of 3 MoE layers, top-2, and a shared one"
  )
  assert lines["rule"] == "proportional, rate 0.008"
  assert lines["output"] == "runs/a b"
  assert lines["watch"].endswith("tensorboard --logdir='runs/a b'")


@pytest.mark.parametrize(
  "change, count, text",
  [
    ({}, 1, "uses 1 of 1, cpu"),
    ({"mesh": ""}, 8, "uses 8 of 8, cpu, as --mesh=data=8"),
    (
      {"mesh": "", "fsdp": True},
      8,
      "uses 8 of 8, cpu, as --mesh=data=8 --fsdp",
    ),
    (
      {"mesh": "data=2,expert=2"},
      8,
      "uses 4 of 8, cpu, as --mesh=data=2,expert=2; without --mesh all are used",
    ),
  ],
)
def test_it_says_which_devices_are_used(change, count, text):
  config = dataclasses.replace(CONFIG, **change).on_devices(count)
  assert _header(config, device_count=count)["devices"] == text


def test_it_says_how_far_the_run_goes():
  assert _header(CONFIG)["steps"] == "1 to 600, each of 2,048 bytes"
  resumed = _header(CONFIG, last_step=150)["steps"]
  assert resumed == "151 to 600, each of 2,048 bytes"
  done = _header(CONFIG, last_step=600)["steps"]
  assert done == "600, all done before"
  extended = dataclasses.replace(CONFIG, steps=700, decay_steps=600)
  assert _header(extended, last_step=600)["steps"] == (
    "601 to 700, each of 2,048 bytes; the learning rate falls to 0.0003 over"
    " the first 600 and stays there (--decay_steps)"
  )
