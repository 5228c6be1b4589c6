# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""BUILD is written from the imports of the tree, by this file, and up to date.

  python tests/system/build_test.py --write

A file is a target of its own, named by its path. Files that import one another
are one target, named by the first of them: `import jaxroute.scores` runs
`jaxroute/__init__.py` before it, so what that imports is one target with it.
No name has a slash: rules_python names some outputs by what follows the last.
"""

import ast
import collections
import functools
import pathlib
import sys
from collections.abc import Sequence

COMMAND = "python tests/system/build_test.py --write"
ROOT = pathlib.Path(__file__).resolve().parents[2]
FOLDERS = ("benchmarks", "examples", "jaxroute", "kernels", "tests")
# The `main` of every test, which pytest.bzl adds to it.
RUNNER = "tests/run_pytest.py"
HEADER = f"""\
# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.

# Written by `{COMMAND}`; do not edit.
# jax, flax and the other packages of setup.cfg come from the interpreter that
# Bazel finds, not from targets. Kernels are named through the link
# jaxroute/kernels, the path that they are imported by.

load("@rules_python//python:defs.bzl", "py_binary", "py_library")
load(":pytest.bzl", "py_test")

package(default_visibility = ["//visibility:public"])

# What the tests of no one module may read.
filegroup(
    name = "checkout",
    srcs = glob(
        [
            "*",
            ".ci/*",
            "benchmarks/**",
            "docs/**",
            "examples/**",
            "jaxroute/**",
            "kernels/**",
            "tests/**",
        ],
        exclude = ["**/__pycache__/**"],
    ),
)
"""


class Tree:
  """The Python files below a root and what they import.

  A path is relative to the root, with slashes. That of a kernel begins with
  `jaxroute/kernels`, whether the link of that name exists or not.
  """

  def __init__(self, root: pathlib.Path):
    self.sources = {}  # path -> the file's text
    self.others = set()  # paths of files that are not Python
    for folder in FOLDERS:
      for file in sorted((root / folder).rglob("*.*")):
        path = file.relative_to(root).as_posix()
        if "/." in path or not file.is_file():
          continue
        # The link shows the files of `kernels` a second time.
        if path.startswith("jaxroute/kernels/"):
          continue
        if path.startswith("kernels/"):
          path = f"jaxroute/{path}"
        if file.suffix == ".py":
          self.sources[path] = file.read_text(encoding="utf-8")
        else:
          self.others.add(path)
    self.sources.pop(RUNNER, None)

  def packages(self, path: str) -> list[str]:
    """The `__init__.py` that run before `path` does, the innermost first."""
    found = []
    for folder in pathlib.PurePosixPath(path).parents:
      if (init := f"{folder}/__init__.py") not in self.sources:
        break
      found.append(init)
    return [init for init in found if init != path]

  def import_root(self, path: str) -> str:
    """The folder of sys.path below which `path` is a module."""
    outermost = [path, *self.packages(path)][-1]
    folder = pathlib.PurePosixPath(outermost).parent
    inside = outermost.endswith("/__init__.py")
    return str(folder.parent if inside else folder)

  def find(self, name: str, roots: list[str]) -> str | None:
    """The file of the dotted `name`, below the first of `roots` that has it."""
    for root in roots:
      stem = (pathlib.PurePosixPath(root) / name.replace(".", "/")).as_posix()
      for path in (f"{stem}.py", f"{stem}/__init__.py"):
        if path in self.sources:
          return path
    return None

  @functools.cached_property
  def roots(self) -> list[str]:
    """The folders of sys.path that modules are found in."""
    return sorted({self.import_root(path) for path in self.sources})

  def imports(self, path: str) -> set[str]:
    """The files that run when `path` is imported or its functions called."""
    own = self.import_root(path)
    # A script finds its neighbours before it finds files of other folders.
    roots = [own, *(root for root in self.roots if root != own)]
    found = set(self.packages(path))
    for name in _imported_names(self.sources[path], _package(path, own)):
      # `a.b` may be the module b of a, or a name within the module a.
      for module in (name, name.rpartition(".")[0]):
        if file := self.find(module, roots):
          found |= {file, *self.packages(file)}
          break
    if path.endswith("_test.py"):
      folders = pathlib.PurePosixPath(path).parents
      fixtures = {f"{folder}/conftest.py" for folder in folders}
      found |= fixtures & self.sources.keys()
    return found - {path}

  def data(self, path: str) -> set[str]:
    """The files beside `path` that its text names."""
    folder = pathlib.PurePosixPath(path).parent
    constants = {
      node.value
      for node in ast.walk(ast.parse(self.sources[path]))
      if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }
    return {f"{folder}/{name}" for name in constants} & self.others


def _package(path: str, root: str) -> list[str]:
  """The parts of the package that `path` is in; relative names begin there."""
  return list(pathlib.PurePosixPath(path).relative_to(root).parent.parts)


def _imported_names(text: str, package: list[str]) -> set[str]:
  """Dotted names that a file imports, `from a import b` being `a.b`.

  What is imported for type checkers alone is left out.
  """
  names = set()
  nodes = collections.deque(ast.parse(text).body)
  while nodes:
    node = nodes.popleft()
    if isinstance(node, ast.If):
      if ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        nodes.extend(node.orelse)
        continue
    nodes.extend(ast.iter_child_nodes(node))
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      above = package[: len(package) + 1 - node.level] if node.level else []
      parts = [*above, node.module] if node.module else above
      names |= {".".join((*parts, alias.name)) for alias in node.names}
  return names


def _groups(imports: dict[str, set[str]]) -> dict[str, tuple[str, ...]]:
  """Every file's group: the files that it reaches and that reach it."""
  reached = {}
  for path in imports:
    found, new = {path}, [path]
    while new:
      ahead = imports[new.pop()] - found
      found |= ahead
      new.extend(ahead)
    reached[path] = found
  return {
    path: tuple(sorted(other for other in ahead if path in reached[other]))
    for path, ahead in reached.items()
  }


