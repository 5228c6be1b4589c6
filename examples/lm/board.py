# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A row of metrics in TensorBoard: scalars, MaxVio by layer, histograms."""

from typing import Any

import numpy as np
import tensorboardX

# Histograms are large; these are enough to see the loads move.
_HISTOGRAM_EVERY = 10


def add_row(board: tensorboardX.SummaryWriter, row: dict[str, Any]) -> None:
  """Writes a row of a training step or of a validation.

  Args:
    board: the writer.
    row: its numbers become scalars. Of its `[Lyr, E]` load, if it has one, each
      layer's MaxVio is one too. The experts of a layer make a histogram of
      loads, relative to their mean, and of biases: of a validation and of every
      tenth step.
  """
  kind, step = row["kind"], row["step"]
  for name, value in row.items():
    if isinstance(value, (int, float)) and name != "step":
      board.add_scalar(f"{kind}/{name}", value, step)
  if "load" not in row:
    return
  load = np.asarray(row["load"])
  mean = load.mean(axis=-1, keepdims=True)
  violation = (load - mean) / np.maximum(mean, 1e-9)
  values = {f"{kind}_load_over_mean": 1 + violation}
  if "expert_bias" in row:
    values["expert_bias"] = np.asarray(row["expert_bias"])
  for i, layer in enumerate(violation, start=1):
    board.add_scalar(f"{kind}_max_vio/layer_{i}", layer.max(), step)
  if kind == "train" and step % _HISTOGRAM_EVERY:
    return
  for name, layers in values.items():
    for i, layer in enumerate(layers, start=1):
      board.add_histogram(f"{name}/layer_{i}", layer, step)
