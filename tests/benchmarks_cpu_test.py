# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The scripts that time programs on a CPU still run, and print their tables."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

pytestmark = [
  pytest.mark.any_jax,
  pytest.mark.cpu("it times programs of a CPU"),
]

ROOT = pathlib.Path(__file__).resolve().parents[1]

# Run apart, for it defines flags; by one solver, for each is compiled.
DUAL = """
import sys
sys.path.insert(0, "benchmarks")
import dual
from absl import app
one = "alternating quantiles"
dual.SOLVERS = {one: dual.SOLVERS[one]}
app.run(dual.main)
"""


def _output_of(*arguments):
  done = subprocess.run(
    [sys.executable, *arguments],
    capture_output=True,
    cwd=ROOT,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    text=True,
  )
  assert done.returncode == 0, done.stderr
  return done.stdout


def test_solvers_of_the_dual():
  flags = "--tokens=64", "--iterations=16", "--highs_seconds=60"
  lines = _output_of("-c", DUAL, *flags).splitlines()
  assert sum("HiGHS, all 4,096 variables" in line for line in lines) == 2
  rows = [line for line in lines if line.startswith("  alternating")]
  assert len(rows) == 2
  for row in rows:
    gap = re.search(r" (\d\.\de[-+]\d\d)  ", row)
    assert gap and 0 < float(gap[1]) < 0.05, row


@pytest.mark.parametrize(
  ("section", "titles"),
  (
    ("routing", ["Routing", "Routing"]),
    pytest.param(
      *("histogram", ["Histograms", "Histograms"]), marks=pytest.mark.long
    ),
    pytest.param(
      *("matmul", ["Grouped matmul", "Grouped matmul"]), marks=pytest.mark.long
    ),
    pytest.param(
      *("layer", ["MoE layer", "MoE layer"]), marks=pytest.mark.long
    ),
  ),
)
def test_sections_of_the_cpu(section, titles):
  output = _output_of(
    "benchmarks/cpu.py", f"--section={section}", "--repeats=1"
  )
  found = [
    line for line in output.splitlines() if " T=" in line or " N=" in line
  ]
  assert [title.split(",")[0] for title in found] == titles


@pytest.mark.long
def test_a_step_on_meshes():
  sizes = "--tokens=64", "--width=32", "--hidden=32", "--repeats=1"
  output = _output_of("benchmarks/mesh.py", *sizes)
  rows = [line for line in output.splitlines() if line.startswith("  data=")]
  assert len(rows) == 5