def _name(group: tuple[str, ...]) -> str:
  """`a_b` for a/b.py and `a` for a/__init__.py, of the file nearest the root."""
  first = min(group, key=lambda path: (path.count("/"), path))
  return first.removesuffix(".py").removesuffix("/__init__").replace("/", "_")


def _rule(group: tuple[str, ...], tree: Tree) -> str:
  if len(group) == 1:
    (path,) = group
    if path.startswith("tests/") and path.endswith("_test.py"):
      return "py_test"
    if 'if __name__ == "__main__":' in tree.sources[path]:
      return "py_binary"
  return "py_library"


def _attribute(name: str, values: Sequence[str]) -> str:
  if not values:
    return ""
  if len(values) == 1:
    return f'    {name} = ["{values[0]}"],\n'
  lines = "".join(f'        "{value}",\n' for value in values)
  return f"    {name} = [\n{lines}    ],\n"


def build_file(root: pathlib.Path) -> str:
  """What BUILD should hold for the files below `root`."""
  tree = Tree(root)
  imports = {path: tree.imports(path) for path in tree.sources}
  groups = _groups(imports)
  targets = []
  for group in set(groups.values()):
    rule, name = _rule(group, tree), _name(group)
    data = set().union(*(tree.data(path) for path in group))
    if group[0].startswith("tests/system/"):
      data.add(":checkout")
    needed = set().union(*(imports[path] for path in group)) - set(group)
    lines = [
      f'    name = "{name}",\n',
      _attribute("srcs", group),
      _attribute("data", sorted(data)),
    ]
    if rule != "py_test":
      lines.append(_attribute("imports", [tree.import_root(group[0])]))
    if rule == "py_binary":
      lines.append(f'    main = "{group[0]}",\n')
    deps = sorted({f":{_name(groups[path])}" for path in needed})
    lines.append(_attribute("deps", deps))
    targets.append((rule, name, f"{rule}(\n{''.join(lines)})\n"))
  order = ("py_library", "py_binary", "py_test")
  targets.sort(key=lambda target: (order.index(target[0]), target[1]))
  names = [name for _, name, _ in targets]
  if twice := {name for name in names if names.count(name) > 1}:
    raise ValueError(f"expected targets of different names, got {twice} twice")
  return "\n".join((HEADER, *(text for _, _, text in targets)))


