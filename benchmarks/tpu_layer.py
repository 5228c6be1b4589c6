# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Cycles per row of a layer's experts, and of moving their rows, on TPU.

No TPU is needed; see `tpu_cycles.py`, whose estimates leave out what loops and
conditions make of a kernel. So the bundles of our kernels are counted here, and
for what XLA does around them the estimates are taken that it writes to the
program's text. There a sort of N pairs has none, and gets that of `tpu_cycles.py`; nor
have some ops of fewer than N numbers, as a reshape of the weights: 0.06 cycles a row.

  python benchmarks/tpu_layer.py --generations=v6e
  python benchmarks/tpu_layer.py --write      # renew tpu_cycles.json

The programs, of N = T K = 65,536 rows in bfloat16, D = 2,048, F = 1,024, E = 64:

  combine        rows to tokens, by weight
  dispatch grad  the gradient of `dispatch`, rows to tokens
  combine grad   the gradient of `combine`, to rows and weights
  swiglu         the experts
  swiglu grad    the experts and all their gradients

Beside `cycles` stand `kernels`, the part of it in our kernels, and what none can
take less than: `floor`, the time to move operands and results at the HBM
bandwidth, and `mxu`, that of the products in the matrix unit. Waits of the kernels
for memory are not counted. Where XLA gathers rows on a SparseCore, which is not
estimated, no kernel of ours moves them, and those programs are left out.

Groups begin and end within blocks of rows, no two in the same: the most work that
the kernels of the experts can have.
"""

import math
import pathlib
import re
import sys
import tempfile

import tpu_bundles
import tpu_cycles
import tpu_programs
from absl import app, flags

from jaxroute.aot import chips, tpu
from jaxroute.kernels.tpu import grouped, rows

_PROGRAMS = flags.DEFINE_list("programs", "", "By default all.")

CASE = "E=64 K=8"
PROGRAMS = tpu_programs.MOVES + tpu_programs.EXPERTS
FIGURES = ("cycles", "kernels", "floor", "mxu")
# Products of rows and the matrices of experts: three forward, two for each backward.
_PRODUCTS = {"swiglu": 3, "swiglu grad": 9}
# Ops that take no time of the core, or wait for memory.
_FREE = (
  *("parameter", "constant", "bitcast", "get-tuple-element", "tuple"),
  *("copy-start", "copy-done"),
)


def _conditions() -> dict[str, tuple[float, ...]]:
  """Of which share of the grid's steps the conditions of a kernel hold."""
  t, num_experts, top_k, _ = tpu_cycles.CASES[CASE]
  first = rows.ROWS / (t * top_k)
  num_blocks = t * top_k / grouped.ROWS
  return {
    # The first block of a slice, and the last.
    "jaxroute_add_rows": (first, first),
    "jaxroute_take_rows": (first,),
    "jaxroute_multiply_rows": (first,),
    # A block that is new; one with rows of the group.
    "jaxroute_grouped_matmul": (num_blocks / (num_blocks + num_experts), 1),
    # One with rows of the group; the last of a group.
    "jaxroute_grouped_outer": (1, num_experts / (num_blocks + num_experts)),
  }


def _bundles(path: pathlib.Path) -> float:
  """Those that a kernel of ours issues."""
  (kernel,) = (name for name in _conditions() if name in path.name)
  return tpu_bundles.count(path.read_text(), _conditions()[kernel])


def _is_small(op: str) -> bool:
  """Whether the result is one number a row at most."""
  t, _, top_k, _ = tpu_cycles.CASES[CASE]
  shape = re.match(r"\w+\[([\d,]*)\]", op)
  sizes = map(int, filter(None, shape[1].split(","))) if shape else ()
  return shape is not None and math.prod(sizes) <= t * top_k


def _kernels_and_others(
  text: str, folder: pathlib.Path, cycles_of_sort: float
) -> tuple[float, float]:
  """Bundles of our kernels, and cycles of XLA's ops.

  Args:
    text: of the program.
    folder: what the compiler wrote for its kernels.
    cycles_of_sort: of one sort.
  """
  paths = {}
  for path in folder.glob("*-jaxroute_*final_bundles.txt"):
    if "schedule" not in path.name:
      paths[path.name.split("-")[1]] = path
  ops = re.findall(r"%(\S+) = (.*)", text[text.index("\nENTRY ") :])
  by_kind = {tpu.without_names(op): paths[n] for n, op in ops if n in paths}
  kernels = others = 0.0
  for _, op in ops:
    estimated = re.search(r'"estimated_cycles":"(\d+)"', op)
    kind = re.search(r" ([a-z-]+)\(", op)
    if tpu.without_names(op) in by_kind:
      kernels += _bundles(by_kind[tpu.without_names(op)])
    elif estimated:
      others += int(estimated[1])
    elif kind and kind[1] == "sort":
      others += cycles_of_sort
    elif not _is_small(op) and (not kind or kind[1] not in _FREE):
      raise RuntimeError(f"the compiler gives no estimate of {op}")
  return kernels, others


def estimate(generation: str, program: str) -> dict[str, float]:
  """What one program costs, compiled in a process of its own.

  Args:
    generation: a key of `tpu_cycles.TPUS`.
    program: a member of `PROGRAMS`.

  Returns:
    `FIGURES` per row; empty if no kernel of ours is in the program, or it was not
    compiled.
  """
  t, _, top_k, _ = tpu_cycles.CASES[CASE]
  topology, clock, bandwidth = tpu_cycles.TPUS[generation]
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    case = tpu_cycles.compile_for, generation, CASE
    try:
      text, moved = tpu.listing(*case, program, dump_to=folder)
      has_sort = " sort(" in text
      sort = tpu.profile(*case, "sort pairs").cycles if has_sort else 0
      kernels, others = _kernels_and_others(text, folder, sort)
    except (NotImplementedError, RuntimeError) as error:
      print(f"{generation} {program}: {error}", file=sys.stderr)
      return {}
  if not kernels:
    return {}
  figures = {
    "cycles": (kernels + others) / (t * top_k),
    "kernels": kernels / (t * top_k),
    "floor": moved / bandwidth * clock / (t * top_k),
  }
  if program in _PRODUCTS:
    # A core of v5p has half of its chip's unit, as of its bandwidth above.
    share = bandwidth * 1e9 / chips.chip(topology).hbm_bandwidth
    rate = chips.chip(topology).flops * share / (clock * 1e9)
    flops = 2 * tpu_programs.WIDTH * tpu_programs.EXPERT_WIDTH
    figures["mxu"] = _PRODUCTS[program] * flops / rate
  return {name: round(figure, 2) for name, figure in figures.items()}


def main(argv: list[str]) -> None:
  del argv
  print(f"{'':20s}" + "".join(f"{name:>10s}" for name in FIGURES))
  for generation in flags.FLAGS.generations:
    row = {}
    for program in _PROGRAMS.value or PROGRAMS:
      row[program] = found = estimate(generation, program)
      figures = [found.get(name, math.nan) for name in FIGURES]
      cells = "".join(f"{x:10.2f}" for x in figures)
      print(f"{generation + ' ' + program:20s}{cells}", flush=True)
    if flags.FLAGS.write:
      tpu_cycles.record({f"{generation} {CASE}": row})


if __name__ == "__main__":
  app.run(main)
