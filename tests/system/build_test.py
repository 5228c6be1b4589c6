# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""BUILD names every source file once, and gives it the deps that it imports."""

import ast
import collections
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[1]
FOLDERS = ("benchmarks", "examples", "jaxroute", "kernels", "tests")


def _calls() -> list[tuple[str, dict]]:
  """Rule and attributes of each target; a glob is no literal, and raises."""
  tree = ast.parse((ROOT / "BUILD").read_text())
  calls = [s.value for s in tree.body if isinstance(s, ast.Expr)]
  return [
    (c.func.id, {k.arg: ast.literal_eval(k.value) for k in c.keywords})
    for c in calls
    if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)
  ]


def _targets() -> list[dict]:
  return [attributes for _, attributes in _calls() if "name" in attributes]


def _real(path: str | pathlib.Path) -> str:
  """`jaxroute/kernels/x.py` and `kernels/x.py` are one file."""
  return str((ROOT / path).resolve().relative_to(ROOT))


def _module(path: str) -> str:
  """The name that `path` is imported by."""
  parts = path.removesuffix(".py").removesuffix("/__init__").split("/")
  return ".".join(parts if parts[0] == "jaxroute" else parts[1:])


def _imports(path: str) -> set[str]:
  """Dotted names that a file imports, `from a import b` being `a.b`."""
  found = set()
  for node in ast.walk(ast.parse((ROOT / path).read_text())):
    if isinstance(node, ast.Import):
      found |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      found |= {f"{node.module}.{alias.name}" for alias in node.names}
  return found


def _owners() -> dict[str, str]:
  """Module name to the label of the target that holds it."""
  return {
    _module(path): ":" + target["name"]
    for target in _targets()
    for path in target.get("srcs", [])
  }


def _needed(target: dict) -> set[str]:
  """Labels of the modules that the files of `target` import."""
  owners = _owners()
  labels = set()
  for path in target["srcs"]:
    for name in _imports(path):
      # `a.b.c` may be module a.b.c, or the name c of module a.b.
      labels.add(owners.get(name) or owners.get(name.rpartition(".")[0]))
  parts = {v for k, v in owners.items() if k.startswith("jaxroute.")}
  if target["name"] == "jaxroute":
    # To depend on the package is to depend on all of it.
    labels |= parts
  elif ":" + target["name"] in parts:
    labels.discard(":jaxroute")
  return labels - {":" + target["name"], None}


def test_every_file_is_named_once():
  named = collections.Counter(
    _real(path) for target in _targets() for path in target.get("srcs", [])
  )
  present = {
    _real(path) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")
  }
  wrong = [f"add {path}" for path in sorted(present - set(named))]
  wrong += [
    f"remove {path}, there is no such file"
    for path in sorted(set(named) - present)
  ]
  wrong += [
    f"remove {path} from all targets but one"
    for path, count in sorted(named.items())
    if count > 1
  ]
  assert not wrong, "edit BUILD:\n  " + "\n  ".join(wrong)


def test_deps_are_the_imports():
  wrong = []
  for target in _targets():
    files = target.get("srcs", [])
    if not files or not all((ROOT / path).exists() for path in files):
      continue
    needed, deps = _needed(target), set(target.get("deps", []))
    name = target["name"]
    wrong += [f"add {d} to {name}" for d in sorted(needed - deps)]
    wrong += [f"remove {d} from {name}" for d in sorted(deps - needed)]
  assert not wrong, "edit the deps in BUILD:\n  " + "\n  ".join(wrong)


def test_targets_are_sorted_within_their_rule():
  by_rule = collections.defaultdict(list)
  for rule, attributes in _calls():
    if "name" in attributes:
      by_rule[rule].append(attributes["name"])
  for rule, names in by_rule.items():
    assert names == sorted(set(names)), f"sort the {rule} targets of BUILD"
