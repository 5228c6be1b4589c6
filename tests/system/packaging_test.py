# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What is installed, and what importing it needs."""

import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Whatever of these exists must be in the sdist.
PROJECT_FILES = (
  ".ci/run",
  "BUILD",
  "CHANGELOG.md",
  "CONTRIBUTING.md",
  "LICENSE",
  "MANIFEST.in",
  "README.md",
  "WORKSPACE",
  "demo.sh",
  "pyproject.toml",
  "pytest.bzl",
  "setup.cfg",
  "test.sh",
)


def _run(*arguments, cwd=None):
  done = subprocess.run(
    [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def _sources(folder):
  # `glob` follows the link to kernels/ only when it is spelled out.
  found = [*folder.rglob("*.py"), *(folder / "kernels").rglob("*.py")]
  return {str(path.relative_to(ROOT)) for path in found}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """File lists of the sdist, the wheel of that sdist, and of the checkout."""
  clean = tmp_path_factory.mktemp("checkout") / "copy"
  unwanted = shutil.ignore_patterns(
    ".build", ".git", ".venv*", "__pycache__", "*.egg-info", "bazel-*", "dist"
  )
  shutil.copytree(ROOT, clean, symlinks=True, ignore=unwanted)
  build = ("-m", "build", "--no-isolation", "--outdir")
  # The wheel of the checkout first: the other build leaves an egg-info behind.
  _run(*build, "direct", "--wheel", ".", cwd=clean)
  _run(*build, "both", ".", cwd=clean)
  wheels = []
  for folder in ("both", "direct"):
    (wheel,) = (clean / folder).glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
      wheels.append(sorted(archive.namelist()))
  (sdist,) = (clean / "both").glob("*.tar.gz")
  with tarfile.open(sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  return names, *wheels


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(built):
  _, from_sdist, from_checkout = built
  assert from_sdist == from_checkout


def test_wheel_holds_the_package_and_nothing_else(built):
  _, wheel, _ = built
  modules = {name for name in wheel if ".dist-info/" not in name}
  assert modules == _sources(ROOT / "jaxroute")
  assert "jaxroute/kernels/__init__.py" in modules


def test_sdist_holds_everything(built):
  sdist, _, _ = built
  expected = {name for name in PROJECT_FILES if (ROOT / name).exists()}
  for folder in ("benchmarks", "examples", "jaxroute", "tests"):
    expected |= _sources(ROOT / folder)
  assert expected - sdist == set()


def test_import_needs_neither_flax_nor_matplotlib():
  _run(
    "-c",
    "import sys\n"
    "sys.modules.update(flax=None, matplotlib=None)\n"
    "import jaxroute, jaxroute.dual, jaxroute.kernels\n"
    "assert jaxroute.route",
  )
