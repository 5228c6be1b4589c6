# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The copy engine of Hopper: boxes of tensors to shared memory and back."""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import program
from ptx.memory import SHARED_BASE, Fault

if TYPE_CHECKING:
  from ptx.machine import Block, Warp

# By Mosaic GPU's number of a type: integers of 4 and 8 bits, and so on.
_BYTES = {1: 1, 2: 2, 3: 4, 4: 8, 5: 2, 6: 4, 7: 2, 9: 4, 10: 8}


@dataclasses.dataclass(frozen=True)
class TensorMap:
  """An array in global memory, and the box of it that is copied at once.

  Attributes:
    base: its address.
    kind: Mosaic GPU's number of the element type.
    sizes: of the array, the last dimension varying fastest.
    strides: of the array, in elements.
    box: sizes of the box.
    swizzle: 16 for none, or 32, 64 or 128 bytes.
  """

  base: int
  kind: int
  sizes: tuple[int, ...]
  strides: tuple[int, ...]
  box: tuple[int, ...]
  swizzle: int

  @property
  def element_bytes(self) -> int:
    """Of an element."""
    return _BYTES[self.kind]

  @property
  def box_bytes(self) -> int:
    """Of a box in shared memory."""
    return int(np.prod(self.box)) * self.element_bytes

  def places(self, corner: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Offsets in bytes of a box's elements, and which of them are in the array.

    Args:
      corner: of the box, the first dimension first.

    Returns:
      Two arrays of as many elements as the box, in the order of shared memory.
    """
    offset = np.zeros(self.box, np.int64)
    inside = np.ones(self.box, bool)
    for axis, (start, stride, size, length) in enumerate(
      zip(corner, self.strides, self.sizes, self.box, strict=True)
    ):
      shape = [-1 if a == axis else 1 for a in range(len(self.box))]
      at = (start + np.arange(length)).reshape(shape)
      offset += at * stride
      inside &= (at >= 0) & (at < size)
    return offset.reshape(-1) * self.element_bytes, inside.reshape(-1)


def swizzle(address: np.ndarray, size: int) -> np.ndarray:
  """Where shared memory keeps what a plain layout has at an address."""
  if size == 16:
    return address
  mask = size // 16 - 1
  return address ^ (((address >> 7) & mask) << 4)


class Queue:
  """Work that a warp has begun, in groups; it is done when the warp waits."""

  def __init__(self):
    self.committed = 0  # groups
    self._done = 0
    self._open: list[Callable[[], None]] = []
    self._groups: list[list[Callable[[], None]]] = []

  def add(self, work: Callable[[], None]) -> None:
    """Begins some."""
    self._open.append(work)

  def commit(self) -> None:
    """Makes a group of what was begun."""
    self._groups.append(self._open)
    self._open = []
    self.committed += 1

  def wait(self, pending: int) -> None:
    """Ends all groups but the last so many."""
    self.end(self.committed - pending)

  def end(self, groups: int) -> None:
    """Ends the first groups, so many of all there ever were."""
    while self._done < groups:
      for work in self._groups.pop(0):
        work()
      self._done += 1


def copy(i: program.Instruction) -> Any:
  """`cp.async.bulk.tensor`, either way."""
  to_shared = (
    "shared::cta.global" in i.name or "shared::cluster.global" in i.name
  )
  return (_to_shared if to_shared else _to_global)(i)


def _parse(operand: str) -> tuple[str, list[str]]:
  name, corner = re.fullmatch(r"\[(%\w+),\s*\{(.*)\}\s*\]", operand).groups()
  # PTX has the fastest dimension first.
  return name, [x.strip() for x in corner.split(",")][::-1]


def _find(warp: "Warp", operand: str, lane: int) -> tuple[TensorMap, list[int]]:
  name, corner = _parse(operand)
  address = int(warp.value(name, np.uint64)[lane])
  if address not in warp.block.launch.maps:
    raise Fault(f"there is no tensor map at {address:#x}")
  found = [int(warp.value(x, np.int32)[lane]) for x in corner]
  return warp.block.launch.maps[address], found


def _shared_places(tensor: TensorMap, address: int) -> np.ndarray:
  # The pattern follows the address, so that it need not begin with the copy.
  if address % 128:
    raise Fault(f"copies begin at multiples of 128, not at {address}")
  plain = address + np.arange(int(np.prod(tensor.box))) * tensor.element_bytes
  return swizzle(plain, tensor.swizzle) - SHARED_BASE


def _to_shared(i: program.Instruction) -> Any:
  target, source, barrier, *mask = i.operands
  is_shared_by = "multicast::cluster" in i.name

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    own, blocks = warp.block, warp.block.cluster.blocks
    for lane in np.flatnonzero(lanes):
      ranks = [own.rank]
      if is_shared_by:
        bits = int(warp.value(mask[0], np.uint16)[lane])
        ranks = [r for r in range(len(blocks)) if bits >> r & 1]
      for rank in ranks:
        _begin_load(
          warp,
          blocks[rank],
          int(warp.threads[lane]),
          *_find(warp, source, lane),
          int(warp.address(target)[lane]),
          int(warp.address(barrier)[lane]),
        )

  return run


def _begin_load(
  warp: "Warp",
  block: "Block",
  thread: int,
  tensor: TensorMap,
  corner: list[int],
  address: int,
  mbarrier_at: int,
) -> None:
  """Copies to the memory of a block, whose mbarrier learns of it."""
  if not block.running:
    raise Fault("it copies to the memory of a block that has ended")
  mbarrier, places = (
    block.mbarriers.at(mbarrier_at),
    _shared_places(tensor, address),
  )
  block.copies += 1
  time = block.copies
  block.shared.claim(
    address - SHARED_BASE, tensor.box_bytes, warp.who_in(block), time
  )

  def finish() -> None:
    offset, inside = tensor.places(corner)
    # What is outside of the tensor is 0.
    data = np.zeros((len(places), tensor.element_bytes), np.uint8)
    if inside.any():
      data[inside] = block.launch.memory.load(
        tensor.base + offset[inside], tensor.element_bytes, thread
      )
    for k in range(tensor.element_bytes):
      block.shared.put_at(places + k, data[:, k])
    clock = np.zeros_like(mbarrier.clock)
    clock[block.times.stop - 1] = time + 1
    mbarrier.receive(tensor.box_bytes, clock)

  mbarrier.copies.append(finish)


def _to_global(i: program.Instruction) -> Any:
  target, source = i.operands[:2]

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    for lane in np.flatnonzero(lanes):
      _begin_store(
        warp,
        int(warp.threads[lane]),
        *_find(warp, target, lane),
        int(warp.address(source)[lane]),
      )

  return run


def _begin_store(
  warp: "Warp", thread: int, tensor: TensorMap, corner: list[int], address: int
) -> None:
  block, places = warp.block, _shared_places(tensor, address)
  first, size = address - SHARED_BASE, tensor.element_bytes
  block.shared.for_engine(first, tensor.box_bytes, warp.who)

  def finish() -> None:
    offset, inside = tensor.places(corner)
    # Nobody may have written since.
    shared = block.shared.for_engine(first, tensor.box_bytes, warp.who)
    data = shared[places[inside][:, None] + np.arange(size)]
    if inside.any():
      block.launch.memory.store(tensor.base + offset[inside], data, thread)

  warp.stores.add(finish)


def commit(i: program.Instruction, queue: str = "stores") -> Any:
  """`commit_group`, of one of a warp's queues."""
  del i
  return lambda warp, lanes: getattr(warp, queue).commit()


def wait(i: program.Instruction) -> Any:
  """`wait_group`."""
  pending = int(i.operands[0])
  return lambda warp, lanes: warp.stores.wait(pending)
