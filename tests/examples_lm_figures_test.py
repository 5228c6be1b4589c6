# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs side by side: what is drawn, on which scale, with which labels."""

import figures as figures_lib
import numpy as np
import pytest

pytestmark = pytest.mark.any_jax

S, LYR, E = 90, 2, 4


def _rows(seed):
  rng = np.random.default_rng(seed)
  rows = [
    {
      "kind": "train",
      "step": step,
      "load": rng.integers(0, 9, (LYR, E)).tolist(),
      "max_vio": rng.uniform(0.1, 3),
      "bits_per_byte": rng.uniform(2, 3),
    }
    for step in range(1, S + 1)
  ]
  rows.append({"kind": "validation", "step": S, "bits_per_byte": 2.0 + seed})
  return rows


RUNS = {"proportional": _rows(0), "none": _rows(1)}


def test_the_curves_share_their_steps_and_name_every_run():
  fig = figures_lib._curves(RUNS, 0.2)
  balance, loss = fig.axes
  assert balance.get_shared_x_axes().joined(balance, loss)
  assert balance.get_yscale() == "log" and loss.get_yscale() == "linear"
  assert loss.get_xlabel() == "training step"
  assert "MaxVio" in balance.get_ylabel()
  assert loss.get_ylabel() == "bits per byte"
  labels = [t.get_text() for t in balance.get_legend().get_texts()]
  assert labels == ["proportional", "none", "routed at random"]
  lines = {line.get_label(): line for line in loss.get_lines()}
  window = S // 40
  raw = np.array([r["bits_per_byte"] for r in RUNS["none"][:S]])
  mean = np.convolve(raw, np.full(window, 1 / window), mode="valid")
  np.testing.assert_allclose(lines["none"].get_ydata(), mean)
  for i, rule in enumerate(RUNS):
    points = lines[f"{rule}, validation"]
    assert (points.get_xdata(), points.get_ydata()) == (S, 2.0 + i)
    assert points.get_color() == lines[rule].get_color() == f"C{i}"
  (dotted,) = [x for x in balance.get_lines() if x.get_linestyle() == ":"]
  assert set(dotted.get_ydata()) == {0.2}


def test_loads_lie_one_above_the_other_on_one_scale():
  fig = figures_lib._loads(RUNS)
  assert len(fig.subfigs) == 2
  norms = set()
  for part, (rule, rows) in zip(fig.subfigs, RUNS.items(), strict=True):
    load = np.array([r["load"] for r in rows[:S]])
    relative = load / load.mean(axis=-1, keepdims=True)
    late = relative[-(S // 4) :].max(axis=-1).mean()
    assert f"--rule={rule}: " in part.get_suptitle()
    assert f"{late:.1f} x the mean" in part.get_suptitle()
    *panels, bar = part.axes
    assert [p.get_title() for p in panels] == ["MoE layer 1", "MoE layer 2"]
    assert panels[0].get_ylabel() == "expert"
    assert "load / mean load" in bar.get_ylabel()
    for i, panel in enumerate(panels):
      assert panel.get_xlabel() == "training step"
      (image,) = panel.get_images()
      np.testing.assert_allclose(image.get_array(), relative[:, i].T)
      norms.add((image.norm.vmin, image.norm.vcenter, image.norm.vmax))
  assert norms == {(0, 1, 3)}


def test_both_figures_are_written(tmp_path):
  figures_lib.write_comparison(RUNS, 0.2, tmp_path)
  for name in ("compared", "compared_loads"):
    assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
