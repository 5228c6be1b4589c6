# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Cycles per token of routing on TPU, as the TPU compiler estimates them.

No TPU is needed: `pip install libtpu` brings the compiler, which writes its own
static estimate of every op it schedules. That is exact and repeatable, but it
is no measurement: nothing here has run on a TPU. A program's figure is the sum
over its ops, from row-major logits in HBM to experts, weights, loads and
cutoff. v4 is left out: the kernel does not compile for it, nor is anything
estimated.

  python benchmarks/tpu_cycles.py --generations=v6e
  python benchmarks/tpu_cycles.py --write      # renew tpu_cycles.json

The programs:

  plain               what one writes with `lax.top_k`, without a gather or scatter
  tokamax             the same with `tokamax.router_topk`, where that is installed
  jaxroute            the routing kernel
  ... grad            the forward pass and the gradient of the weights to the logits
  jaxroute histogram  with the histogram for `dual.quantile`, whose sum over the
                      lanes, once in 31 blocks, is charged by half to each
  project             the router's projection of bfloat16 tokens of width 2048, by
                      XLA, and routing after it
  project fused       both in one kernel, on v6e and newer
  sort                `dispatch.sort_by_expert` after the routing
  argsort             the same permutation and its inverse by `jnp.argsort` twice

Beside them stand `floor`, the time to move the operands and results at the HBM
bandwidth below; `valu`, the kernel's vector operations over the four slots of a
bundle; and `vmem`, the MiB it takes. The kernel has no loops and takes no
branch on the data, so every operation of its body counts once a grid step.
"""

import concurrent.futures
import importlib.util
import json
import math
import pathlib
import re
import sys
import tempfile
from typing import Any

from absl import app, flags

from jaxroute.aot import chips, tpu

_GENERATIONS = flags.DEFINE_list(
  "generations", "v5e,v5p,v6e,v7x", "TPU generations to compile for."
)
_CASES = flags.DEFINE_list("cases", "", "Names of cases; by default all.")
_CANDIDATES = flags.DEFINE_list(
  "candidates", "", "Programs to compile; by default all that are installed."
)
_WRITE = flags.DEFINE_bool(
  "write", False, "Write the table to tpu_cycles.json."
)

TABLE = pathlib.Path(__file__).with_name("tpu_cycles.json")

# Topology, clock in GHz and HBM bandwidth in GB/s of one core's share.
TPUS = {
  "v5e": ("v5e:2x2", 1.5, 819),
  "v5p": ("v5p:2x2x1", 1.75, 2765 / 2),
  "v6e": ("v6e:2x2", 1.75, 1640),
  "v7x": ("tpu7x:2x2x1", 1.9, 7380 / 2),
}

_V3 = dict(num_groups=8, group_top_k=4)
# Name to (T, E, K, the rest of the configuration).
CASES: dict[str, tuple[int, int, int, dict[str, Any]]] = {
  "E=256 K=8": (8192, 256, 8, {}),
  "E=256 K=8 V3": (8192, 256, 8, _V3),
  "E=64 K=8": (8192, 64, 8, {}),
  "E=64 K=6 softmax": (8192, 64, 6, dict(score_fn="softmax")),
  "E=96 K=8": (8192, 96, 8, {}),
  "E=128 K=8": (8192, 128, 8, {}),
  "E=160 K=6": (8192, 160, 6, {}),
  "E=384 K=8": (8192, 384, 8, {}),
  "E=512 K=10": (8192, 512, 10, {}),
  "E=1024 K=16": (8192, 1024, 16, {}),
  "E=256 K=8 T=64": (64, 256, 8, {}),
  "E=256 K=8 T=512": (512, 256, 8, {}),
  "E=256 K=8 T=65536": (65536, 256, 8, {}),
  "E=256 K=8 V3 T=65536": (65536, 256, 8, _V3),
}

CANDIDATES = (
  *("plain", "tokamax", "jaxroute"),
  *("plain grad", "jaxroute grad"),
  *("jaxroute histogram", "project", "project fused"),
  *("argsort", "sort"),
)


def _config(case: str) -> Any:
  """The `RouterConfig` of a case."""
  import jaxroute

  _, e, k, fields = CASES[case]
  return jaxroute.RouterConfig(num_experts=e, top_k=k, **fields)


def compile_for(generation: str, case: str, candidate: str):
  """Compiles one program for a TPU that is not here.

  Args:
    generation: a key of `TPUS`.
    case: a key of `CASES`.
    candidate: a member of `CANDIDATES`.

  Returns:
    The compiled program.
  """
  import jax
  import tpu_programs

  devices = chips.devices(TPUS[generation][0])[:1]
  mesh = chips.make_mesh(devices, {"x": 1})
  whole = jax.NamedSharding(mesh, jax.P())
  config = _config(case)
  arguments = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole)
    for x in tpu_programs.shapes(CASES[case][0], config, candidate)
  ]
  function = tpu_programs.programs(config)[candidate]
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    traced = jax.jit(function).trace(*arguments)
    return traced.lower(lowering_platforms=("tpu",)).compile()


def _valu_operations(folder: pathlib.Path) -> int:
  """Vector ALU operations in the bundles of the kernel."""
  found = [
    path
    for path in folder.glob("*jaxroute_route*final_bundles.txt")
    if "schedule" not in path.name
  ]
  if not found:
    return 0
  other = re.compile(
    r"v(ld|st|xpose|rot|perm|set|pop|pow|rcp|log|tanh|rsqrt|sync|mand|mor|mneg)"
  )
  count = 0
  for line in found[0].read_text().splitlines():
    if re.match(r"\s*0x", line):
      for part in line.split("{", 1)[-1].split(";;"):
        name = re.search(r"(?:= |^ *|\d )([a-z][a-z0-9_]*)", part.strip())
        if name and name[1].startswith("v") and not other.match(name[1]):
          count += 1
  return count


def estimate(
  generation: str, case: str, candidate: str, bounds: bool = True
) -> dict[str, float]:
  """What the compiler says of one program, compiled in a process of its own.

  Args:
    generation: a key of `TPUS`.
    case: a key of `CASES`.
    candidate: a member of `CANDIDATES`.
    bounds: whether to count the kernel's operations, for `valu`.

  Returns:
    `cycles` per token, the sum over all ops; `floor` and, of the kernel, `valu`
    and `vmem`, as in the module's docstring; empty if the program, or the
    profiler of the compiler, failed.
  """
  from jaxroute.kernels.tpu.route import plan as plan_lib

  t, *_ = CASES[case]
  bounds = bounds and candidate == "jaxroute"
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    job = compile_for, generation, case, candidate
    try:
      found = tpu.profile(*job, dump_to=folder if bounds else None)
    except (NotImplementedError, RuntimeError) as error:
      print(f"{generation} {case} {candidate}: {error}", file=sys.stderr)
      return {}
    _, clock, bandwidth = TPUS[generation]
    figures = {
      "cycles": round(found.cycles / t, 3),
      "floor": round(found.moved / bandwidth * clock / t, 3),
    }
    if bounds:
      plan = plan_lib.Plan(config=_config(case), tokens=t)
      bundles = _valu_operations(folder) / 4 * plan.grid_steps
      figures["valu"] = round(bundles / t, 3)
      figures["vmem"] = round(found.vmem / 2**20, 1)
    return figures


def table(
  generations: list[str],
  cases: list[str],
  candidates: list[str],
  bounds: bool = True,
) -> dict[str, dict[str, dict[str, float]]]:
  """`estimate` of every combination, two at a time.

  Args:
    generations: keys of `TPUS`.
    cases: keys of `CASES`.
    candidates: members of `CANDIDATES`.
    bounds: as in `estimate`.

  Returns:
    "generation case" to candidate to estimate.
  """
  jobs = [(g, c, n) for g in generations for c in cases for n in candidates]
  with concurrent.futures.ThreadPoolExecutor(2) as pool:
    results = list(pool.map(lambda job: estimate(*job, bounds), jobs))
  rows: dict[str, dict[str, dict[str, float]]] = {}
  for (generation, case, candidate), result in zip(jobs, results, strict=True):
    rows.setdefault(f"{generation} {case}", {})[candidate] = result
  return rows


def main(argv: list[str]) -> None:
  del argv
  candidates = _CANDIDATES.value or list(CANDIDATES)
  if not importlib.util.find_spec("tokamax"):
    candidates = [name for name in candidates if name != "tokamax"]
  rows = table(_GENERATIONS.value, _CASES.value or list(CASES), candidates)
  bounds = ["valu", "floor", "vmem"] if "jaxroute" in candidates else []
  print(f"{'':26s}" + "".join(f"{n:>15s}" for n in (*candidates, *bounds)))
  for name, row in rows.items():
    figures = [row[c].get("cycles", math.nan) for c in candidates]
    figures += [row["jaxroute"].get(bound, math.nan) for bound in bounds]
    print(f"{name:26s}" + "".join(f"{x:15.2f}" for x in figures))
  if bounds:
    _print_worst(rows)
  if _WRITE.value:
    record(rows)


def record(rows: dict[str, dict[str, dict[str, float]]]) -> None:
  """Renews rows of `TABLE`, for the compiler that is installed.

  Args:
    rows: as `table` returns them.
  """
  known = json.loads(TABLE.read_text())
  recorded = known.setdefault(tpu.version(), {})
  for name, row in rows.items():
    worked = {key: value for key, value in row.items() if value}
    recorded[name] = recorded.get(name, {}) | worked
  TABLE.write_text(
    json.dumps(known, allow_nan=False, indent=1, sort_keys=True) + "\n"
  )


def _print_worst(rows: dict[str, dict[str, dict[str, float]]]) -> None:
  """The ten cases that are the most times over their floor."""
  found = {n: row["jaxroute"] for n, row in rows.items() if row["jaxroute"]}
  print("\nfarthest from the time to move the bytes:")
  over = {n: x["cycles"] / x["floor"] for n, x in found.items()}
  for name in sorted(over, key=over.__getitem__, reverse=True)[:10]:
    share = found[name]["valu"] / found[name]["cycles"]
    print(f"{name:26s}{over[name]:8.1f} times, VALU {share:.0%} full")


if __name__ == "__main__":
  app.run(main)
