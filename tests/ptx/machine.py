# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs a PTX kernel for Hopper, block by block, or cluster by cluster.

The 32 lanes of a warp go together. Where they part, those that are behind in the text
go first, until they come to an instruction that needs them all. If they are to wait at
several, a GPU hangs: that is a `Fault`, as are a race on shared memory, an access out
of memory, and a wait for what never comes. Warps take turns, in an order that is drawn,
and each runs until it has to wait.

What another engine does (copies, products) is done as late as may be: when somebody
waits for it. Until then its results are garbage.
"""

import dataclasses
import random
from collections.abc import Iterator
from typing import Any

import numpy as np

from ptx import barriers, instructions, memory, program, transfers
from ptx.memory import SHARED_BASE, WARP, Fault

# Instructions of a warp, after which it is taken to run for ever.
_MOST = 10_000_000
# Of registers whose names begin so; others have 32 bits, or are predicates.
_DTYPES = {"%rs": np.uint16, "%rd": np.uint64}


class Cluster:
  """Blocks that reach into each other's shared memory."""

  def __init__(self, launch: "Launch", numbers: list[tuple[int, int, int]]):
    self.barrier = barriers.ClusterBarrier()
    self.blocks = [
      Block(launch, self, rank, number) for rank, number in enumerate(numbers)
    ]

  def block_of(self, address: int, own: "Block") -> tuple["Block", int]:
    """Whose memory an address is in, and the address there."""
    rank, address = divmod(address, memory.CLUSTER_STEP)
    return (self.blocks[rank - 1] if rank else own), address


