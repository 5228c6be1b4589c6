# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What is installed, and what building and importing it needs."""

import concurrent.futures
import configparser
import pathlib
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest

import jaxroute

pytestmark = pytest.mark.any_jax

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What git has in place of the link where there are no links.
LINK_TEXT = "../kernels"
# Whatever of these exists must be in the sdist.
PROJECT_FILES = (
  ".ci/run",
  "*.bzl",
  "*.md",
  "*.sh",
  "BUILD",
  "CITATION.cff",
  "LICENSE",
  "MANIFEST.in",
  "MODULE.bazel",
  "WORKSPACE",
  "benchmarks/*.json",
  "benchmarks/**/*.py",
  "benchmarks/*.sh",
  "docs/**/*.md",
  "docs/**/*.png",
  "examples/**/*.md",
  "examples/**/*.py",
  "jaxroute/**/*.py",
  "jaxroute/py.typed",
  "kernels/**/*.py",
  "pyproject.toml",
  "setup.cfg",
  "tests/**/*.py",
)
# Calls a hook of PEP 517, as pip does. jax may be missing, for the version is
# read from the text of jaxroute, not imported.
BUILD_CODE = """
import sys
sys.modules["jax"] = None
from setuptools import build_meta
print(getattr(build_meta, sys.argv[1])("dist"))
"""


def _run(*arguments, cwd=None):
  done = subprocess.run(
    [sys.executable, *arguments], cwd=cwd, capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def _files(*patterns):
  """Paths of the checkout, a kernel's without the link."""
  found = {
    path.relative_to(ROOT).as_posix()
    for pattern in patterns
    for path in ROOT.glob(pattern)
  }
  return {path for path in found if not path.startswith("jaxroute/kernels/")}


def _installed(path):
  """Where a file of the checkout goes."""
  return f"jaxroute/{path}" if path.startswith("kernels/") else path


def _build(hook, tree):
  (tree / "dist").mkdir()
  name = _run("-c", BUILD_CODE, hook, cwd=tree).splitlines()[-1]
  return tree / "dist" / name


def _build_twice(tree):
  """The sdist of `tree` and the wheel of that sdist."""
  sdist = _build("build_sdist", tree)
  _run("-m", "tarfile", "--extract", sdist, tree / "unpacked")
  (unpacked,) = (tree / "unpacked").iterdir()
  return sdist, _build("build_wheel", unpacked)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
  """The sdist's names; file to checksum of the wheel built each way."""
  folder = tmp_path_factory.mktemp("built")

  def copy(name):
    unwanted = (".*_cache", ".build", ".git", ".hypothesis", ".venv*")
    unwanted += ("*.egg-info", "__pycache__", "bazel-*", "dist", "runs")
    ignore = shutil.ignore_patterns(*unwanted)
    shutil.copytree(ROOT, folder / name, symlinks=True, ignore=ignore)
    (folder / name / "jaxroute/kernels").unlink(missing_ok=True)
    return folder / name

  trees = {name: copy(name) for name in ("link", "text", "nothing", "sdist")}
  for name in ("link", "sdist"):
    (trees[name] / "jaxroute/kernels").symlink_to(LINK_TEXT)
  (trees["text"] / "jaxroute/kernels").write_text(LINK_TEXT)
  with concurrent.futures.ThreadPoolExecutor() as pool:
    both = pool.submit(_build_twice, trees.pop("sdist"))
    jobs = {
      name: pool.submit(_build, "build_wheel", tree)
      for name, tree in trees.items()
    }
  sdist, wheel = both.result()
  wheels = {"sdist": wheel} | {name: job.result() for name, job in jobs.items()}
  sums = {}
  for name, wheel in wheels.items():
    with zipfile.ZipFile(wheel) as archive:
      sums[name] = {info.filename: info.CRC for info in archive.infolist()}
  with tarfile.open(sdist) as archive:
    names = {name.partition("/")[2] for name in archive.getnames()}
  with zipfile.ZipFile(wheels["link"]) as archive:
    (metadata,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
    return names, sums, archive.read(metadata).decode()


@pytest.mark.parametrize("kernels", ["text", "nothing", "sdist"])
def test_the_wheel_is_the_same_without_the_link(built, kernels):
  _, wheels, _ = built
  assert wheels[kernels] == wheels["link"]


def test_wheel_holds_the_package_and_nothing_else(built):
  _, wheels, _ = built
  files = {name for name in wheels["link"] if ".dist-info/" not in name}
  expected = _files("jaxroute/**/*.py", "jaxroute/py.typed", "kernels/**/*.py")
  assert files == {_installed(path) for path in expected}
  assert "jaxroute/kernels/__init__.py" in files


def test_sdist_holds_everything(built):
  sdist, _, _ = built
  assert _files(*PROJECT_FILES) - sdist == set()


def test_setup_lists_every_package():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg", encoding="utf-8")
  listed = setup["options"]["packages"].split()
  files = _files("jaxroute/**/__init__.py", "kernels/**/__init__.py")
  folders = {_installed(path).removesuffix("/__init__.py") for path in files}
  packages = sorted(folder.replace("/", ".") for folder in folders)
  wanted = "\n  ".join(("packages =", *packages))
  assert listed == packages, f"write in setup.cfg:\n{wanted}"


def test_there_is_one_version(built):
  _, _, metadata = built
  assert f"\nVersion: {jaxroute.__version__}\n" in metadata
  citation = ROOT / "CITATION.cff"
  if citation.exists():
    assert f"\nversion: {jaxroute.__version__}\n" in citation.read_text()
  readme = (ROOT / "README.md").read_text()
  assert f"alpha, {jaxroute.__version__}." in readme
  assert f"version = {{{jaxroute.__version__}}}," in readme


def test_import_needs_neither_flax_nor_matplotlib():
  _run(
    "-c",
    "import sys\n"
    "sys.modules.update(flax=None, matplotlib=None)\n"
    "import jaxroute, jaxroute.dual, jaxroute.kernels\n"
    "assert jaxroute.route and 'jaxroute.aot' not in sys.modules",
  )
