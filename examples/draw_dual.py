# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Draws the picture of docs/theory.md: rules as steps down the dual function.

python examples/draw_dual.py --out=docs/dual.png
"""

import jax.numpy as jnp
import numpy as np
import optax
from absl import app, flags
from matplotlib import figure

import jaxroute
from jaxroute import assignment, dual, metrics

_OUT = flags.DEFINE_string("out", "dual.png", "File to write.")

T, STEPS = 64, 12
CONFIG = jaxroute.RouterConfig.on_scores(num_experts=2, top_k=1)
RULES = {
  "sign, u = 0.3: a cycle": dual.sign(0.3),
  "sign, u = 0.3 / sqrt(n)": dual.sign(dual.inverse_sqrt(0.3)),
  "proportional, u = 0.25": dual.proportional(0.25),
}


def descend(
  scores: jnp.ndarray, rule: optax.GradientTransformation | None
) -> list[float]:
  """Runs a rule and records the second expert's bias minus the first's.

  Args:
    scores: `[T, 2]` float32.
    rule: the rule to run; None for quantile balancing, from the scores.

  Returns:
    The difference before each step.
  """
  bias = jnp.zeros(2)
  state = rule.init(bias) if rule else ()
  offsets = []
  for _ in range(STEPS):
    offsets.append(float(bias[1] - bias[0]))
    if rule is None:
      bias = dual.quantile_bias(scores, bias, CONFIG.top_k)
      continue
    load = jaxroute.route(scores, bias, CONFIG).load
    updates, state = rule.update(metrics.violation(load), state, bias)
    bias = optax.apply_updates(bias, updates)
  return offsets


def main(argv: list[str]) -> None:
  del argv
  rng = np.random.default_rng(0)
  # Most tokens prefer the first of two experts.
  scores = jnp.asarray(rng.normal(size=(T, 2)) + [1.2, 0.0], jnp.float32)
  best = assignment.solve(scores, CONFIG.top_k).value

  def excess(offset: float) -> float:
    bias = jnp.array([-offset / 2, offset / 2], jnp.float32)
    return float(assignment.dual_value(scores, bias, CONFIG.top_k)) - best

  fig = figure.Figure(figsize=(9.5, 4), layout="constrained")
  left, right = fig.subplots(1, 2)
  offsets = np.linspace(-0.2, 2.6, 400)
  left.plot(offsets, [excess(x) for x in offsets], color="black", linewidth=1)
  rules = RULES | {"quantile: no step size": None}
  for i, (label, rule) in enumerate(rules.items()):
    path = descend(scores, rule)
    style = dict(color=f"C{i}", marker="osD^"[i], markersize=4, linewidth=1)
    # The paths all lie on the curve: each is drawn above the one before.
    left.plot(path, [excess(x) + 0.8 * (i + 1) for x in path], **style)
    gaps = np.maximum([excess(x) / best for x in path], 1e-5)
    right.plot(range(STEPS), gaps, label=label, **style)
  left.set(
    xlabel="bias of expert 2 minus bias of expert 1",
    ylabel="dual value minus its minimum (paths raised)",
    title="Where the steps go",
  )
  right.set_yscale("log")
  right.set(
    xlabel="step", ylabel="relative gap, at least 1e-5", title="What is left"
  )
  right.legend(frameon=False)
  for panel in (left, right):
    panel.grid(alpha=0.3)
  fig.savefig(_OUT.value, dpi=110)


if __name__ == "__main__":
  app.run(main)
