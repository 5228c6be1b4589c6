# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The collectives of a compiled program: over which axes, how often, how much."""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator, Mapping

import numpy as np

_OPS = (
  *("ragged-all-to-all", "all-to-all", "all-gather", "all-reduce"),
  *("reduce-scatter", "collective-permute", "collective-broadcast"),
)
_BITS = {"pred": 8, "bf16": 16, "u4": 4, "s4": 4}

# The name, shape, operation, operands and attributes of an instruction.
_INSTRUCTION = re.compile(
  r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+)"
  r" (?P<op>[a-z][\w\-]*)\((?P<operands>.*?)\)(?P<rest>,.*|)$",
  re.MULTILINE,
)
_COMPUTATION = re.compile(
  r"^(?:ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$\n(?P<body>(?:.*\n)*?)^\}",
  re.MULTILINE,
)
_CALLED = re.compile(
  r"(?:calls|to_apply|body|condition|branch_computations)=\{?((?:%?[\w.\-]+(?:, )?)+)"
)


@dataclasses.dataclass(frozen=True)
class Collective:
  """Collectives of one kind in a program.

  Attributes:
    op: "all-gather" and so on, as XLA calls them.
    axes: of the mesh, that devices have to differ in to take part in one.
    arrays: what a device holds of it, the larger of what comes and what goes; of
      a "ragged-all-to-all" the smaller, as its rows are sent once.
    count: of them. In a loop, as of the rounds of an exchange, one counts once.
    bytes: of `arrays`, of all `count`.
    in_loop: whether they are in one.
  """

  op: str
  axes: tuple[str, ...]
  arrays: str
  count: int
  bytes: int
  in_loop: bool

  def sent(self, group: int) -> float:
    """Bytes that a device has to send at least, to others of its group.

    Args:
      group: the devices of one collective.

    Returns:
      Bytes of all `count`.
    """
    times = 2 if self.op == "all-reduce" else 1
    share = 1 if self.op.startswith("collective") else (group - 1) / group
    return times * share * self.bytes


def read(text: str, mesh: Mapping[str, int]) -> list[Collective]:
  """Reads the collectives of a compiled program.

  Args:
    text: the program, as `jax.stages.Compiled.as_text` has it.
    mesh: axes and their sizes, in order.

  Returns:
    Collectives, those of the most bytes first.
  """
  bodies = {m["name"]: m["body"] for m in _COMPUTATION.finditer(text)}
  looped = _looped(bodies)
  found: collections.Counter[tuple] = collections.Counter()
  sizes = {}
  for name, body in bodies.items():
    # The TPU compiler writes a reduce-scatter as an all-reduce in a fusion.
    is_scatter = name.startswith("all-reduce-scatter")
    for op, axes, arrays in _collectives(body, mesh):
      if is_scatter and op == "all-reduce":
        op = "reduce-scatter"
      key = op, axes, ", ".join(f"{d}[{s}]" for d, s in arrays), name in looped
      found[key] += 1
      sizes[key] = sum(_bytes(*array) for array in arrays)
  every = [
    Collective(op, axes, arrays, count, count * sizes[key], in_loop)
    for key, count in found.items()
    for op, axes, arrays, in_loop in [key]
    if axes
  ]
  return sorted(every, key=lambda c: (-c.bytes, c.op, c.axes, c.arrays))


def _looped(bodies: dict[str, str]) -> set[str]:
  """Computations that run in a loop."""
  called, new = {}, []
  for name, body in bodies.items():
    called[name] = [
      other.strip("% ")
      for names in _CALLED.findall(body)
      for other in names.split(",")
    ]
    new += re.findall(r"\bbody=%?([\w.\-]+)", body)
  found: set[str] = set()
  while new:
    name = new.pop()
    if name in bodies and name not in found:
      found.add(name)
      new += called[name]
  return found


def _collectives(
  body: str, mesh: Mapping[str, int]
) -> Iterator[tuple[str, tuple[str, ...], list[tuple[str, str]]]]:
  """Operation, axes and arrays of each collective of a computation."""
  shapes = {m["name"]: m["shape"] for m in _INSTRUCTION.finditer(body)}
  for m in _INSTRUCTION.finditer(body):
    op = m["op"].removesuffix("-start")
    if op not in _OPS:
      continue
    axes, group = _axes(m["rest"], mesh)
    # An operand stands with its shape or, in newer versions, as a name alone.
    operands = [
      _arrays(shapes[name] if name in shapes else operand)
      for operand in re.split(r", (?=%|\w+\[)", m["operands"])
      for name in [operand.split("%")[-1]]
    ]
    if op == "ragged-all-to-all":
      arrays = min(operands[:2], key=lambda a: sum(_bytes(*x) for x in a))
    else:
      arrays = [array for operand in operands for array in operand]
    if op == "all-gather":
      arrays = [(dtype, _gathered(shape, m, group)) for dtype, shape in arrays]
    yield op, axes, arrays


def _gathered(shape: str, m: re.Match[str], group: int) -> str:
  """The shape of all parts of an all-gather."""
  sizes = shape.split(",")
  along = re.search(r"dimensions=\{(\d+)\}", m["rest"])
  assert along is not None, m[0]
  sizes[int(along[1])] = str(int(sizes[int(along[1])]) * group)
  return ",".join(sizes)


def _arrays(text: str) -> list[tuple[str, str]]:
  """Dtype and sizes of each array in a shape."""
  text = re.sub(r"\{[^{}]*\}", "", text)
  return re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", text)


def _bytes(dtype: str, shape: str) -> int:
  bits = _BITS.get(dtype) or int(re.sub(r"^[a-z]+(\d+).*", r"\1", dtype))
  return math.prod(int(n) for n in shape.split(",") if n) * bits // 8


def _axes(
  attributes: str, mesh: Mapping[str, int]
) -> tuple[tuple[str, ...], int]:
  """The axes that the devices of a group differ in, and how many they are."""
  groups = _groups(attributes, math.prod(mesh.values()))
  at = np.stack(np.unravel_index(groups, tuple(mesh.values())), axis=-1)
  differs = np.any(at != at[:, :1], axis=(0, 1))
  axes = tuple(a for a, yes in zip(mesh, differs, strict=True) if yes)
  return axes, groups.shape[1]


def _groups(attributes: str, devices: int) -> np.ndarray:
  """`[groups, devices of each]`, by their place in the mesh."""
  # The compiler's own mesh: its axes have the names of ours, or "axis_0" and so on.
  if found := re.search(
    r"replica_groups=mesh\[([^]]*)\] \{((?:'\w+',?)+)\}", attributes
  ):
    sizes = {n: int(size) for n, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    over = re.findall(r"'(\w+)'", found[2])
    order = sorted(sizes, key=lambda name: name in over)
    ids = np.arange(devices).reshape(tuple(sizes.values()))
    ids = ids.transpose([list(sizes).index(name) for name in order])
    return ids.reshape(-1, math.prod(sizes[name] for name in over))
  assert "replica_groups=mesh" not in attributes, attributes
  if found := re.search(
    r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes
  ):
    shape, sizes, order = (
      [int(n) for n in part.split(",")] if part else []
      for part in found.groups()
    )
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return (ids.transpose(order) if order else ids).reshape(shape)
  found = re.search(
    r"(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]+\},?)+)\}",
    attributes,
  )
  if found is None:  # all of them
    return np.arange(devices)[None]
  return np.array(
    [
      [int(n) for n in group.split(",")]
      for group in re.findall(r"\{([\d,]+)\}", found[1])
    ]
  )