class Block:
  """What the warps of a block share."""

  def __init__(
    self,
    launch: "Launch",
    cluster: Cluster,
    rank: int,
    number: tuple[int, int, int],
  ):
    self.launch = launch
    self.cluster = cluster
    self.rank = rank
    self.number = number
    self.warps = launch.program.threads // WARP
    self.members: list[Warp] = []
    self.running = self.warps
    # Of its tensor cores, for each warpgroup.
    self.product_times = [1] * -(-self.warps // 4)
    readers = self.warps + len(self.product_times)
    # Of a warp's clock, what is of this block: the times of its warps, of its
    # tensor cores and of its copy engine.
    self.times = slice(rank * (readers + 1), (rank + 1) * (readers + 1))
    self.shared = memory.Shared(launch.shared_bytes, readers)
    self.barriers = barriers.BlockBarriers()
    self.mbarriers = barriers.Mbarriers()
    self.copies = 0  # of the copy engine, begun: its time


class Warp:
  """Registers of 32 lanes, where these are, and what they know of other warps."""

  def __init__(self, block: Block, number: int):
    self.block = block
    self.number = number
    self.pc = np.zeros(WARP, np.int64)
    self.clock = np.zeros(
      (block.times.stop - block.times.start) * block.launch.cluster, np.int64
    )
    self._own_time = block.times.start + number
    self.clock[self._own_time] = 1
    self.products = transfers.Queue()
    self.stores = transfers.Queue()
    self.sums: dict[Any, Any] = {}  # that products add to, by their names
    self._registers: dict[str, np.ndarray] = {}
    self._constants: dict[tuple[str, type], np.ndarray] = {}

  @property
  def who(self) -> memory.Access:
    """For accesses to shared memory."""
    return memory.Access(self.number, self.clock[self.block.times])

  def who_in(self, block: Block) -> memory.Access:
    """For what an engine does for this warp in some block of the cluster."""
    if block is self.block:
      return self.who
    return memory.Access(memory.ELSEWHERE, self.clock[block.times])

  @property
  def threads(self) -> np.ndarray:
    """Numbers of its lanes among all threads, `[32]`."""
    block = np.ravel_multi_index(self.block.number, self.block.launch.grid)
    first = int(block) * self.block.warps + self.number
    return first * WARP + np.arange(WARP)

  def publish(self) -> np.ndarray:
    """What others learn of who meets this warp now; its time goes on."""
    self.clock[self._own_time] += 1
    return self.clock.copy()

  def learn(self, clock: np.ndarray) -> None:
    """Knows from now on what others have published."""
    self.clock = np.maximum(self.clock, clock)

  def value(self, operand: str, dtype: type) -> np.ndarray:
    """A register or a constant, `[32]`."""
    found = self._registers.get(operand)
    if found is None:
      key = operand, dtype
      if key not in self._constants:
        constant = self._constant(operand, dtype)
        self._constants[key] = np.full(WARP, constant, constant.dtype)
      return self._constants[key]
    size = np.dtype(dtype).itemsize
    if found.dtype.itemsize == size:
      return found.view(dtype)
    # An instruction takes the low part of a wider register.
    return found.astype(f"u{size}").view(dtype)

  def write(self, name: str, value: Any, lanes: np.ndarray) -> None:
    """Writes a register of some lanes."""
    if name == "_":
      return
    if np.shape(value) != (WARP,):
      value = np.full(WARP, value)
    if value.dtype != np.bool_:
      bits = value.view(f"u{value.dtype.itemsize}")
      value = bits.astype(_DTYPES.get(name[:3], np.uint32), copy=False)
    if not lanes.all():
      old = self._registers.get(name, np.zeros_like(value))
      value = np.where(lanes, value, old)
    self._registers[name] = value

  def address(self, operand: str) -> np.ndarray:
    """What stands in brackets, `[32]` int64."""
    base, _, offset = operand.strip("[]").partition("+")
    dtype = np.uint32 if base[:2] == "%r" and base[2].isdigit() else np.uint64
    return self.value(base, dtype).astype(np.int64) + int(offset or "0", 0)

  def _constant(self, operand: str, dtype: type) -> np.ndarray:
    launch, lanes = self.block.launch, np.arange(WARP)
    known = {
      "%tid.x": self.number * WARP + lanes,
      "%laneid": lanes,
      "%ctaid.x": self.block.number[0],
      "%ctaid.y": self.block.number[1],
      "%ctaid.z": self.block.number[2],
      "%cluster_ctaid.x": self.block.rank,
      "%ntid.x": launch.program.threads,
      "%nctaid.x": launch.grid[0],
      **launch.params,
    }
    if operand in known:
      return np.asarray(known[operand]).astype(dtype)
    if operand.startswith("__dynamic_shmem"):
      return np.array(SHARED_BASE).astype(dtype)
    if operand.startswith("%"):
      raise Fault(f"{operand} is read, and was not written")
    if dtype is np.bool_:
      return np.array(int(operand, 0) != 0)
    if operand[:2] in ("0f", "0d"):
      size, text = (
        (4, "0x" + operand[2:])
        if operand[1] == "f"
        else (8, "0x" + operand[2:])
      )
    else:
      size, text = np.dtype(dtype).itemsize, operand
    return np.array(int(text, 0) & (256**size - 1), f"u{size}").view(dtype)


@dataclasses.dataclass
class Launch:
  """A kernel and what it is launched with.

  Attributes:
    program: of `program.parse`.
    grid: blocks.
    shared_bytes: dynamic shared memory of a block.
    params: address by name of parameter: of a buffer, or of tensor maps.
    maps: tensor maps by address.
    memory: global.
    cluster: blocks of a cluster, along the first dimension of the grid.
    seed: of the order in which blocks and warps run.
  """

  program: program.Program
  grid: tuple[int, int, int]
  shared_bytes: int
  params: dict[str, int]
  maps: dict[int, transfers.TensorMap]
  memory: memory.Global
  cluster: int = 1
  seed: int = 0

  def run(self) -> None:
    """Runs all blocks.

    Raises:
      Fault: if a GPU could hang, race, or leave its memory.
    """
    steps = [instructions.step(i) for i in self.program.instructions]
    rng = random.Random(self.seed)
    x, *others = self.grid
    firsts = list(np.ndindex((x // self.cluster, *others)))
    rng.shuffle(firsts)
    for first, *rest in firsts:
      numbers = [
        (first * self.cluster + rank, *rest) for rank in range(self.cluster)
      ]
      self._run_cluster(Cluster(self, numbers), steps, rng)

  def _run_cluster(
    self, cluster: Cluster, steps: list[instructions.Step], rng: random.Random
  ) -> None:
    for block in cluster.blocks:
      block.members = [Warp(block, i) for i in range(block.warps)]
    warps = [warp for block in cluster.blocks for warp in block.members]
    running = {
      i: _run_warp(warp, self.program, steps) for i, warp in enumerate(warps)
    }
    asleep: set[int] = set()
    while running:
      awake = [i for i in running if i not in asleep]
      if not awake:
        where = {
          i: self.program.instructions[warps[i].pc.min()].text for i in running
        }
        first = cluster.blocks[0].number
        raise Fault(f"block {first} hangs; its warps wait at {where}")
      number = rng.choice(awake)
      state = next(running[number], "ends")
      if state == "waits":
        asleep.add(number)
        continue
      asleep.clear()
      if state == "ends":
        warps[number].stores.wait(0)
        warps[number].block.running -= 1
        del running[number]


def _run_warp(
  warp: Warp, code: program.Program, steps: list[instructions.Step]
) -> Iterator[str]:
  """Runs a warp; yields "comes" before it waits, and "waits" while it does."""
  end = len(steps)
  for _ in range(_MOST):
    here = _next(warp, code)
    if here >= end:
      return
    instruction = code.instructions[here]
    active = lanes = warp.pc == here
    if instruction.guard is not None:
      register, is_negated = instruction.guard
      lanes = active & (warp.value(register, np.bool_) ^ is_negated)
    if instruction.jumps:
      target = end if instruction.ends else code.labels[instruction.operands[0]]
      warp.pc = np.where(lanes, target, np.where(active, here + 1, warp.pc))
      continue
    if lanes.any():
      try:
        is_over = steps[here](warp, lanes)
      except Fault as fault:
        raise Fault(
          f"{instruction.text!r} of {instruction.source}, block"
          f" {warp.block.number}, warp {warp.number}: {fault}"
        ) from fault
      if is_over is not None:
        # Others may wait for what this warp has done until here.
        yield "comes"
        while not is_over():
          yield "waits"
    warp.pc = np.where(active, here + 1, warp.pc)
  raise Fault(f"warp {warp.number} runs for ever")


def _next(warp: Warp, code: program.Program) -> int:
  """The instruction that some or all lanes execute next."""
  first = int(warp.pc[0])
  if (warp.pc == first).all():
    return first
  end = len(code.instructions)
  places = [int(here) for here in np.unique(warp.pc) if here < end]
  for here in places:
    if not code.instructions[here].needs_all:
      return here
  where = [code.instructions[here].text for here in places]
  raise Fault(f"lanes of warp {warp.number} wait for each other at {where}")
