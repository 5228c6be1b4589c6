# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The script that looks for races: what it reads of the tool, and where it is not."""

import os
import pathlib
import sys

import gpu_racecheck
import jax
import pytest

from jaxroute.kernels.gpu import device

CLEAN = """\
ran 14 cases
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)
"""


@pytest.mark.parametrize(
  "output, count",
  (
    (CLEAN, 0),
    (CLEAN.replace("0 hazards", "3 hazards"), 3),
    ("========= ERROR SUMMARY: 12 errors\n", 12),
    ("========= COMPUTE-SANITIZER\nSegmentation fault\n", None),
  ),
)
def test_hazards_are_counted(output, count):
  assert gpu_racecheck.reported(output) == count


def _tool(folder, output, code):
  """Puts a compute-sanitizer on the path that prints and exits."""
  path = folder / "compute-sanitizer"
  path.write_text(f"#!/bin/sh\ncat <<END\n{output}END\nexit {code}\n")
  path.chmod(0o755)
  return str(path)


@pytest.mark.parametrize(
  "output, code, is_clean",
  (
    (CLEAN, 0, True),
    (CLEAN.replace("0 hazards", "3 hazards"), 99, False),
    (CLEAN, 1, False),
    ("", 0, False),
    # It watched nothing.
    (CLEAN.replace("ran 14 cases\n", ""), 0, False),
  ),
)
def test_only_a_run_that_ends_well_and_counts_none_is_clean(
  tmp_path, capsys, output, code, is_clean
):
  tool = _tool(tmp_path, output, code)
  assert gpu_racecheck.check(tool, "racecheck", "routers", 60) is is_clean
  assert f"exit code {code}" in capsys.readouterr().out


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
  monkeypatch.setenv("PATH", str(tmp_path))
  monkeypatch.setattr(pathlib.Path, "glob", lambda *_: [])
  with pytest.raises(SystemExit, match="compute-sanitizer.*CUDA toolkit"):
    gpu_racecheck.find_tool()


def test_any_report_fails_the_script(monkeypatch, tmp_path):
  tool = _tool(tmp_path, CLEAN.replace("0 hazards", "1 hazard"), 99)
  monkeypatch.setenv("PATH", str(tmp_path) + os.pathsep + os.environ["PATH"])
  assert gpu_racecheck.find_tool() == tool
  monkeypatch.setattr(sys, "argv", ["gpu_racecheck.py"])
  with pytest.raises(SystemExit, match="failed"):
    gpu_racecheck.main()


@pytest.mark.skipif(device.too_old() is not None, reason=str(device.too_old()))
def test_the_experts_are_some_that_the_kernels_take():
  out, gradients = jax.eval_shape(gpu_racecheck._experts)
  assert out.shape == (704, 256)
  assert len(jax.tree.leaves(gradients)) == 4
