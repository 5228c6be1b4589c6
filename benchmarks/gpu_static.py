# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Routing on NVIDIA GPUs as the compilers see it: no GPU is needed.

`pip install '.[aot-gpu]'` brings the compilers (Python 3.12 or newer, Linux). The same
versions give the same figures every time; they are no measurements.

  python benchmarks/gpu_static.py                      # against gpu_static.json
  python benchmarks/gpu_static.py --only="h100 V3"
  python benchmarks/gpu_static.py --write              # renew gpu_static.json

Of the routing kernel, by case and threads for a token (L), at T = 65,536:
registers of a thread and bytes that it spills; bytes of shared memory, and
blocks that fit on a core (SM); `bar.sync` in the PTX; machine instructions that
a warp executes per token (`jaxroute.aot.gpu_sass`); launches and bytes of
temporaries of `route`, and launches of `route` and `sort_by_expert`.

Of whole programs, for DeepSeek-V3's router: launches and bytes of temporaries.
"plain" is what one writes with `lax.top_k`, without a cutoff.
"""

import json
import pathlib
import sys
from typing import Any, NamedTuple

from absl import app, flags

from jaxroute.aot import gpu, process

_ONLY = flags.DEFINE_string("only", "", "Rows whose names begin like this.")
_WRITE = flags.DEFINE_bool(
  "write",
  False,
  "Write to gpu_static.json.",
  # Tests import this beside the table of TPUs, which has such a flag.
  allow_override=True,
)

TABLE = pathlib.Path(__file__).with_name("gpu_static.json")

TOKENS = 65_536
WARP = 32

Row = dict[str, float]


class Case(NamedTuple):
  """A router, and what its kernel may take.

  Attributes:
    e: E.
    k: K.
    lanes: L, threads for a token.
    config: the other fields of the `RouterConfig`.
    instructions: at most so many per token, on an H100.
    registers: at most so many.
  """

  e: int
  k: int
  lanes: int
  config: dict[str, Any]
  instructions: int
  registers: int = 128


_V3 = dict(num_groups=8, group_top_k=4)
CASES = {
  "64/K6 L=2": Case(64, 6, 2, {}, 110),
  "128 L=1": Case(128, 8, 1, {}, 195),
  "256 L=1": Case(256, 8, 1, {}, 335),
  "256 L=2": Case(256, 8, 2, {}, 355),
  "256 L=8": Case(256, 8, 8, {}, 440),
  "V3 L=1": Case(256, 8, 1, _V3, 350),
  "V3 L=2": Case(256, 8, 2, _V3, 375),
  "V3 L=4": Case(256, 8, 4, _V3, 420),
  "V3 L=8": Case(256, 8, 8, _V3, 470),
  "V3, histogram, L=4": Case(256, 8, 4, dict(_V3, histogram=True), 540),
  "384 L=1": Case(384, 8, 1, {}, 480, 155),
  "512 L=4": Case(512, 8, 4, {}, 655, 155),
  "1024 L=8": Case(1024, 8, 8, {}, 1320, 155),
  "softmax L=1": Case(256, 8, 1, dict(score_fn="softmax"), 455, 155),
  "sqrtsoftplus L=1": Case(256, 8, 1, dict(score_fn="sqrtsoftplus"), 745, 155),
}
# Rows "target case", and "target program T=tokens" for V3.
KERNELS = [f"h100 {case}" for case in CASES] + [
  f"b200 {case}" for case in ("64/K6 L=2", "256 L=1", "V3 L=2", "V3 L=8")
]
PROGRAMS = [
  f"{target} {program} T={t}"
  for target, programs in {
    "h100": ("plain", "xla", "pallas_gpu"),
    "a100": ("plain", "xla"),
  }.items()
  for program in programs
  for t in (16, 4096, 65_536)
]

KERNEL_COLUMNS = (
  *("registers", "spills", "shared_memory", "blocks_per_core", "barriers"),
  *("instructions", "launches", "order_launches", "temporaries"),
)
PROGRAM_COLUMNS = ("launches", "temporaries")


def kernel_row(name: str) -> Row:
  """What is known of one case; compiles in this process.

  Args:
    name: one of `KERNELS`.

  Returns:
    Column to figure; see the docstring of this script.
  """
  import jaxroute
  from jaxroute import dispatch
  from jaxroute.kernels.gpu import route as kernel

  target, name = name.split(" ", 1)
  case = CASES[name]
  config = jaxroute.RouterConfig(
    num_experts=case.e, top_k=case.k, **case.config
  )

  def route(logits, bias):
    return kernel.route(logits, bias, None, config=config, lanes=case.lanes)

  def order(logits, bias):
    r = jaxroute.route(
      logits, bias, config, implementation="pallas_gpu", with_rank=True
    )
    return (
      r.expert_idx,
      r.weights,
      dispatch.sort_by_expert(
        r.expert_idx,
        case.e,
        implementation="pallas_gpu",
        rank=r.rank,
        load=r.load,
      ),
    )

  shapes = _shapes(TOKENS, case.e)
  found = gpu.report(target, route, *shapes)
  (figures,) = (k for k in found.kernels if k.name == "jaxroute_route")
  assert figures.instructions is not None
  return {
    "registers": figures.registers,
    "spills": figures.spills,
    "shared_memory": figures.shared_memory,
    "blocks_per_core": figures.blocks_per_core,
    "barriers": figures.barriers,
    "instructions": round(figures.instructions * case.lanes / WARP, 1),
    "launches": found.launches,
    "order_launches": gpu.report(target, order, *shapes).launches,
    "temporaries": found.temporaries,
  }


def program_row(name: str) -> Row:
  """What is known of one program; compiles in this process.

  Args:
    name: one of `PROGRAMS`.

  Returns:
    Column to figure; see the docstring of this script.
  """
  import plain

  import jaxroute

  target, program, t = name.replace("T=", "").split(" ")
  config = jaxroute.RouterConfig(num_experts=256, top_k=8, **_V3)

  def by_plain(logits, bias):
    return plain.route(logits, bias, config)[:3]

  def by_us(logits, bias):
    r = jaxroute.route(logits, bias, config, implementation=program)
    return r.expert_idx, r.weights, r.load, r.cutoff

  function = by_plain if program == "plain" else by_us
  found = gpu.report(target, function, *_shapes(int(t), 256))
  return {"launches": found.launches, "temporaries": found.temporaries}


def _shapes(t: int, e: int) -> list[Any]:
  import jax
  import jax.numpy as jnp

  sizes = (t, e), (e,)
  return [jax.ShapeDtypeStruct(size, jnp.float32) for size in sizes]


def row(name: str) -> Row:
  """Compiles what a row is of, in a process of its own, and reads it.

  Args:
    name: one of `KERNELS` or `PROGRAMS`.

  Returns:
    Column to figure.
  """
  make = kernel_row if name in KERNELS else program_row
  return process.apart(make, name)


def worse(found: Row, before: Row) -> list[str]:
  """Where a row is worse than it was.

  Args:
    found: of `row`.
    before: the same row of the table.

  Returns:
    Words for every figure that has risen: instructions by more than 5 %,
    temporaries by more than 5 % and 64 KB, others at all.
  """
  slack = {"instructions": (1.05, 0), "temporaries": (1.05, 65_536)}
  said = []
  for column, figure in found.items():
    times, plus = slack.get(column, (1, 0))
    if column == "blocks_per_core":
      is_worse = figure < before[column]
    else:
      is_worse = figure > max(before[column] * times, before[column] + plus)
    if is_worse:
      said.append(f"{column} {figure:g}, was {before[column]:g}")
  return said


def recorded() -> dict[str, Row]:
  """The rows of the table for these versions; none if it has none."""
  if not TABLE.exists():
    return {}
  return json.loads(TABLE.read_text()).get(gpu.versions(), {})


def main(argv: list[str]) -> None:
  del argv
  if why := gpu.missing():
    raise app.UsageError(why)
  names = [n for n in KERNELS + PROGRAMS if n.startswith(_ONLY.value)]
  before, rows, failed = recorded(), {}, False
  for title, group, columns in (
    ("kernel", KERNELS, KERNEL_COLUMNS),
    ("program", PROGRAMS, PROGRAM_COLUMNS),
  ):
    print(f"\n| {title} | " + " | ".join(columns) + " |")
    print("| --- " * (1 + len(columns)) + "|")
    for name in (n for n in names if n in group):
      rows[name] = row(name)
      figures = " | ".join(f"{rows[name][c]:,}" for c in columns)
      print(f"| {name} | {figures} |", flush=True)
      for words in worse(rows[name], before.get(name, rows[name])):
        failed = True
        print(f"{name}: {words}", file=sys.stderr)
  print(f"\n{gpu.versions()}")
  if _WRITE.value:
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    table.setdefault(gpu.versions(), {}).update(rows)
    text = json.dumps(table, allow_nan=False, indent=1, sort_keys=True)
    TABLE.write_text(text + "\n")
  elif failed:
    sys.exit(1)


if __name__ == "__main__":
  app.run(main)
