# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What TensorBoard is given of a row."""

import struct

import board as board_lib
import pytest
import tensorboardX
from tensorboardX.proto import event_pb2

pytestmark = pytest.mark.any_jax

ROW = {
  "kind": "train",
  "step": 10,
  "loss": 2.5,
  "load": [[0, 4, 0, 4], [2, 2, 2, 2]],
  "expert_bias": [[0.5, -0.5, 0.25, -0.25], [0.0, 0.0, 0.0, 0.0]],
  "seconds": None,
}


def _written(row, folder):
  """Tag to the value of its event; each is of the row's step."""
  with tensorboardX.SummaryWriter(str(folder)) as board:
    board_lib.add_row(board, row)
  (path,) = folder.glob("events*")
  data, values = path.read_bytes(), {}
  while data:
    # Length and its checksum, the event and its checksum.
    (length,) = struct.unpack("<Q", data[:8])
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    data = data[16 + length :]
    for value in event.summary.value:
      assert event.step == row["step"] and value.tag not in values
      values[value.tag] = value
  return values


def test_every_layer_has_a_max_vio_and_histograms(tmp_path):
  values = _written(ROW, tmp_path)
  scalars = {t: v.simple_value for t, v in values.items() if not v.histo.num}
  assert scalars == {
    "train/loss": 2.5,
    "train_max_vio/layer_1": 1.0,
    "train_max_vio/layer_2": 0.0,
  }
  histograms = {t: v.histo for t, v in values.items() if v.histo.num}
  assert set(histograms) == {
    f"{name}/layer_{i}"
    for name in ("train_load_over_mean", "expert_bias")
    for i in (1, 2)
  }
  load = histograms["train_load_over_mean/layer_1"]
  assert (load.num, load.min, load.max, load.sum) == (4, 0, 2, 4)
  bias = histograms["expert_bias/layer_1"]
  assert (bias.num, bias.min, bias.max) == (4, -0.5, 0.5)


def test_a_step_between_has_scalars_only(tmp_path):
  values = _written(ROW | {"step": 11}, tmp_path)
  assert "train_max_vio/layer_2" in values
  assert not any(v.histo.num for v in values.values())


def test_a_validation_has_its_own_tags_and_may_have_counted_nothing(tmp_path):
  row = {"kind": "validation", "step": 3, "load": [[0, 0]], "gap": 0.5}
  values = _written(row, tmp_path)
  assert set(values) == {
    "validation/gap",
    "validation_max_vio/layer_1",
    "validation_load_over_mean/layer_1",
  }
  assert values["validation_max_vio/layer_1"].simple_value == 0
