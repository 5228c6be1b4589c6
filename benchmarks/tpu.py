# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Routing, expert order and experts on a TPU: time on the device beside estimates.

The profiler says how long a program takes; `tpu_cycles` compiles it once more for
the cycles that the compiler estimates. Both are given as cycles a token. The first
row of a table is what the others are to be seen against.

  python benchmarks/tpu.py --json=tpu.json
  python benchmarks/tpu.py --dry_run      # on any device, of few tokens, for nothing

It needs a TPU VM of one host, which no other process uses. The flags `cases` and
`candidates` are those of `tpu_cycles`; by default they are `CASES` and `CANDIDATES`.
"""

import functools
import json
import math
import pathlib
import time
from collections.abc import Callable
from typing import Any

import gpu_experts
import gpu_profile
import gpu_report
import jax
import jax.numpy as jnp
import timing
import tpu_cycles
import tpu_programs
from absl import app, flags

import jaxroute

_JSON = flags.DEFINE_string("json", "", "Where to write the tables, too.")
_SECONDS = flags.DEFINE_integer(
  "seconds", 0, "Begin no measurement after so many; 0 measures all."
)
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Interpret the kernels, of 64 tokens, and estimate nothing."
)

CASES = ("E=256 K=8 V3", "E=128 K=8")
CANDIDATES = (
  *("plain", "jaxroute", "plain grad", "jaxroute grad"),
  *("argsort", "sort", "project", "project fused"),
)
# What `device_kind` calls the keys of `tpu_cycles.TPUS`.
KINDS = {
  "TPU v5 lite": "v5e",
  "TPU v5": "v5p",
  "TPU v5p": "v5p",
  "TPU v6 lite": "v6e",
  "TPU7x": "v7x",
}


def generation_of(kind: str) -> str:
  """The key of `tpu_cycles.TPUS` for a `device_kind`.

  Args:
    kind: as JAX names it.

  Raises:
    SystemExit: if it is none of `KINDS`.
  """
  if kind not in KINDS:
    raise SystemExit(
      f"tpu: expected a device of {', '.join(KINDS)}, found {kind!r}. Run it on a"
      " TPU VM, or with --dry_run."
    )
  return KINDS[kind]


def names() -> list[str]:
  """The programs to measure."""
  return flags.FLAGS.candidates or list(CANDIDATES)


def candidates(case: str, t: int, interpret: bool) -> gpu_profile.Candidates:
  """The programs of a case and random operands.

  Args:
    case: a key of `tpu_cycles.CASES`.
    t: T.
    interpret: whether kernels are interpreted.

  Returns:
    What `gpu_profile.measure` takes.
  """
  _, e, k, fields = tpu_cycles.CASES[case]
  config = jaxroute.RouterConfig(num_experts=e, top_k=k, **fields)
  programs = tpu_programs.programs(config, interpret)

  def operand(i, shape):
    key = jax.random.key(i)
    if shape.dtype == jnp.int32:
      # K distinct experts a token.
      choose = functools.partial(jax.random.permutation, x=e, independent=True)
      return jax.vmap(choose)(jax.random.split(key, t))[:, :k]
    return jax.random.normal(key, shape.shape, shape.dtype)

  def operands(name):
    shapes = tpu_programs.shapes(t, config, name)
    return tuple(operand(i, shape) for i, shape in enumerate(shapes))

  return {name: (programs[name], operands(name)) for name in names()}


def by_the_clock(call: Callable[..., Any], *args: Any) -> gpu_profile.Profile:
  """One call by a clock on the host, for devices that the profiler does not show."""
  seconds = timing.interleaved_medians({"": lambda: call(*args)}, 1)[""]
  return gpu_profile.Profile(us=1e6 * seconds, launches=1.0, kernels={})


def cycles_table(
  t: int,
  clock: float,
  estimates: dict[str, float],
  title: str,
  rows: gpu_report.Rows,
) -> str:
  """One line for a row: cycles a token, as estimated and as measured.

  Args:
    t: T.
    clock: GHz.
    estimates: name to cycles a token.
    title: of the table.
    rows: of `gpu_profile.measure`.
  """
  first, lines = rows[0].get("us", math.nan), []
  for row in rows:
    estimate = estimates.get(row["name"], math.nan)
    measured = row.get("us", math.nan) * 1e3 * clock / t
    figures = [estimate, measured, measured / estimate]
    figures += [row.get("us", math.nan), row.get("us", math.nan) / first]
    cells = ["-" if math.isnan(x) else f"{x:.4g}" for x in figures]
    lines.append([row["name"], *cells, row.get("error", "")])
  columns = [title, "cycles a token, estimated", "measured", "ratio", "us"]
  return gpu_report.markdown([*columns, "x the first", ""], lines)


def estimates_of(generation: str, case: str) -> dict[str, float]:
  """Candidate to cycles a token, of those that the compiler can estimate."""
  rows = tpu_cycles.table([generation], [case], names(), bounds=False)
  (row,) = rows.values()
  return {name: found["cycles"] for name, found in row.items() if found}


def experts_tables(sizes: gpu_experts.Sizes) -> list[gpu_profile.Table]:
  """Grouped products beside dense ones of as many FLOPs."""
  make = functools.partial(gpu_experts.candidates, sizes, [None])
  return [
    gpu_profile.Table(
      f"Experts, {what}, bfloat16, {sizes}, MaxVio 1",
      functools.partial(make, with_gradients=with_gradients),
      flops,
    )
    for what, with_gradients, flops in (
      ("forward", False, sizes.flops),
      ("with gradients", True, 3 * sizes.flops),
    )
  ]


def main(argv: list[str]) -> None:
  del argv
  dry, device = _DRY_RUN.value, jax.devices()[0]
  generation = "v6e" if dry else generation_of(device.device_kind)
  _, clock, _ = tpu_cycles.TPUS[generation]
  deadline = time.monotonic() + (_SECONDS.value or float("inf"))
  report = dict(jax=jax.__version__, device=device.device_kind, tables={})
  print(f"jax {jax.__version__}, {device.device_kind}\n", flush=True)

  def save(title, rows):
    report["tables"][title] = rows
    if _JSON.value:
      # Whoever ends this process finds a whole file.
      whole = pathlib.Path(f"{_JSON.value}.tmp")
      whole.write_text(json.dumps(report, indent=1))
      whole.replace(_JSON.value)

  measure = functools.partial(
    gpu_profile.measure,
    deadline=deadline,
    save=save,
    profile=by_the_clock if dry else None,
  )
  sizes = gpu_experts.Sizes(d=2048, f=1408)
  if dry:
    sizes = gpu_experts.Sizes(n=96, e=4, k=2, d=16, f=8)
  for table in experts_tables(sizes):
    measure(table)
  for case in flags.FLAGS.cases or CASES:
    t = 64 if dry else tpu_cycles.CASES[case][0]
    estimates = {} if dry else estimates_of(generation, case)
    table = gpu_profile.Table(
      f"{case}, T={t:,}", functools.partial(candidates, case, t, dry)
    )
    measure(table, show=functools.partial(cycles_table, t, clock, estimates))
  # The kernel leaves the projection of some routers, and on v5e of all, to XLA.
  gpu_profile.check_all_measured(report["tables"], may_refuse=True)


if __name__ == "__main__":
  app.run(main)
