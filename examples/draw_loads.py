# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Draws the picture of the README: loads without and with balancing.

From the metrics of two runs of the main example:

  python examples/lm/train.py --rule=none --out=runs/none
  python examples/lm/train.py --out=runs/lm
  python examples/draw_loads.py --out=docs/loads.png
"""

import json
import pathlib

import numpy as np
from absl import app, flags
from matplotlib import colors, figure

_WITHOUT = flags.DEFINE_string("without", "runs/none", "Run without balancing.")
_WITH = flags.DEFINE_string("with", "runs/lm", "Run with balancing.")
_OUT = flags.DEFINE_string("out", "loads.png", "File to write.")

# White is the mean load; what is above three times the mean has one colour.
NORM = colors.TwoSlopeNorm(vcenter=1, vmin=0, vmax=3)


def read_loads(run: str) -> np.ndarray:
  """`[S, Lyr, E]`: the load over the mean load, in each of S training steps."""
  lines = (pathlib.Path(run) / "metrics.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  load = np.array([row["load"] for row in rows if row["kind"] == "train"])
  return load / load.mean(axis=-1, keepdims=True)


def main(argv: list[str]) -> None:
  del argv
  runs = {
    "Without balancing": read_loads(_WITHOUT.value),
    "With balancing": read_loads(_WITH.value),
  }
  layers = next(iter(runs.values())).shape[1]
  fig = figure.Figure(figsize=(8, 5), layout="constrained")
  rows = np.asarray(fig.subfigures(2, 1, hspace=0.04)).ravel()
  for row, (title, load) in zip(rows, runs.items(), strict=True):
    late = load[-max(1, len(load) // 4) :].max(axis=-1).mean()
    row.suptitle(
      f"{title}: in the end the busiest expert gets {late:.1f} x the mean load",
      fontsize=12,
      fontweight="bold",
    )
    panels = row.subplots(1, layers, sharey=True)
    for i, panel in enumerate(panels):
      image = panel.imshow(
        load[:, i].T,
        cmap="RdBu_r",
        norm=NORM,
        aspect="auto",
        interpolation="nearest",
        extent=(0.5, len(load) + 0.5, load.shape[2] - 0.5, -0.5),
      )
      panel.set_title(f"MoE layer {i + 1}", fontsize=10)
      panel.set_xlabel("training step")
    panels[0].set_ylabel("expert")
    bar = row.colorbar(image, ax=list(panels), extend="max", pad=0.01)
    bar.set_label("load / mean load\n(white: balanced)")
    bar.set_ticks([0, 1, 2, 3])
  fig.savefig(_OUT.value, dpi=150)


if __name__ == "__main__":
  app.run(main)
