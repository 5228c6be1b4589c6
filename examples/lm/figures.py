# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The figures of a run, and of several runs side by side."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import report as report_lib
from matplotlib import axes, colors, figure

from jaxroute import plot

_DPI = 150


def write_figures(rows: list[dict[str, Any]], out: pathlib.Path) -> None:
  """Writes loads.png, max_vio.png, bias.png and loss.png.

  Args:
    rows: of metrics.jsonl.
    out: the folder of the run.
  """
  steps, load, bias, loss = (
    _column(rows, "train", k)
    for k in ("step", "load", "expert_bias", "bits_per_byte")
  )
  held_out = (
    _column(rows, "validation", "step"),
    _column(rows, "validation", "bits_per_byte"),
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
  for name, fig in figures.items():
    fig.savefig(out / f"{name}.png", dpi=_DPI)


def write_comparison(
  runs: Mapping[str, list[dict[str, Any]]],
  random_max_vio: float,
  out: pathlib.Path,
) -> None:
  """Writes compared.png and compared_loads.png.

  Args:
    runs: rule to the rows of its run.
    random_max_vio: MaxVio of batches that are routed at random.
    out: the folder of all runs.
  """
  figures = {
    "compared": _curves(runs, random_max_vio),
    "compared_loads": _loads(runs),
  }
  for name, fig in figures.items():
    fig.savefig(out / f"{name}.png", dpi=_DPI)


def _curves(
  runs: Mapping[str, list[dict[str, Any]]], random_max_vio: float
) -> figure.Figure:
  """MaxVio above, the loss below, over the same steps."""
  fig = figure.Figure(figsize=(10, 7), layout="constrained")
  balance, loss = fig.subplots(2, sharex=True)
  for i, (rule, rows) in enumerate(runs.items()):
    # What is drawn first is wider, so that it shows behind what covers it.
    style: dict[str, Any] = {
      "color": f"C{i}",
      "linewidth": 1.4 + 2.0 * (len(runs) - 1 - i),
    }
    steps = _column(rows, "train", "step")
    for panel, name in ((balance, "max_vio"), (loss, "bits_per_byte")):
      _line(panel, rule, steps, _column(rows, "train", name), style)
    loss.plot(
      _column(rows, "validation", "step"),
      _column(rows, "validation", "bits_per_byte"),
      "o",
      markersize=4 + style["linewidth"],
      color=style["color"],
      label=f"{rule}, validation",
    )
  balance.axhline(
    random_max_vio, color="black", linestyle=":", label="routed at random"
  )
  balance.set_yscale("log", subs=[2, 5])
  balance.yaxis.set_major_formatter("{x:g}")
  balance.yaxis.set_minor_formatter("{x:g}")
  balance.set_ylabel("MaxVio of the batch, mean over layers")
  loss.set(ylabel="bits per byte", xlabel="training step")
  for panel in (balance, loss):
    panel.grid(alpha=0.3, which="both")
    # Lines may be anywhere in the panel.
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  return fig


def _line(
  panel: axes.Axes,
  label: str,
  x: np.ndarray,
  y: np.ndarray,
  style: dict[str, Any],
) -> None:
  """Every step faintly, means over a fortieth of the steps strongly."""
  window = max(1, len(x) // 40)
  if window > 1:
    panel.plot(x, y, color=style["color"], linewidth=0.6, alpha=0.3)
    y = np.convolve(y, np.full(window, 1 / window), mode="valid")
    x = x[(window - 1) // 2 :][: len(y)]
  panel.plot(x, y, label=label, **style)


def _loads(runs: Mapping[str, list[dict[str, Any]]]) -> figure.Figure:
  """A row of panels for every run, a panel for every layer, on one scale."""
  loads = {rule: _column(rows, "train", "load") for rule, rows in runs.items()}
  layers = next(iter(loads.values())).shape[1]
  size = (max(8, 2.6 * layers), 2.6 * len(runs) + 0.4)
  fig = figure.Figure(figsize=size, layout="constrained")
  parts = np.asarray(fig.subfigures(len(runs), 1, hspace=0.04)).ravel()
  norm = colors.TwoSlopeNorm(vcenter=1, vmin=0, vmax=3)
  for part, (rule, load) in zip(parts, loads.items(), strict=True):
    relative = load / load.mean(axis=-1, keepdims=True)
    late = np.mean(report_lib.last_quarter(relative.max(axis=-1)))
    part.suptitle(
      f"--rule={rule}: in the end the busiest expert gets {late:.1f} x the mean"
      " load",
      fontweight="bold",
    )
    panels = part.subplots(1, layers, sharey=True, squeeze=False)[0]
    for i, panel in enumerate(panels):
      image = panel.imshow(
        relative[:, i].T,
        cmap="RdBu_r",
        norm=norm,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, len(load) + 0.5, load.shape[2] - 0.5, -0.5),
      )
      panel.set_title(f"MoE layer {i + 1}", fontsize=10)
      panel.set_xlabel("training step")
    panels[0].set_ylabel("expert")
    bar = part.colorbar(image, ax=list(panels), extend="max", pad=0.01)
    bar.set_label("load / mean load\n(white: balanced)")
    bar.set_ticks([0, 1, 2, 3])
  return fig


def _column(rows: list[dict[str, Any]], kind: str, name: str) -> np.ndarray:
  """A field of all rows of a kind, float64; NaN where a row has none."""
  return np.array([r[name] for r in rows if r["kind"] == kind], np.float64)
