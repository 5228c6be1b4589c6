# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What the host does to launch a Mosaic GPU kernel, from the compiler's log.

It is straight code of MLIR's LLVM dialect: it loads the addresses of operands, makes
tensor maps, and passes both to the kernel.
"""

import dataclasses
import re
from typing import Any

from ptx.transfers import TensorMap

TMA_BYTES = 128
_SIZES = {"ptr": 8, "i64": 8, "i32": 4, "i8": 1}
_HEAP = 1 << 20


@dataclasses.dataclass(frozen=True)
class Call:
  """A launch.

  Attributes:
    grid: blocks.
    cluster: blocks of a cluster.
    shared_bytes: dynamic shared memory of a block.
    params: an address, or a tuple of `TensorMap`s, for every parameter.
  """

  grid: tuple[int, int, int]
  cluster: tuple[int, int, int]
  shared_bytes: int
  params: tuple[int | tuple[TensorMap, ...], ...]


def launch(log: str, name: str, buffers: list[int]) -> Call:
  """Runs the host's function.

  Args:
    log: what Mosaic GPU writes of the last of its passes.
    name: of the kernel's entry.
    buffers: addresses of operands and results.

  Returns:
    How it launches the kernel.
  """
  function = name.removesuffix("_kernel")
  found = re.search(
    rf"^  llvm\.func @{function}\((.*?)\n(.*?)^  \}}",
    log,
    re.DOTALL | re.MULTILINE,
  )
  assert found is not None, function
  # The last argument of the function is where the addresses are.
  argument = re.findall(r"(%\w+): !llvm\.ptr", found[1])[-1]
  return _Host(buffers, argument).run(found[2])


class _Host:
  """Values by name, and memory by address."""

  def __init__(self, buffers: list[int], argument: str):
    self._memory: dict[int, Any] = {8 * i: b for i, b in enumerate(buffers)}
    self._values: dict[str, Any] = {argument: 0}
    self._free = _HEAP
    self._call: Call | None = None

  def run(self, body: str) -> Call:
    for line in body.splitlines():
      line = re.sub(r" loc\(.*$", "", line.strip())
      target, equals, operation = line.partition(" = ")
      if not equals or not target.startswith("%"):
        target, operation = "", line
      if operation:
        value = self._do(operation)
        self._values[target] = value
    assert self._call is not None
    return self._call

  def _do(self, operation: str) -> Any:
    name, _, rest = operation.partition(" ")
    if call := re.match(r"llvm\.call @(\w+)\((.*?)\)", operation):
      return self._run_call(call[1], [self._get(x) for x in call[2].split(",")])
    if constant := re.match(r"llvm\.mlir\.constant\((-?\d+) : ", operation):
      return int(constant[1])
    if name in ("llvm.mlir.undef", "llvm.mlir.poison"):
      return {}
    names = re.findall(r"%\w+", rest)
    operands = [self._values[x] for x in names if x in self._values]
    if name == "llvm.alloca":
      self._free += 4096
      return self._free
    if name == "llvm.load":
      is_copy = operation.endswith(" x i8>")
      return self._maps(operands[0]) if is_copy else self._memory[operands[0]]
    if name == "llvm.store":
      self._memory[operands[1]] = operands[0]
      return None
    if name == "llvm.getelementptr":
      return self._element(rest)
    if name == "llvm.insertvalue":
      return operands[1] | {_place(rest): operands[0]}
    if name == "llvm.extractvalue":
      return operands[0][_place(rest)]
    if name in ("llvm.add", "llvm.mul"):
      a, b = operands
      return a + b if name == "llvm.add" else a * b
    if name in (
      "builtin.unrealized_conversion_cast",
      "llvm.ptrtoint",
      "llvm.inttoptr",
      "llvm.trunc",
      "llvm.sext",
      "llvm.zext",
    ):
      return operands[0]
    if name == "llvm.return":
      return None
    raise NotImplementedError(f"no meaning is known of {operation!r}")

  def _get(self, name: str) -> Any:
    return self._values.get(name.strip(), None)

  def _element(self, rest: str) -> int:
    base, indices, kind = re.search(
      r"(%\w+)\[(.*?)\] : \(.*?\) -> !llvm\.ptr, (.*)$", rest
    ).groups()
    steps = [
      int(i) if i.lstrip("-").isdigit() else self._get(i)
      for i in indices.split(", ")
    ]
    address = self._values[base] + steps[0] * _size(kind)
    if len(steps) > 1:
      address += sum(map(_size, _fields(kind)[: steps[1]]))
    return address

  def _maps(self, address: int) -> tuple[TensorMap, ...]:
    """The tensor maps that lie side by side from there on."""
    maps: list[TensorMap] = []
    while isinstance(found := self._memory.get(address), TensorMap):
      maps.append(found)
      address += TMA_BYTES
    return tuple(maps)

  def _run_call(self, name: str, arguments: list[Any]) -> Any:
    if name == "mosaic_gpu_init_tma_desc":
      to, base, kind, rank, sizes, strides, swizzle, box = arguments
      self._memory[to] = TensorMap(
        base=base,
        kind=kind,
        swizzle=swizzle,
        **{
          key: tuple(self._memory[at + 8 * i] for i in range(rank))
          for key, at in (("sizes", sizes), ("strides", strides), ("box", box))
        },
      )
      return None
    if name in ("mosaic_gpu_build_kernel_spec", "mosaic_gpu_launch_kernel"):
      pointers = arguments[13]
      params = []
      while (at := pointers + 8 * len(params)) in self._memory:
        at = self._memory[at]
        params.append(self._maps(at) or self._memory[at])
      self._call = Call(
        tuple(arguments[1:4]),
        tuple(arguments[4:7]),
        arguments[10],
        tuple(params),
      )
      return 0
    raise NotImplementedError(f"no meaning is known of a call of {name}")


def _fields(kind: str) -> list[str]:
  inner = kind[kind.index("(") + 1 : kind.rindex(")")]
  return [x.strip() for x in re.findall(r"(?:[^,<]|<[^>]*>)+", inner)]


def _size(kind: str) -> int:
  kind = kind.removeprefix("!llvm.").strip()
  if kind.startswith("struct"):
    return sum(map(_size, _fields(kind)))
  if array := re.match(r"array<(\d+) x (.*)>$", kind):
    return int(array[1]) * _size(array[2])
  return _SIZES[kind]


def _place(rest: str) -> tuple[int, ...]:
  return tuple(map(int, re.search(r"\[([\d, ]+)\]", rest)[1].split(",")))
