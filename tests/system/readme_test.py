# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The pages for readers: their snippets run, their links and tests exist."""

import ast
import os
import pathlib
import re
import shlex
import subprocess
import sys

import command
import jax
import pytest
from absl import flags

import jaxroute

_ROOT = pathlib.Path(__file__).parents[2]
_README = _ROOT / "README.md"
_PAGES = sorted((*_ROOT.glob("*.md"), *(_ROOT / "docs").glob("*.md")))
_SNIPPETS = [
  pytest.param(code, id=f"{page.name}-{number}")
  for page in _PAGES
  if page.name != "CONTRIBUTING.md"  # shows a form to fill in
  for number, code in enumerate(
    re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
  )
]


@pytest.mark.implicit_promotion  # a user's session is not strict
@pytest.mark.parametrize("code", _SNIPPETS)
def test_every_snippet_runs_as_pasted(code, capsys, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with jax.numpy_rank_promotion("allow"):
    exec(compile(code, "snippet", "exec"), {})
  assert not list(tmp_path.iterdir())
  if "print(max_vio)" in code:  # of a rule that balances within five steps
    first, *_, last = map(float, capsys.readouterr().out.split())
    assert last < first / 5


def test_the_readme_s_snippets_run_on_a_newcomer_s_machine(tmp_path):
  """In a process of their own, on one device, with nothing of these tests set."""
  environment = {
    name: value
    for name, value in os.environ.items()
    if not name.startswith(("JAX_", "TPU_")) and name != "XLA_FLAGS"
  }
  environment["JAX_PLATFORMS"] = "cpu"
  code = "\n".join(
    f"exec(compile({p.values[0]!r}, {p.id!r}, 'exec'), {{}})"
    for p in _SNIPPETS
    if p.id.startswith("README")
  )
  done = subprocess.run(
    [sys.executable, "-c", code],
    capture_output=True,
    cwd=tmp_path,
    env=environment,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert 0 < float(done.stdout) < 2  # the first snippet prints a MaxVio


@pytest.mark.parametrize("code", _SNIPPETS)
def test_every_step_of_a_snippet_is_jitted(code):
  for node in ast.parse(code).body:
    if re.search(r"jaxroute\.(nnx\.)?(train_step|update)\(", ast.unparse(node)):
      assert isinstance(node, ast.FunctionDef)
      assert "jit" in " ".join(map(ast.unparse, node.decorator_list))


def test_one_snippet_shows_a_rule_that_balances():
  assert sum("print(max_vio)" in p.values[0] for p in _SNIPPETS) == 1


def test_the_readme_is_short():
  assert len(_README.read_text().split()) <= 900


@pytest.mark.parametrize("page", _PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_leads_to_one(page):
  links = re.findall(r"\]\(([^)#\s]+)[^)\s]*\)", page.read_text())
  files = [link for link in links if "://" not in link]
  missing = [link for link in files if not (page.parent / link).exists()]
  assert not missing


def _commands():
  """The commands of pages and docstrings that run a script of the project."""
  texts = [page.read_text() for page in _PAGES]
  for folder in ("examples", "benchmarks"):
    texts += [
      ast.get_docstring(ast.parse(p.read_text())) or ""
      for p in sorted((_ROOT / folder).rglob("*.py"))
    ]
  script = r"(?:python |\./)((?:examples|benchmarks)/\S+\.py|\w+\.sh)"
  for text in texts:
    text = re.sub(r"\\\n", " ", text)
    for found in re.finditer(script + r"([^\n`#]*)", text):
      yield found[1], tuple(shlex.split(found[2]))


def _flags(script):
  """The names of the flags that a script defines, or one beside it that it takes."""
  path = _ROOT / ("tests/conftest.py" if script == "test.sh" else script)
  text = path.read_text()
  for name in re.findall(r"^import (\w+)$", text, flags=re.MULTILINE):
    beside = path.with_name(f"{name}.py")
    text += beside.read_text() if beside.exists() else ""
  return set(
    re.findall(
      r"(?:DEFINE_\w+|addoption|add_argument)\(\s*\"(?:--)?(\w+)", text
    )
  )


@pytest.mark.parametrize("script, arguments", sorted(set(_commands())))
def test_every_command_names_a_script_and_its_flags(script, arguments):
  assert (_ROOT / script).exists()
  if script in ("demo.sh", "examples/lm/train.py"):
    values = flags.FlagValues()
    command.define_flags(values)
    assert values([script, *arguments]) == [script]
    assert command.from_flags(values)
  else:
    given = [re.match(r"--(\w+)", a) for a in arguments]
    assert {g[1] for g in given if g} <= _flags(script)


def test_commands_are_found():
  scripts = {script for script, _ in _commands()}
  assert {"demo.sh", "test.sh", "examples/lm/train.py"} < scripts
  assert ("demo.sh", ("--rule=none,proportional",)) in set(_commands())


def test_the_tests_that_pages_name_exist():
  tests = "".join(p.read_text() for p in (_ROOT / "tests").rglob("*_test.py"))
  text = "".join(page.read_text() for page in _PAGES)
  named = set(re.findall(r"`(test_\w+)`", text))
  assert len(named) > 15
  missing = [name for name in sorted(named) if f"def {name}(" not in tests]
  assert not missing


def test_every_public_name_is_documented():
  for name in jaxroute.__all__:
    assert getattr(jaxroute, name).__doc__, name


def _paths_of_the_map():
  """The Python files that the tree of docs/architecture.md shows."""
  page = (_ROOT / "docs" / "architecture.md").read_text()
  tree = page.split("## The tree")[1].split("```")[1]
  paths, folders = set(), []
  for line in tree.splitlines():
    name = line.strip().split(" ")[0]
    depth = (len(line) - len(line.lstrip())) // 2
    if name.endswith("/"):
      folders[depth:] = [name.rstrip("/")]
    folder = "/".join(folders[:depth] if name.endswith(".py") else folders)
    paths |= {f"{folder}/{file}" for file in re.findall(r"[\w]+\.py\b", line)}
  return paths


def test_the_map_is_the_tree():
  there = {
    str(path.relative_to(_ROOT))
    for folder in ("jaxroute", "kernels")
    for path in (_ROOT / folder).rglob("*.py")
    if not str(path.relative_to(_ROOT)).startswith("jaxroute/kernels")
  }
  there = {path for path in there if not path.endswith("/__init__.py")}
  shown = {
    path
    for path in _paths_of_the_map()
    if path.startswith(("jaxroute/", "kernels/"))
    and not path.endswith("/__init__.py")
  }
  assert len(there) > 40
  assert shown == there
