# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A model of one core (SM) of an H100 that runs a kernel: cycles, without a GPU.

Machine code says much about time. The assembler writes into every instruction how
many cycles its warp waits before the next, and which of six counters it waits for,
or sets when it has read its operands or written its results. What is left is here:

- four schedulers, each of which starts an instruction a cycle of one of its warps,
  the same warp as long as that can go on;
- pipes, which an instruction keeps for some cycles. A warp of 32 takes a pipe of 16
  lanes for two;
- the latency of what sets a counter: shared memory, shuffles, special functions,
  global memory;
- copies of the block, which a server of some bytes a cycle brings in turn;
- barriers of the block; and the time until a block is followed by the next.

Not modelled: bank conflicts, the fetch of instructions, caches, what stores and loads
of single numbers take of the bandwidth, hints to schedulers, waits that are tried
again; other cores only by the bandwidth that they leave to this one. All warps take
one path.
"""

import dataclasses
import heapq
import math
from collections.abc import Sequence

from jaxroute.aot import gpu_sass

# Of a core, and warps of a block: each has one.
_SCHEDULERS = 4
_COUNTERS = 6
# For how many cycles an instruction keeps its pipe, one number for each of a kind.
_PIPES = {
  "alu": (2,),
  "fma": (2, 2),
  "special": (8,),
  "uniform": (2,),
  "memory": (2,),
  "control": (),
}
_PIPE_OF = {
  base: pipe
  for pipe, bases in {
    "fma": ("FADD", "FMUL", "FFMA", "HFMA2", "HADD2", "IMAD"),
    "special": ("MUFU", "POPC", "FLO", "BREV", "F2I", "I2F", "F2F"),
    "uniform": ("R2UR", "VOTEU", "ELECT"),
    "control": ("NOP", "BRA", "EXIT", "BSSY", "BSYNC"),
    "memory": (
      *("LDS", "STS", "LDSM", "STSM", "SHFL", "SYNCS"),
      *("LDG", "LD", "STG", "ST", "REDG", "RED", "ATOMG"),
      *("S2R", "S2UR", "LDC", "UTMALDG", "UTMACCTL", "BAR", "REDUX"),
    ),
  }.items()
  for base in bases
}
# Only the first of the two pipes multiplies integers.
_FIRST_OF_TWO = ("IMAD",)
_SHARED = ("LDS", "STS", "SHFL")
# Of special registers, constants, and the start of a copy.
_SETUP = ("S2R", "S2UR", "LDC", "UTMALDG")


@dataclasses.dataclass(frozen=True)
class Core:
  """Times in cycles.

  `sync`, `barrier`, `copy`, `start`, `clock_ghz` and `launch_us`, and `copy` of
  `FROM_L2`, were set by ten times of a prototype of the routing kernel: see
  docs/performance.md. The others are assumed.

  Attributes:
    shared: from an access to shared memory, or a shuffle, to its result.
    matrix: the same of accesses to matrices.
    special: of special functions.
    sync: of a look at a barrier in memory.
    load: from global memory.
    bytes_per_cycle: of copies, for this core.
    barrier: after the last warp came.
    enter: of what was issued to memory, before it may use a path that all share.
    leave: from that path until operands may be overwritten.
    plain: until the operands of others may be, and until their results are there.
    setup: of special registers, constants, and the start of a copy.
    copy: from the start of a copy to its first bytes.
    start: from the end of a block to the next in its place.
    clock_ghz: cycles in a nanosecond.
    launch_us: what a kernel takes if it does nothing, in microseconds.
  """

  shared: int = 23
  matrix: int = 31
  special: int = 22
  sync: int = 24
  load: int = 420
  bytes_per_cycle: float = 12.5
  barrier: int = 18
  enter: int = 4
  leave: int = 10
  plain: int = 12
  setup: int = 30
  copy: int = 800
  start: int = 780
  clock_ghz: float = 1.755
  launch_us: float = 0.8

  def microseconds(self, cycles: int) -> float:
    """Of a kernel whose busiest core takes so many cycles."""
    return cycles / self.clock_ghz / 1e3 + self.launch_us


# 2.9 TB/s for 132 cores, which a copy of large arrays reached.
FROM_HBM = Core()
FROM_L2 = Core(load=270, copy=450, bytes_per_cycle=30.0)


@dataclasses.dataclass(frozen=True)
class Step:
  """One instruction of the path that warps take.

  Attributes:
    base: the operation.
    pipe: a key of `_PIPES`.
    stall: cycles until the next of the warp.
    waits: counters that it waits for.
    reads: a counter to set when it has read, or None.
    writes: a counter to set when it has written, or None.
    width: for how many cycles it has the path to memory that all warps share: one
      for 128 bytes of a warp.
    copy: which copy of the block it starts or waits for, or None.
  """

  base: str
  pipe: str
  stall: int
  waits: tuple[int, ...] = ()
  reads: int | None = None
  writes: int | None = None
  width: int = 0
  copy: int | None = None


def path(sass: str, votes: int = 0) -> list[Step]:
  """Reads the instructions that a warp executes.

  Args:
    sass: one kernel, with control codes; see `jaxroute.aot.gpu.Kernel`.
    votes: whether a thread of each warp needs what few need: 0 or 1.

  Returns:
    Steps. Waits for copies are taken to be in the order of the copies.

  Raises:
    ValueError: if the path depends on data, or control codes are missing.
  """
  steps, copies, waits = [], 0, 0
  for instruction in gpu_sass.walk(sass, votes):
    base, copy = instruction.base, None
    if base == "UTMALDG":
      copy, copies = copies, copies + 1
    elif "PHASECHK" in instruction.op:
      if "TRYWAIT" not in instruction.op:
        continue  # What follows a try that failed.
      copy, waits = waits, waits + 1
    elif base == "NANOSLEEP":
      continue
    steps.append(_step(instruction, copy))
  return steps


def _step(instruction: gpu_sass.Instruction, copy: int | None) -> Step:
  base, flags = instruction.base, set(instruction.op.split(".")[1:])
  width = 0
  if base in ("LDS", "STS", "LDSM", "STSM"):
    # Of 128 bits a thread, or of four matrices.
    width = 4 if flags & {"128", "4"} else 2 if flags & {"64", "2"} else 1
  elif _pipe(base) == "memory" and base not in (*_SETUP, "BAR", "REDUX"):
    width = 1
  fields = instruction.control.split(":")
  if len(fields) != 5:
    raise ValueError(
      "expected control codes, as in 0:-:1:Y:04, before every instruction, got"
      f" {instruction.control!r}"
    )
  waits, reads, writes, _, stall = fields
  return Step(
    base=base,
    pipe=_pipe(base),
    stall=max(int(stall, 16), 1),
    waits=_counters(waits),
    reads=None if reads == "-" else int(reads),
    writes=None if writes == "-" else int(writes),
    width=width,
    copy=copy,
  )


def _pipe(base: str) -> str:
  if base in _PIPE_OF:
    return _PIPE_OF[base]
  return "uniform" if base.startswith("U") else "alu"


def _counters(text: str) -> tuple[int, ...]:
  """Reads "-", a counter, several as 4&3, or a mask as 0x1f."""
  if text == "-":
    return ()
  if text.startswith("0x"):
    return tuple(i for i in range(_COUNTERS) if int(text, 16) >> i & 1)
  return tuple(int(x) for x in text.split("&"))


class _Block:
  """A block that runs: when its copies arrive, and who waits at its barrier."""

  def __init__(self) -> None:
    self.arrivals: dict[int, float] = {}
    self.waiting: list[_Warp] = []
    self.warps = _SCHEDULERS


@dataclasses.dataclass
class _Warp:
  """A warp that runs: where, and when it may go on."""

  block: _Block
  ready: float
  at: int = 0
  counters: list[float] = dataclasses.field(
    default_factory=lambda: [0.0] * _COUNTERS
  )


class _Scheduler:
  """One of four: its warps and pipes."""

  def __init__(self) -> None:
    self.warps: list[_Warp] = []
    self.last: _Warp | None = None
    self.free = {pipe: [0.0] * len(kept) for pipe, kept in _PIPES.items()}

  def choose(
    self, steps: Sequence[Step], now: float
  ) -> tuple[_Warp | None, float]:
    """The warp to go on, and else when to ask again."""
    again = math.inf
    order = sorted(self.warps, key=lambda warp: warp is not self.last)
    for warp in order:
      earliest = self._earliest(steps[warp.at], warp)
      if earliest <= now:
        self.last = warp
        return warp, now
      again = min(again, earliest)
    return None, again

  def _earliest(self, step: Step, warp: _Warp) -> float:
    earliest = warp.ready
    for counter in step.waits:
      earliest = max(earliest, warp.counters[counter])
    if step.base == "SYNCS" and step.copy is not None:
      earliest = max(earliest, warp.block.arrivals.get(step.copy, math.inf))
    free = self.free[step.pipe]
    if step.base in _FIRST_OF_TWO:
      free = free[:1]
    return max(earliest, min(free, default=0.0))

  def occupy(self, step: Step, now: float) -> None:
    """Keeps a pipe: the last that is free."""
    free, kept = self.free[step.pipe], _PIPES[step.pipe]
    last = 0 if step.base in _FIRST_OF_TWO else len(free) - 1
    for i in range(last, -1, -1):
      if free[i] <= now:
        free[i] = now + kept[i]
        return


def cycles(
  steps: Sequence[Step],
  blocks: int,
  at_once: int,
  copy_bytes: Sequence[float],
  core: Core,
) -> int:
  """Runs blocks of four warps on a core.

  Args:
    steps: the path of a warp, from `path`.
    blocks: how many the core runs.
    at_once: how many it has room for.
    copy_bytes: of each copy of a block.
    core: which.

  Returns:
    Cycles to the end of the last.
  """
  return _Run(steps, blocks, at_once, copy_bytes, core).run()


class _Run:
  """A core, while it runs a kernel."""

  def __init__(
    self,
    steps: Sequence[Step],
    blocks: int,
    at_once: int,
    copy_bytes: Sequence[float],
    core: Core,
  ) -> None:
    self.steps, self.core, self.copy_bytes = steps, core, copy_bytes
    self.schedulers = [_Scheduler() for _ in range(_SCHEDULERS)]
    # Blocks that have not begun, and when those with a place will.
    self.rest = blocks
    self.starts: list[float] = [8.0 * i for i in range(min(blocks, at_once))]
    # When the path to memory, and the server of copies, are free.
    self.path_free = self.copies_free = 0.0
    self.now = 0.0

  def run(self) -> int:
    """Cycles to the end."""
    while self.starts or any(s.warps for s in self.schedulers):
      while self.starts and self.starts[0] <= self.now:
        self._start_block()
      again = self.starts[0] if self.starts else math.inf
      for scheduler in self.schedulers:
        warp, when = scheduler.choose(self.steps, self.now)
        if warp is None:
          again = min(again, when)
        else:
          self._issue(scheduler, warp)
          again = self.now
      if again == math.inf and any(s.warps for s in self.schedulers):
        raise ValueError(
          "expected a copy for every wait, but warps wait for more"
        )
      later = math.ceil(again) if again < math.inf else 0
      end, self.now = self.now, max(self.now + 1, later)
    return int(end)

  def _start_block(self) -> None:
    heapq.heappop(self.starts)
    self.rest -= 1
    block = _Block()
    for i, scheduler in enumerate(self.schedulers):
      scheduler.warps.append(_Warp(block, self.now + i))

  def _issue(self, scheduler: _Scheduler, warp: _Warp) -> None:
    """Starts an instruction of a warp."""
    step, now = self.steps[warp.at], self.now
    scheduler.occupy(step, now)
    has_read, has_written = self._ends(step)
    # A counter is clear when all that have set it are done.
    for counter, end in ((step.writes, has_written), (step.reads, has_read)):
      if counter is not None:
        warp.counters[counter] = max(warp.counters[counter], end)
    warp.at, warp.ready = warp.at + 1, now + step.stall
    block = warp.block
    is_copy = step.base == "UTMALDG" and step.copy is not None
    # All warps come here, and one of their threads starts the copy.
    if is_copy and step.copy not in block.arrivals:
      duration = self.copy_bytes[step.copy] / self.core.bytes_per_cycle
      self.copies_free = max(now, self.copies_free) + duration
      block.arrivals[step.copy] = self.copies_free + self.core.copy
    if step.base == "BAR":
      self._wait_for_block(warp)
    if warp.at == len(self.steps):
      scheduler.warps.remove(warp)
      block.warps -= 1
      if not block.warps and self.rest > len(self.starts):
        heapq.heappush(self.starts, now + self.core.start)

  def _ends(self, step: Step) -> tuple[float, float]:
    """When an instruction that starts now has read, and when it has written."""
    core, now = self.core, self.now
    if step.width:
      self.path_free = max(now + core.enter, self.path_free) + step.width
      latency = {
        "LDSM": core.matrix,
        "STSM": core.matrix,
        "SYNCS": core.sync,
      }.get(step.base, core.shared if step.base in _SHARED else core.load)
      return self.path_free + core.leave, self.path_free + latency - core.enter
    latency = core.setup if step.base in _SETUP else core.plain
    if step.pipe == "special":
      latency = core.special
    return now + core.plain, now + latency

  def _wait_for_block(self, warp: _Warp) -> None:
    """Holds a warp until all of its block have come."""
    waiting = warp.block.waiting
    waiting.append(warp)
    warp.ready = math.inf
    if len(waiting) == warp.block.warps:
      for other in waiting:
        other.ready = self.now + self.core.barrier
      waiting.clear()
