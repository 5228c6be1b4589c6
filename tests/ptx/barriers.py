# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Barriers of a block and of a warp, and mbarriers.

What a warp knows of the others' time is its clock. Who arrives at a barrier publishes
its clock, and who has waited there knows what was published.
"""

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import program
from ptx.memory import CLUSTER_STEP, SHARED_BASE, WARP, Fault

if TYPE_CHECKING:
  from ptx.machine import Warp


class BlockBarriers:
  """The numbered barriers of a block."""

  def __init__(self):
    self._waiting: dict[int, list[Warp]] = {}
    self._opened: dict[int, int] = {}

  def arrive(
    self, warp: "Warp", number: int, threads: int
  ) -> Callable[[], bool]:
    """A warp comes to a barrier of so many threads; returns whether it is over."""
    waiting = self._waiting.setdefault(number, [])
    waiting.append(warp)
    ticket = self._opened.get(number, 0) + 1
    if len(waiting) * WARP == threads:
      clock = np.max([w.publish() for w in waiting], axis=0)
      for w in waiting:
        w.learn(clock)
      self._waiting[number] = []
      self._opened[number] = ticket
    return lambda: self._opened.get(number, 0) >= ticket


class ClusterBarrier:
  """The barrier of all blocks of a cluster."""

  def __init__(self):
    self._arrived: dict[Warp, int] = {}

  def arrive(self, warp: "Warp") -> None:
    """A warp comes, and goes on."""
    self._arrived[warp] = self._arrived.get(warp, 0) + 1

  def wait(self, warp: "Warp") -> Callable[[], bool]:
    """Returns whether all warps have come as often as this one."""
    if warp not in self._arrived:
      raise Fault("it waits for its cluster, and has not arrived")
    blocks, times = warp.block.cluster.blocks, self._arrived[warp]
    warps = sum(block.warps for block in blocks)
    return lambda: (
      sum(count >= times for count in self._arrived.values()) == warps
    )


@dataclasses.dataclass
class Mbarrier:
  """A barrier in shared memory that counts arrivals and bytes.

  Attributes:
    count: arrivals of a phase.
    pending: those that are missing.
    clock: what those who wait for the last phase learn.
    arriving: what those who have arrived have published.
    bytes: that are missing.
    phase: how many are over.
    copies: that have been begun; each is a function that ends it.
  """

  count: int
  pending: int
  clock: np.ndarray
  arriving: np.ndarray
  bytes: int = 0
  phase: int = 0
  copies: list[Callable[[], None]] = dataclasses.field(default_factory=list)

  def arrive(self, count: int, expected: int, clock: np.ndarray) -> None:
    """Some arrive, and may expect bytes."""
    self.arriving = np.maximum(self.arriving, clock)
    self.bytes += expected
    self.pending -= count
    if self.pending < 0:
      raise Fault(f"an mbarrier of {self.count} arrivals has more")
    self._turn()

  def receive(self, size: int, clock: np.ndarray) -> None:
    """Bytes come."""
    self.arriving = np.maximum(self.arriving, clock)
    self.bytes -= size
    self._turn()

  def is_over(self, parity: int) -> bool:
    """Whether the phase of that parity is; copies end when somebody waits."""
    while self.phase % 2 == parity and self.copies:
      self.copies.pop(0)()
    return self.phase % 2 != parity

  def _turn(self) -> None:
    if self.pending == 0 and self.bytes == 0:
      self.phase += 1
      self.pending = self.count
      self.clock = self.arriving.copy()


class Mbarriers:
  """Those of a block, by address."""

  def __init__(self):
    self._found: dict[int, Mbarrier] = {}

  def make(self, address: int, count: int, clock: np.ndarray) -> None:
    """`mbarrier.init`."""
    zeros = np.zeros_like(clock)
    self._found[address] = Mbarrier(count, count, zeros, zeros.copy())

  def at(self, address: int) -> Mbarrier:
    """The one at a shared address."""
    if address not in self._found:
      raise Fault(
        f"no mbarrier was made at shared byte {address - SHARED_BASE}"
      )
    return self._found[address]


def wait_for_block(i: program.Instruction) -> Any:
  """`bar.sync`."""
  number, *threads = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> Callable[[], bool]:
    del lanes
    count = warp.block.warps * WARP
    if threads:
      count = int(warp.value(threads[0], np.int32)[0])
    barrier = int(warp.value(number, np.int32)[0])
    return warp.block.barriers.arrive(warp, barrier, count)

  return run


def meet_cluster(i: program.Instruction) -> Any:
  """`barrier.cluster.arrive` and `.wait`.

  Who arrives without `.release` shows nothing but the mbarriers it has made.
  """
  if i.parts[2] == "wait":
    return lambda warp, lanes: warp.block.cluster.barrier.wait(warp)
  if "relaxed" not in i.parts:
    raise NotImplementedError(f"no meaning is known of {i.text!r}")
  return lambda warp, lanes: warp.block.cluster.barrier.arrive(warp)


def map_address(i: program.Instruction) -> Any:
  """`mapa.shared::cluster`: the same place in the memory of a block of the cluster."""
  target, source, rank = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    ranks = warp.value(rank, np.uint32).astype(np.int64)
    address = warp.value(source, np.uint32) + (ranks + 1) * CLUSTER_STEP
    warp.write(target, address.astype(np.uint32), lanes)

  return run


def wait_for_warp(i: program.Instruction) -> Any:
  """`bar.warp.sync`: the lanes are together; a new time begins."""
  del i
  return lambda warp, lanes: (warp.publish(), None)[1]


def init_mbarrier(i: program.Instruction) -> Any:
  """`mbarrier.init`."""
  address, count = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    number = int(warp.value(count, np.int32)[lanes][0])
    for at in warp.address(address)[lanes]:
      warp.block.mbarriers.make(int(at), number, warp.clock)

  return run


def arrive(i: program.Instruction) -> Any:
  """`mbarrier.arrive`, with bytes to expect or a number of arrivals."""
  _, address, *number = i.operands
  expects = "expect_tx" in i.parts

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    clock = warp.publish()
    addresses = warp.address(address)
    for lane in np.flatnonzero(lanes):
      value = int(warp.value(number[0], np.int32)[lane]) if number else 1
      count, expected = (1, value) if expects else (value, 0)
      block, at = warp.block.cluster.block_of(int(addresses[lane]), warp.block)
      if not block.running:
        raise Fault("it arrives in the memory of a block that has ended")
      block.mbarriers.at(at).arrive(count, expected, clock)

  return run


def try_wait(i: program.Instruction) -> Any:
  """`mbarrier.try_wait.parity`, which here waits until it is over."""
  target, address, parity, *_ = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> Callable[[], bool]:
    barrier = warp.block.mbarriers.at(int(warp.address(address)[lanes][0]))
    wanted = int(warp.value(parity, np.int32)[lanes][0])

    def is_over() -> bool:
      if not barrier.is_over(wanted):
        return False
      warp.learn(barrier.clock)
      warp.write(target, np.ones(WARP, bool), lanes)
      return True

    return is_over

  return run
