# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Figures of balance over training, from plain arrays.

Not imported by `jaxroute`: matplotlib comes with `pip install '.[plot]'`. No display is
needed; write a figure with `figure.savefig("loads.png")`.
"""

from collections.abc import Mapping

import numpy as np

from jaxroute import checks

try:
  from matplotlib import axes, colormaps, colors, figure
except ImportError as error:
  raise ImportError(
    "jaxroute.plot needs matplotlib. Install it: pip install 'jaxroute[plot]'"
  ) from error


def load_heatmap(steps: np.ndarray, load: np.ndarray) -> figure.Figure:
  """The load of every expert over training, a panel for every layer.

  Args:
    steps: `[S]` integers, ascending. Training steps.
    load: `[S, Lyr, E]` integers. Assignments per expert in each of them.

  Returns:
    A figure of `load / mean`, white at balance, red above and blue below; the
    scale ends at 3 times the mean.

  Raises:
    ValueError: if the shapes do not fit.

  Example:
    >>> load_heatmap(np.arange(2), np.ones((2, 1, 4), int)).axes[0].get_title()
    'MoE layer 1'
  """
  _check("load", steps, load)
  relative = load / np.maximum(load.mean(axis=-1, keepdims=True), 1e-9)
  layers = load.shape[1]
  fig = figure.Figure(figsize=(9, 1 + 1.7 * layers), layout="constrained")
  panels = fig.subplots(layers, sharex=True, squeeze=False)[:, 0]
  norm = colors.TwoSlopeNorm(vcenter=1, vmin=0, vmax=3)
  for i, panel in enumerate(panels):
    image = panel.pcolormesh(
      _edges(steps),
      np.arange(load.shape[2] + 1) - 0.5,
      relative[:, i].T,
      cmap="RdBu_r",
      norm=norm,
      rasterized=True,
    )
    panel.set(title=f"MoE layer {i + 1}", ylabel="expert")
  panels[-1].set_xlabel("training step")
  bar = fig.colorbar(image, ax=list(panels), extend="max", shrink=0.9)
  bar.set_label("load / mean load")
  bar.set_ticks([0, 0.5, 1, 2, 3])
  return fig


def max_vio_curves(steps: np.ndarray, load: np.ndarray) -> figure.Figure:
  """MaxVio of every training batch, a line for every layer.

  Args:
    steps: `[S]` integers, ascending. Training steps.
    load: `[S, Lyr, E]` integers. Assignments per expert in each of them.

  Returns:
    A figure with a logarithmic axis, that ends at 0.001: balance is drawn
    there. Strong lines are means over a fortieth of the steps, faint ones every
    batch.

  Raises:
    ValueError: if the shapes do not fit.
  """
  _check("load", steps, load)
  mean = np.maximum(load.mean(axis=-1), 1e-9)
  max_vio = np.maximum(load.max(axis=-1) / mean - 1, 1e-3)
  series = {
    f"MoE layer {i + 1}": (steps, max_vio[:, i]) for i in range(load.shape[1])
  }
  return curves(
    series,
    xlabel="training step",
    ylabel="MaxVio of the batch: max load / mean load - 1",
    log_scale=True,
    window=max(1, len(steps) // 40),
  )


def bias_curves(steps: np.ndarray, expert_bias: np.ndarray) -> figure.Figure:
  """The biases over training, a panel for every layer, a line for every expert.

  Args:
    steps: `[S]` integers, ascending. Training steps.
    expert_bias: `[S, Lyr, E]` floats. The biases after each of them. Their mean
      is left out: selection does not see it.

  Returns:
    A figure.

  Raises:
    ValueError: if the shapes do not fit.
  """
  _check("expert_bias", steps, expert_bias)
  centered = expert_bias - expert_bias.mean(axis=-1, keepdims=True)
  _, layers, num_experts = centered.shape
  fig = figure.Figure(figsize=(3.2 * layers + 1, 3.6), layout="constrained")
  panels = fig.subplots(1, layers, sharey=True, squeeze=False)[0]
  for i, panel in enumerate(panels):
    panel.set_prop_cycle(color=_colors(num_experts))
    panel.plot(steps, centered[:, i], linewidth=0.9)
    panel.axhline(0, color="black", linewidth=0.5, linestyle=":")
    panel.set(title=f"MoE layer {i + 1}", xlabel="training step")
  panels[0].set_ylabel(f"bias - mean bias, {num_experts} experts")
  return fig


def curves(
  series: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  xlabel: str,
  ylabel: str,
  log_scale: bool = False,
  window: int = 1,
) -> figure.Figure:
  """Lines over training, with a legend.

  Args:
    series: label to the `[S]` steps and the `[S]` values of a line. Up to 20
      points are marked.
    xlabel: what the steps are, with the unit.
    ylabel: what the values are, with the unit.
    log_scale: whether the axis of the values is logarithmic.
    window: steps to average over, centred; what is averaged is drawn faintly.
      A line of fewer steps is not averaged.

  Returns:
    A figure.

  Raises:
    ValueError: if steps and values differ in length, or an argument is of
      the wrong type.
  """
  lines = _vectors("series", series)
  _check_labels(xlabel, ylabel)
  log_scale = checks.as_bool("log_scale", log_scale, "False is linear.")
  window = checks.as_int("window", window, "1 averages nothing.")
  fig = figure.Figure(figsize=(8, 4.2), layout="constrained")
  panel = fig.subplots()
  for (label, (x, y)), color in zip(
    lines.items(), _palette(len(lines)), strict=True
  ):
    marker = "o" if len(x) <= 20 else None
    if 1 < window <= len(x):
      panel.plot(x, y, color=color, linewidth=0.6, alpha=0.3)
      # Whole windows only: the ends would be means of fewer.
      y = np.convolve(y, np.full(window, 1 / window), mode="valid")
      x = x[(window - 1) // 2 :][: len(y)]
    panel.plot(x, y, label=label, color=color, marker=marker, linewidth=1.4)
  _finish(panel, xlabel, ylabel, log_scale)
  return fig


def trade_off(
  points: Mapping[str, tuple[np.ndarray, np.ndarray]],
  *,
  xlabel: str,
  ylabel: str,
) -> figure.Figure:
  """Loss against imbalance, a colour for every method.

  Args:
    points: label to the imbalances and the losses of a method's N runs, two
      `[N]`. Small marks are runs, the large one is their mean.
    xlabel: what the imbalances are; on a logarithmic axis, if all are above 0.
    ylabel: what the losses are, with the unit.

  Returns:
    A figure.

  Raises:
    ValueError: if imbalances and losses differ in length, or there is none, or
      an argument is of the wrong type.
  """
  methods = _vectors("points", points, at_least=1)
  _check_labels(xlabel, ylabel)
  fig = figure.Figure(figsize=(8, 4.8), layout="constrained")
  panel = fig.subplots()
  for i, ((label, (x, y)), color) in enumerate(
    zip(methods.items(), _palette(len(methods)), strict=True)
  ):
    marker = "osD^vP*X<>"[i % 10]
    panel.plot(x, y, marker, color=color, markersize=4, alpha=0.5)
    panel.plot(
      np.mean(x), np.mean(y), marker, color=color, markersize=9, label=label
    )
  if all(np.all(x > 0) for x, _ in methods.values()):
    panel.set_xscale("log", subs=[2, 5])
  panel.xaxis.set_major_formatter("{x:g}")
  panel.xaxis.set_minor_formatter("{x:g}")
  panel.set(xlabel=xlabel, ylabel=ylabel)
  panel.grid(alpha=0.3, which="both")
  _legend(panel, len(points))
  return fig


def _legend(panel: axes.Axes, count: int) -> None:
  """Beside the panel if it is long."""
  if count > 5:
    panel.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
  else:
    panel.legend(frameon=False)


def _finish(panel: axes.Axes, xlabel: str, ylabel: str, log_scale: bool):
  if log_scale:
    panel.set_yscale("log", subs=[2, 5])
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
  panel.set(xlabel=xlabel, ylabel=ylabel)
  panel.grid(alpha=0.3, which="both")
  _legend(panel, len(panel.get_legend_handles_labels()[1]))


def _check(name: str, steps: np.ndarray, values: np.ndarray) -> None:
  fix = "Pass an array with one row for each of `steps`."
  checks.check_array("steps", steps, "[S]", "real", fix)
  s = steps.shape[0]
  checks.check_array(name, values, "[S, Lyr, E]", "real", fix, S=s)


def _check_labels(xlabel: str, ylabel: str) -> None:
  for name, label in (("xlabel", xlabel), ("ylabel", ylabel)):
    checks.check_instance(name, label, str, "Name what the axis shows.")


def _vectors(
  name: str,
  pairs: Mapping[str, tuple[np.ndarray, np.ndarray]],
  at_least: int = 0,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
  """The pairs of vectors under every label, checked."""
  checks.check_instance(name, pairs, Mapping, "Map labels to pairs of vectors.")
  found = {}
  for label, pair in pairs.items():
    try:
      x, y = (np.asarray(v, np.float64) for v in pair)
    except (TypeError, ValueError):
      raise ValueError(
        f"`{name}`[{label!r}] must be two vectors of numbers, got"
        f" {checks.describe(pair)}. Pass a tuple of two arrays."
      ) from None
    if x.shape != y.shape or x.ndim != 1 or len(x) < at_least:
      raise ValueError(
        f"`{name}`[{label!r}] must be two vectors of one length, got"
        f" {x.shape} and {y.shape}. Pass a point of one for each of the other."
      )
    found[label] = x, y
  return found


def _edges(steps: np.ndarray) -> np.ndarray:
  """`[S + 1]` cell borders: half-way between steps."""
  steps = np.asarray(steps, np.float64)  # sums of small ints would wrap
  if len(steps) == 1:
    return np.array([steps[0] - 0.5, steps[0] + 0.5])
  middle = (steps[:-1] + steps[1:]) / 2
  first, last = 2 * steps[0] - middle[0], 2 * steps[-1] - middle[-1]
  return np.concatenate([[first], middle, [last]])


def _palette(count: int) -> np.ndarray:
  """Colours that are told apart; `_colors` are in an order."""
  return colormaps["tab10"](np.arange(count) % 10)


def _colors(count: int) -> np.ndarray:
  return colormaps["viridis"](np.linspace(0, 0.85, max(count, 2)))[:count]
