# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Balancing rules and auxiliary losses side by side: same data, same seeds.

Every arm is `train.py` with other flags, in a folder of its own, so whatever
stops this, the same command continues. --preset=cpu takes about 15 minutes on
two cores; --preset=gpu is a model of 194M parameters for one accelerator. At
the end, table.md, trade_off.png and max_vio.png are in --out.

  python examples/lm/compare_rules.py --out=runs/compare
"""

import json
import pathlib
import statistics
import sys
from collections.abc import Sequence
from typing import Any

import checkpoint as checkpoint_lib
import command
import config as config_lib
import jax
import numpy as np
import report as report_lib
import strict_json
import train as train_lib
from absl import app, flags, logging

from jaxroute import plot

_PRESET = flags.DEFINE_enum("preset", "cpu", ("cpu", "gpu"), "Size of it all.")
_OUT = flags.DEFINE_string("out", "runs/compare", "Folder of runs and results.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of every arm.", lower_bound=1)
_STEPS = flags.DEFINE_integer(
  "steps", 0, "Optimizer steps of a run; 0: the preset's.", lower_bound=0
)

# Name to the flags of train.py that make the arm. Rates suit sigmoid scores.
ARMS: dict[str, dict[str, Any]] = {
  "none": {"rule": "none"},
  "switch loss, 1e-3": {"rule": "none", "switch_weight": 1e-3},
  "switch loss, 1e-2": {"rule": "none", "switch_weight": 1e-2},
  "switch loss, 1e-1": {"rule": "none", "switch_weight": 1e-1},
  "sign, u": {"rule": "sign"},
  "sign, u / sqrt(n)": {"rule": "sign_sqrt"},
  "sign, u / n": {"rule": "sign_inverse"},
  "proportional": {"rule": "proportional"},
  "SMEBU": {"rule": "smebu"},
  "quantile": {"rule": "quantile"},
}
_ARM = flags.DEFINE_multi_enum(
  "arm", [], list(ARMS), "An arm to run; may be repeated. None: all."
)

PRESETS: dict[str, dict[str, Any]] = {
  "cpu": dict(
    steps=200,
    model_size=64,
    num_layers=3,
    expert_size=32,
    shared_size=32,
    eval_batches=16,
  ),
  # Half the width of the 1B model of Wang et al., with its experts: 64, 2,
  # top-6.
  "gpu": dict(
    data_bytes=200_000_000,
    steps=1000,
    batch_size=64,
    micro_batches=4,
    seq_len=512,
    model_size=512,
    num_layers=8,
    num_heads=8,
    num_experts=64,
    top_k=6,
    expert_size=256,
    shared_size=512,
    learning_rate=1e-3,
    warmup=100,
    eval_batches=16,
    save_every=250,
  ),
}


def config_of(arm: str, seed: int) -> config_lib.Config:
  """The settings of one run.

  Args:
    arm: a key of `ARMS`.
    seed: of parameters and data.

  Returns:
    A `Config` whose folder is below --out.
  """
  settings = dict(PRESETS[_PRESET.value])
  if _STEPS.value:
    settings["steps"] = _STEPS.value
  steps = settings["steps"]
  settings.setdefault("save_every", steps)
  settings.setdefault("mesh", "data=1")  # times are of one device
  folder = "".join(c if c.isalnum() or c == "-" else "_" for c in arm)
  return config_lib.Config(
    **settings,
    **ARMS[arm],
    seed=seed,
    decay_steps=steps,
    eval_every=steps,
    out=str(pathlib.Path(_OUT.value) / f"{folder}_{seed}"),
  )


def run(config: config_lib.Config) -> dict[str, Any]:
  """The summary of a run, with its rows; trains unless the run is there."""
  out = pathlib.Path(config.out)
  done, identity = out / "done.json", config.identity()
  if not _holds(done, identity):
    train_lib.train(config)
    done.write_text(json.dumps(identity, allow_nan=False))
  rows = [r for r in report_lib.read_rows(config.out) if r["kind"] == "train"]
  # The first step of a process compiles, and has no time.
  seconds = sum(r["seconds"] or 0.0 for r in rows)
  summary = strict_json.loads((out / "summary.json").read_text())
  return summary | {"rows": rows, "seconds": seconds}


def _holds(path: pathlib.Path, value: Any) -> bool:
  """Whether a file holds a value; a killed process may have left half of it."""
  try:
    return json.loads(path.read_text()) == value
  except (OSError, ValueError):
    return False


def table(results: dict[str, list[dict[str, Any]]]) -> str:
  """A line of Markdown for every arm: means over seeds, and the loss's deviation."""
  lines = [
    "| arm | validation bits/byte | MaxVio_global | MaxVio_batch, last quarter:"
    " mean | worst | gap to the optimum | seconds |",
    "| --- | --- | --- | --- | --- | --- | --- |",
  ]
  for arm, runs in results.items():

    def mean(name: str, runs: list[dict[str, Any]] = runs) -> float:
      return statistics.fmean(r[name] for r in runs)

    losses = [r["validation_bits_per_byte"] for r in runs]
    deviation = statistics.stdev(losses) if len(losses) > 1 else 0.0
    lines.append(
      f"| {arm} | {statistics.fmean(losses):.3f} ± {deviation:.3f}"
      f" | {mean('max_vio_global'):.3f} | {mean('max_vio_batch_mean'):.3f}"
      f" | {max(r['max_vio_batch_worst'] for r in runs):.3f}"
      f" | {100 * mean('gap'):.2f} % | {mean('seconds'):.0f} |"
    )
  return "\n".join(lines)


