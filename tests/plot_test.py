# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The figures: what is drawn, on which axes, with which labels."""

import subprocess
import sys

import numpy as np
import pytest

from jaxroute import plot

pytestmark = pytest.mark.any_jax

S, LYR, E = 30, 3, 5
STEPS = np.arange(10, 10 + S)


def _load():
  return np.random.default_rng(0).integers(0, 50, (S, LYR, E))


def _is_legible(figure, tmp_path):
  """Draws it, which overlong labels or a bad scale would make warn."""
  path = tmp_path / "figure.png"
  figure.savefig(path)
  assert path.read_bytes().startswith(b"\x89PNG")
  for panel in figure.axes:
    for text in (panel.xaxis.label, panel.yaxis.label, panel.title):
      box = text.get_window_extent()
      if text.get_text():
        assert box.x0 >= 0 and box.y0 >= 0
        assert box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1


def test_load_heatmap_has_a_panel_for_every_layer(tmp_path):
  load = _load()
  figure = plot.load_heatmap(STEPS, load)
  _is_legible(figure, tmp_path)
  *panels, bar = figure.axes
  assert [p.get_title() for p in panels] == [
    "MoE layer 1",
    "MoE layer 2",
    "MoE layer 3",
  ]
  assert {p.get_ylabel() for p in panels} == {"expert"}
  assert panels[-1].get_xlabel() == "training step"
  assert bar.get_ylabel() == "load / mean load"
  for i, panel in enumerate(panels):
    (mesh,) = panel.collections
    expected = load[:, i] / load[:, i].mean(axis=1, keepdims=True)
    np.testing.assert_allclose(mesh.get_array(), expected.T)
  assert panels[0].get_xlim() == (9.5, 39.5)
  assert panels[0].get_ylim() == (-0.5, 4.5)


def test_load_heatmap_is_white_at_balance():
  figure = plot.load_heatmap(STEPS, np.full((S, 1, E), 7))
  (mesh,) = figure.axes[0].collections
  colors = mesh.cmap(mesh.norm(np.array([0.0, 1.0, 3.0])))
  np.testing.assert_allclose(colors[1, :3], 0.97, atol=0.01)
  assert colors[0, 2] > colors[0, 0] and colors[2, 0] > colors[2, 2]


def test_max_vio_has_a_line_for_every_layer(tmp_path):
  figure = plot.max_vio_curves(STEPS, _load())
  _is_legible(figure, tmp_path)
  (panel,) = figure.axes
  assert panel.get_yscale() == "log"
  assert "MaxVio" in panel.get_ylabel()
  labels = [t.get_text() for t in panel.get_legend().get_texts()]
  assert labels == ["MoE layer 1", "MoE layer 2", "MoE layer 3"]
  load = _load()[:, 1]
  np.testing.assert_allclose(
    panel.lines[1].get_ydata(), load.max(axis=1) / load.mean(axis=1) - 1
  )


def test_bias_has_a_line_for_every_expert_without_the_common_part(tmp_path):
  bias = np.random.default_rng(1).normal(size=(S, LYR, E)) + 9
  figure = plot.bias_curves(STEPS, bias)
  _is_legible(figure, tmp_path)
  assert len(figure.axes) == LYR
  for panel in figure.axes:
    experts = [line for line in panel.lines if len(line.get_xdata()) == S]
    assert len(experts) == E
    values = np.array([line.get_ydata() for line in experts])
    np.testing.assert_allclose(values.sum(axis=0), 0, atol=1e-12)
    assert len({line.get_color() for line in map(_hashable, experts)}) == E


def test_long_lines_are_averaged_and_drawn_faintly():
  x = np.arange(100)
  figure = plot.curves({"a": (x, x % 2)}, xlabel="x", ylabel="y", window=4)
  faint, strong = figure.axes[0].lines
  np.testing.assert_array_equal(faint.get_ydata(), x % 2)
  assert faint.get_alpha() < 0.5
  np.testing.assert_allclose(strong.get_ydata(), 0.5)
  np.testing.assert_array_equal(strong.get_xdata(), np.arange(1, 98))


