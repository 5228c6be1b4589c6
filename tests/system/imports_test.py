# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Imports point one way, as docs/architecture.md says."""

import ast
import pathlib
import subprocess
import sys

import pytest

pytestmark = pytest.mark.any_jax

_ROOT = pathlib.Path(__file__).parents[2]
_OPERATIONS = ("routing", "dispatch", "experts")
_BELOW = {
  "types",
  "scores",
  "remat",
  "ladder",
  "multilinear",
  "parallel",
  "kernels",
}
_LAYERS = {"types", "parallel", "layer", "routing", "experts"}
_CALLS_ROUTE = {"types", "routing", "scores", "metrics"}
# The part of a file's path below jaxroute to the parts that it may import, besides
# `checks`.
_ALLOWED = {
  "checks": set(),
  "partition": set(),
  "types": {"partition"},
  "kernels": {"types", "kernels"},
  "parallel": {"types", "parallel"},
  "ladder": {"parallel"},
  "multilinear": set(),
  "scores": {"types"},
  "remat": set(),
  **{name: _BELOW | {name} for name in _OPERATIONS},
  "layer": {"types", "ladder", "parallel", "remat", *_OPERATIONS},
  "linen": {*_LAYERS, "counts", "train"},
  "nnx": {*_LAYERS, "nnx_step"},
  "nnx_step": {"types", "micro_batches", "step", "train"},
  "metrics": {"types"},
  "counts": {"types"},
  "micro_batches": {"types"},
  "step": {"types", "metrics", "counts", "parallel"},
  "train": {"types", "metrics", "counts", "micro_batches", "step"},
  "losses": {"types", "metrics", "routing", "scores", "parallel"},
  "linear_program": set(),
  "rounding": {"types", "routing", "parallel"},
  "assignment": {"metrics", "rounding", "linear_program"},
  "dual": {*_CALLS_ROUTE, "dual", "assignment", "rounding", "parallel"},
  "plot": set(),
  "presets": {"types"},
  "aot": {"aot", "types", "presets", "routing", "experts", "layer"},
}


def _parts(path):
  """The parts of the package that a file imports."""
  found = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name.split(".") for alias in node.names]
      found |= {".".join(n) for n in names if n[0] == "jaxroute"}
    elif isinstance(node, ast.ImportFrom) and node.module == "jaxroute":
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      package, *rest = node.module.split(".")
      found |= {rest[0]} if package == "jaxroute" and rest else set()
  return found


@pytest.mark.parametrize("part", _ALLOWED)
def test_a_part_imports_what_is_below_it(part):
  folder = _ROOT if part == "kernels" else _ROOT / "jaxroute"
  files = [*(folder / part).rglob("*.py"), folder / f"{part}.py"]
  files = [path for path in files if path.is_file()]
  assert files
  for path in files:
    assert _parts(path) <= _ALLOWED[part] | {"checks"}, path


def test_every_part_is_held_to_it():
  paths = [*(_ROOT / "jaxroute").iterdir(), _ROOT / "kernels"]
  parts = {
    path.stem
    for path in paths
    if path.suffix == ".py" or (path / "__init__.py").exists()
  }
  assert parts - {"__init__"} == set(_ALLOWED)


def test_the_package_loads_no_kernel_of_a_gpu():
  # Where Mosaic GPU is missing or has changed, CPUs and TPUs have no need of it.
  code = """if True:
    import sys, jaxroute, jaxroute.linen, jaxroute.nnx
    found = "jaxroute.kernels.gpu.threads", "jax.experimental.mosaic.gpu"
    assert not [name for name in found if name in sys.modules]
  """
  subprocess.run([sys.executable, "-c", code], check=True)
