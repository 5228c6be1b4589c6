# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a run reports: rows of metrics, a table, a progress bar.

A row is a training step or a validation. All its fields but "seconds" are
functions of the settings, whether the run was resumed or not.
"""

import contextlib
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import strict_json
import tqdm
from config import Config
from etils import epath

from jaxroute import assignment, dual, metrics

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


def gaps(
  scores: np.ndarray, expert_bias: np.ndarray, top_k: int
) -> dict[str, float]:
  """How far dual values are above the least, relative to it.

  Args:
    scores: `[Lyr, T, E]`, of a batch.
    expert_bias: `[Lyr, E]`, the biases that the batch is routed by.
    top_k: K.

  Returns:
    Means over layers, at least 0: "gap" of the biases, which is 0 if no other
    biases have a lower dual value, and "gap_without_bias" of zeros.
  """
  found = []
  for layer, bias in zip(scores, expert_bias, strict=True):
    best = dual.solve(layer, top_k, expert_bias=bias)
    zeros = assignment.dual_value(layer, jnp.zeros_like(bias), top_k)
    # The first iteration is at the bias itself.
    values = np.array([best.dual_values[0], zeros])
    found.append(values / float(best.dual_value) - 1)
  gap, without = np.maximum(np.mean(found, axis=0), 0)
  return {"gap": float(gap), "gap_without_bias": float(without)}


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
  late = [r["max_vio"] for r in last_quarter(train)]
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


def read_rows(out: str) -> list[dict[str, Any]]:
  """The rows of metrics.jsonl of a run.

  Args:
    out: the folder of the run, which nothing writes to.
  """
  lines = (epath.Path(out) / "metrics.jsonl").read_text().splitlines()
  return [parse_row(line) for line in lines]


def last_quarter(rows: Any) -> Any:
  """The last quarter of a list or an array, one at least."""
  return rows[-max(1, len(rows) // 4) :]


# Label, key of the summary and of the yardsticks, format, what the yardstick is.
_LINES: tuple[tuple[str, str, Callable[[float], str], str], ...] = (
  ("training steps", "steps", "{}".format, ""),
  (
    "validation bits per byte",
    "validation_bits_per_byte",
    "{:.3f}".format,
    "byte frequencies of the training text",
  ),
  ("", "gzip", "{:.3f}".format, "gzip -9 of the held-out text"),
  (
    "MaxVio_global, validation",
    "max_vio_global",
    "{:.3f}".format,
    "as many tokens, routed at random",
  ),
  (
    "MaxVio_batch, last quarter, mean",
    "max_vio_batch_mean",
    "{:.3f}".format,
    "batches routed at random",
  ),
  (
    "MaxVio_batch, last quarter, worst",
    "max_vio_batch_worst",
    "{:.3f}".format,
    "the worst of as many such batches",
  ),
  (
    "gap to the best balanced routes",
    "gap",
    "{:.2%}".format,
    "the same scores without a bias",
  ),
  (
    "dead experts, validation",
    "dead_experts",
    "{:.0f}".format,
    "as many tokens, routed at random",
  ),
  ("skipped steps", "skipped_steps", "{}".format, ""),
  (
    "step time, median",
    "step_seconds",
    lambda x: f"{x * 1e3:.0f} ms",
    "the model's products as one large product",
  ),
  (
    "training speed, tokens/s",
    "tokens_per_second",
    "{:,.0f}".format,
    "the same",
  ),
)


def table(summaries: Mapping[str, dict[str, Any]]) -> str:
  """Summaries for people: a column for each, and what to compare them with.

  Args:
    summaries: the heading of a column to a summary with "yardsticks", which are
      those of the first.

  Returns:
    Lines; the yardsticks are explained at their ends.
  """
  yardsticks = next(iter(summaries.values()))["yardsticks"]
  columns = [*summaries.items(), ("yardstick", yardsticks)]
  width = max(12, *(len(name) + 2 for name in summaries))
  lines = [("", [name for name, _ in columns], "")]
  for label, key, form, explanation in _LINES:
    cells = [
      form(values[key]) if key in values else "" for _, values in columns
    ]
    lines.append((label, cells, explanation))
  if len(summaries) > 1:
    lines.append(("The yardsticks are those of the first run.", [], ""))
  texts = [
    f"  {label:33s}{''.join(c.rjust(width) for c in cells)}  {explanation}"
    for label, cells, explanation in lines
  ]
  return "\n".join(text.rstrip() for text in texts)


class Progress:
  """A bar on a terminal; elsewhere a line for every tenth of the steps.

  Both say what is done when it is not training.
  """

  def __init__(self, config: Config, last_step: int):
    self._steps = config.steps
    self._tokens = config.batch_size * config.seq_len
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm.tqdm(total=self._steps, initial=last_step, unit="step")
    if last_step < self._steps:
      self._say(last_step + 1, "compiling")

  def show(self, row: dict[str, Any]) -> None:
    """Shows a training row."""
    speed = self._tokens / row["seconds"] if row["seconds"] else 0
    text = (
      f"{row['bits_per_byte']:.3f} bits/byte, MaxVio {row['max_vio']:.2f},"
      f" {speed:,.0f} tokens/s"
    )
    if self._bar is not None:
      self._bar.set_description_str("training", refresh=False)
      self._bar.set_postfix_str(text, refresh=False)
      self._bar.update()
    elif row["step"] % max(1, self._steps // 10) == 0:
      self._say(row["step"], text)

  @contextlib.contextmanager
  def doing(self, step: int, text: str) -> Iterator[None]:
    """Says what is done after a step, for as long as it takes."""
    self._say(step, text)
    yield
    if self._bar is not None:
      self._bar.set_description_str("training")

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()

  def _say(self, step: int, text: str) -> None:
    if self._bar is not None:
      self._bar.set_description_str(text)
    else:
      print(f"step {step}/{self._steps}: {text}", flush=True)