def test_build_is_what_the_command_writes():
  text = (ROOT / "BUILD").read_text(encoding="utf-8")
  assert text == build_file(ROOT), f"run `{COMMAND}`"


def _targets(root: pathlib.Path, files: dict[str, str]) -> dict[str, dict]:
  """Writes `files` below `root`; rule and attributes of each target's name."""
  for path, text in files.items():
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(text)
  targets = {}
  for node in ast.walk(ast.parse(build_file(root))):
    if isinstance(node, ast.Call) and node.func.id.startswith("py_"):
      values = {k.arg: ast.literal_eval(k.value) for k in node.keywords}
      name = values.pop("name")
      targets[name] = values | {"rule": node.func.id}
  return targets


def test_a_package_that_imports_its_parts_is_one_target(tmp_path):
  targets = _targets(
    tmp_path,
    {
      "jaxroute/__init__.py": "from jaxroute import routing\n",
      "jaxroute/linen.py": "from jaxroute.routing.api import route\n",
      "jaxroute/plot.py": "import types\n",
      "jaxroute/types.py": "",
      "jaxroute/routing/__init__.py": "from .api import route\n",
      "jaxroute/routing/api.py": "from ..kernels.tpu import sort\n",
      "kernels/__init__.py": "",
      "kernels/tpu/__init__.py": "",
      "kernels/tpu/sort.py": "",
    },
  )
  assert targets["jaxroute"]["srcs"] == [
    "jaxroute/__init__.py",
    "jaxroute/kernels/__init__.py",
    "jaxroute/kernels/tpu/__init__.py",
    "jaxroute/kernels/tpu/sort.py",
    "jaxroute/routing/__init__.py",
    "jaxroute/routing/api.py",
  ]
  assert "deps" not in targets["jaxroute"]
  assert targets["jaxroute_linen"]["deps"] == [":jaxroute"]
  # `import types` is that of Python also beside a file types.py.
  assert targets["jaxroute_plot"]["deps"] == [":jaxroute"]


def test_neighbours_fixtures_and_data_are_found(tmp_path):
  targets = _targets(
    tmp_path,
    {
      "benchmarks/config.py": "",
      "examples/lm/config.py": "",
      "examples/lm/train.py": (
        "from typing import TYPE_CHECKING\n"
        "import config\n"
        "if TYPE_CHECKING:\n  import report\n"
        'open("table.json")\n'
        'if __name__ == "__main__":\n  pass\n'
      ),
      "examples/lm/report.py": "def f():\n  import train\n",
      "examples/lm/table.json": "",
      "tests/conftest.py": "",
      "tests/run_pytest.py": "",
      "tests/system/train_test.py": "import json, train\n",
    },
  )
  assert targets["examples_lm_train"] == {
    "rule": "py_binary",
    "srcs": ["examples/lm/train.py"],
    "data": ["examples/lm/table.json"],
    "imports": ["examples/lm"],
    "main": "examples/lm/train.py",
    "deps": [":examples_lm_config"],
  }
  assert targets["examples_lm_report"]["deps"] == [":examples_lm_train"]
  assert targets["tests_system_train_test"] == {
    "rule": "py_test",
    "srcs": ["tests/system/train_test.py"],
    "data": [":checkout"],
    "deps": [":examples_lm_train", ":tests_conftest"],
  }


if __name__ == "__main__":
  if sys.argv[1:] != ["--write"]:
    sys.exit(f"usage: {COMMAND}")
  (ROOT / "BUILD").write_text(build_file(ROOT), encoding="utf-8", newline="\n")
