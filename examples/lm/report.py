# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a run reports: rows of metrics, a table, figures, a progress bar.

A row is a training step or a validation. All its fields but "seconds" are
functions of the settings, whether the run was resumed or not.
"""

import math
import pathlib
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import strict_json
import tqdm
from config import Config

from jaxroute import assignment, dual, metrics, plot

_ARRAYS = ("load", "expert_bias")


def train_row(
  step: int, report: dict[str, Any], seconds: float | None
) -> dict[str, Any]:
  """A training step as a row: scalars, and `[Lyr, E]` loads and biases."""
  row: dict[str, Any] = {"kind": "train", "step": step}
  row |= {
    k: np.asarray(v).item() for k, v in report.items() if k not in _ARRAYS
  }
  row |= {k: per_layer(report[k]).tolist() for k in _ARRAYS}
  return row | {"seconds": seconds}


def parse_row(line: str | bytes) -> dict[str, Any]:
  """A line of metrics.jsonl as the row that it was written from.

  Only an infinite number comes back as another, NaN.
  """
  row = strict_json.loads(line)
  if math.isnan(row.get("seconds", 0)):
    row["seconds"] = None
  return row


def validation_row(step: int, reports: list[dict[str, Any]]) -> dict[str, Any]:
  """Batches of a validation as one row, their loads summed."""
  load = np.sum([per_layer(r["load"]) for r in reports], axis=0, dtype=np.int32)
  violations = np.asarray(metrics.max_vio(jnp.asarray(load)))
  return {
    "kind": "validation",
    "step": step,
    "bits_per_byte": float(np.mean([r["bits_per_byte"] for r in reports])),
    "max_vio_global": float(np.mean(violations)),
    "dead_experts": int(np.sum(load == 0)),
    "load": load.tolist(),
  }


def per_layer(collection: Any) -> np.ndarray:
  """The `[Lyr, E]` array of a collection with one scanned router."""
  while isinstance(collection, dict):
    (collection,) = collection.values()
  return np.asarray(collection)


def complementary_slackness(expert_bias: Any, load: Any) -> jax.Array:
  """`[]` float32: `|b . (load - L)|` per assignment, the mean over layers.

  It is 0 if every expert gets L assignments, as at an optimum. It needs no
  scores, so every step can log it.
  """
  residuals = [
    jnp.abs(assignment.complementary_slackness(b, x)) / metrics.total(x)
    for b, x in zip(
      jax.tree.leaves(expert_bias), jax.tree.leaves(load), strict=True
    )
  ]
  return jnp.mean(jnp.stack(residuals))


def gap(scores: np.ndarray, expert_bias: np.ndarray, top_k: int) -> float:
  """How far the dual value of the biases is above the least, relative to it.

  Args:
    scores: `[Lyr, T, E]`, of a batch.
    expert_bias: `[Lyr, E]`, the biases that the batch is routed by.
    top_k: K.

  Returns:
    The mean over layers, at least 0; it is 0 if no other biases have a lower
    dual value.
  """
  gaps = []
  for layer, bias in zip(scores, expert_bias, strict=True):
    best = dual.solve(layer, top_k, expert_bias=bias)
    # The first iteration is at the bias itself.
    gaps.append(float(best.dual_values[0] / best.dual_value) - 1)
  return float(np.mean(gaps))


def summarize(rows: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
  """The numbers of the table at the end.

  Args:
    rows: of metrics.jsonl.
    tokens: per step.

  Returns:
    A dict of numbers, to be written as JSON; times are of this machine.
  """
  train = [r for r in rows if r["kind"] == "train"]
  last = [r for r in rows if r["kind"] == "validation"][-1]
  late = [r["max_vio"] for r in train[-max(1, len(train) // 4) :]]
  times = [r["seconds"] for r in train if r["seconds"]]
  seconds = statistics.median(times) if times else float("nan")
  return {
    "steps": train[-1]["step"],
    "validation_bits_per_byte": last["bits_per_byte"],
    "max_vio_global": last["max_vio_global"],
    "gap": last["gap"],
    "max_vio_batch_mean": statistics.fmean(late),
    "max_vio_batch_worst": max(late),
    "dead_experts": last["dead_experts"],
    "skipped_steps": sum(r["skipped"] for r in train),
    "step_seconds": seconds,
    "tokens_per_second": tokens / seconds,
  }


def table(summary: dict[str, Any]) -> str:
  """The summary, for people."""
  s = summary
  lines = (
    ("validation bits per byte", f"{s['validation_bits_per_byte']:.3f}"),
    ("MaxVio_global, validation", f"{s['max_vio_global']:.3f}"),
    ("MaxVio_batch, last quarter, mean", f"{s['max_vio_batch_mean']:.3f}"),
    ("MaxVio_batch, last quarter, worst", f"{s['max_vio_batch_worst']:.3f}"),
    ("gap to the best balanced routes", f"{100 * s['gap']:.2f} %"),
    ("dead experts, validation", f"{s['dead_experts']}"),
    ("skipped steps", f"{s['skipped_steps']} of {s['steps']}"),
    ("step time, median", f"{s['step_seconds'] * 1e3:.0f} ms"),
    ("training speed", f"{s['tokens_per_second']:,.0f} tokens/s"),
  )
  return "\n".join(f"  {name:36s}{value:>16s}" for name, value in lines)


def write_figures(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
  """Writes loads.png, max_vio.png, bias.png and loss.png."""
  train = [r for r in rows if r["kind"] == "train"]
  validation = [r for r in rows if r["kind"] == "validation"]
  steps, load, bias, loss = (
    np.array([r[k] for r in train])
    for k in ("step", "load", "expert_bias", "bits_per_byte")
  )
  held_out = (
    np.array([r["step"] for r in validation]),
    np.array([r["bits_per_byte"] for r in validation]),
  )
  figures = {
    "loads": plot.load_heatmap(steps, load),
    "max_vio": plot.max_vio_curves(steps, load),
    "bias": plot.bias_curves(steps, bias),
    "loss": plot.curves(
      {"training batch": (steps, loss), "validation": held_out},
      xlabel="training step",
      ylabel="bits per byte",
    ),
  }
  for name, figure in figures.items():
    figure.savefig(out / f"{name}.png", dpi=110)


class Progress:
  """A bar on a terminal; elsewhere a line for every tenth of the steps."""

  def __init__(self, config: Config, last_step: int):
    self._steps = config.steps
    self._tokens = config.batch_size * config.seq_len
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=self._steps, initial=last_step, unit="step")

  def show(self, row: dict[str, Any]) -> None:
    """Shows a training row."""
    speed = self._tokens / row["seconds"] if row["seconds"] else 0
    text = (
      f"{row['bits_per_byte']:.3f} bits/byte, MaxVio {row['max_vio']:.2f},"
      f" {speed:,.0f} tokens/s"
    )
    if self._bar is not None:
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update()
    elif row["step"] % max(1, self._steps // 10) == 0:
      print(f"step {row['step']}/{self._steps}: {text}", flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