def _hashable(line):
  line.set_color(tuple(line.get_color()))
  return line


def test_curves_mark_the_points_of_short_lines(tmp_path):
  series = {
    "train": (STEPS, np.linspace(3, 2, S)),
    "validation": (np.array([20, 39]), np.array([2.6, 2.1])),
  }
  figure = plot.curves(series, xlabel="step", ylabel="bits per byte")
  _is_legible(figure, tmp_path)
  (panel,) = figure.axes
  assert [line.get_marker() for line in panel.lines] == ["None", "o"]
  assert (panel.get_xlabel(), panel.get_ylabel()) == ("step", "bits per byte")
  assert panel.get_yscale() == "linear"


def test_trade_off_marks_runs_and_their_mean(tmp_path):
  points = {
    "none": (np.array([1.0, 3.0]), np.array([2.0, 2.2])),
    "sign": (np.array([0.1, 0.2]), np.array([2.0, 2.1])),
  }
  figure = plot.trade_off(points, xlabel="MaxVio", ylabel="loss")
  _is_legible(figure, tmp_path)
  (panel,) = figure.axes
  assert panel.get_xscale() == "log"
  labels = [t.get_text() for t in panel.get_legend().get_texts()]
  assert labels == ["none", "sign"]
  runs, mean = panel.lines[:2]
  np.testing.assert_array_equal(runs.get_xdata(), [1.0, 3.0])
  np.testing.assert_allclose([mean.get_xdata(), mean.get_ydata()], [[2], [2.1]])
  with pytest.raises(ValueError, match="'x'.*one length"):
    plot.trade_off({"x": (np.zeros(2), np.zeros(3))}, xlabel="", ylabel="")


@pytest.mark.parametrize("make", [plot.load_heatmap, plot.max_vio_curves])
def test_a_single_step_and_no_load_can_be_drawn(make, tmp_path):
  _is_legible(make(STEPS[:1], np.zeros((1, 1, E), int)), tmp_path)


@pytest.mark.parametrize("shape", [(S, E), (S + 1, LYR, E)])
@pytest.mark.parametrize(
  "make", [plot.load_heatmap, plot.max_vio_curves, plot.bias_curves]
)
def test_shapes_that_do_not_fit_are_named(make, shape):
  with pytest.raises(ValueError, match=r"must be \[S=30, Lyr, E\], got .*\(3"):
    make(STEPS, np.zeros(shape, int))


def test_a_line_of_two_lengths_is_named():
  with pytest.raises(ValueError, match=r"'a'.*\(30,\) and \(2,\)"):
    plot.curves({"a": (STEPS, np.zeros(2))}, xlabel="x", ylabel="y")


def test_without_matplotlib_the_error_names_the_extra():
  code = (
    "import sys; sys.modules['matplotlib'] = None\n"
    "try:\n  import jaxroute.plot\n"
    "except ImportError as error:\n  print(error)\n"
  )
  done = subprocess.run(
    [sys.executable, "-c", code], capture_output=True, text=True
  )
  assert "pip install 'jaxroute[plot]'" in done.stdout, done.stderr


def test_steps_of_small_ints_do_not_wrap():
  edges = plot._edges(np.array([200, 210, 220], np.uint8))
  np.testing.assert_array_equal(edges, [195, 205, 215, 225])


def test_a_balanced_run_is_drawn():
  points = {"balanced": ([0.0, 0.0], [1.0, 1.0]), "other": ([0.1], [2.0])}
  (panel,) = plot.trade_off(points, xlabel="MaxVio", ylabel="loss").axes
  low, _ = panel.get_xlim()
  assert panel.get_xscale() == "linear" and low < 0
  del points["balanced"]
  (panel,) = plot.trade_off(points, xlabel="MaxVio", ylabel="loss").axes
  assert panel.get_xscale() == "log"