def write_figures(
  results: dict[str, list[dict[str, Any]]], out: pathlib.Path
) -> None:
  """Writes trade_off.png and max_vio.png."""
  points, series, window = {}, {}, 1
  for arm, runs in results.items():
    points[arm] = tuple(
      np.array([r[name] for r in runs])
      for name in ("max_vio_global", "validation_bits_per_byte")
    )
    steps = np.array([row["step"] for row in runs[0]["rows"]])
    max_vio = np.mean([[w["max_vio"] for w in r["rows"]] for r in runs], axis=0)
    series[arm] = steps, max_vio
  window = max(1, len(runs[0]["rows"]) // 15)
  plot.trade_off(
    points,
    xlabel="MaxVio_global of the validation, mean over layers",
    ylabel="validation bits per byte",
  ).savefig(out / "trade_off.png", dpi=110)
  plot.curves(
    series,
    xlabel="training step",
    ylabel="MaxVio of the batch, mean over layers and seeds",
    log_scale=True,
    window=window,
  ).savefig(out / "max_vio.png", dpi=110)


def main(argv: Sequence[str]) -> None:
  if len(argv) > 1:
    raise app.UsageError(f"expected flags only, got {argv[1:]}.", exitcode=2)
  logging.set_verbosity(logging.WARNING)
  out = pathlib.Path(_OUT.value)
  # The seeds of an arm, and a run that continues, compile the same programs.
  jax.config.update("jax_compilation_cache_dir", str(out.resolve() / "cache"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  results = {}
  try:
    for arm in _ARM.value or ARMS:
      for seed in range(_SEEDS.value):
        print(f"== {arm}, seed {seed}", flush=True)
        results.setdefault(arm, []).append(run(config_of(arm, seed)))
  except (config_lib.SetupError, checkpoint_lib.SaveError) as error:
    print(f"compare_rules.py: {error}", file=sys.stderr)
    sys.exit(2 if isinstance(error, config_lib.SetupError) else 1)
  except train_lib.Interrupted as error:
    print(f"{error}; the same command continues from there.", file=sys.stderr)
    sys.exit(error.exit_code)
  device = jax.devices()[0]
  heading = (
    f"--preset={_PRESET.value}, {_SEEDS.value} seeds,"
    f" {config_of('none', 0).steps} steps; jax {jax.__version__},"
    f" {device.device_kind}."
  )
  text = f"{heading}\n\n{table(results)}\n"
  (out / "table.md").write_text(text)
  write_figures(results, out)
  print(f"\n{text}\nFigures: {out}/trade_off.png, {out}/max_vio.png")


if __name__ == "__main__":
  app.run(main, flags_parser=command.parse_flags)
