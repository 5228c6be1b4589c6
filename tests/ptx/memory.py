# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Memory of a GPU: buffers of all blocks, and the shared memory of one.

Shared memory knows who touched each word last. Two accesses, one of them a write, are a
race unless a barrier stands between them: the block's, the warp's, or an mbarrier.
"""

import dataclasses

import numpy as np

WARP = 32
# A buffer begins at a multiple of this, so that an address says which it is in.
_BUFFER = 1 << 40
# What memory holds before anything is written to it: a NaN, a large integer.
_GARBAGE = 0x7FA5A5A5
SHARED_BASE = 1024
_WORD = 4
_NOBODY = -1
_SEVERAL = -2
# Has read for a warp, which has waited for that.
_ENGINE = -3
ATOMIC = -2
"""Instead of a thread that writes by atomics."""
ELSEWHERE = -1
"""Instead of a warp of the block: one of another block of the cluster."""
CLUSTER_STEP = 1 << 24
"""A shared address and so often this is that of the block of that rank, from 1."""


class Fault(Exception):
  """What a GPU would not do, or not always in the same way."""


class Global:
  """Buffers in global memory, and which thread wrote each byte.

  What one thread writes no other may touch: blocks do not wait for each other, and
  kernels do not exchange within a block in this way. Atomics may meet.
  """

  def __init__(self):
    self._buffers: list[np.ndarray] = []
    self._writers: list[np.ndarray] = []

  def add(self, array: np.ndarray) -> int:
    """Address of a new buffer with the array's bytes."""
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    self._buffers.append(flat.copy())
    self._writers.append(np.full(len(flat), _NOBODY, np.int64))
    return len(self._buffers) * _BUFFER

  def add_garbage(self, size: int) -> int:
    """Address of a new buffer that nothing was written to."""
    words = np.full(-(-size // _WORD), _GARBAGE, np.uint32)
    return self.add(words.view(np.uint8)[:size])

  def read(self, address: int) -> np.ndarray:
    """All bytes of the buffer that begins at an address."""
    number, offset = divmod(int(address), _BUFFER)
    if offset or not 0 < number <= len(self._buffers):
      raise Fault(f"no buffer begins at {address:#x}")
    return self._buffers[number - 1]

  def load(
    self, address: np.ndarray, size: int, thread: np.ndarray | int
  ) -> np.ndarray:
    """`[addresses, size]` uint8, for a thread each or for one."""
    number, at = self._find(address, size)
    self._check(number, at, thread, "read")
    return self._buffers[number][at]

  def store(
    self, address: np.ndarray, data: np.ndarray, thread: np.ndarray | int
  ) -> None:
    """Writes `[addresses, size]` uint8."""
    number, at = self._find(address, data.shape[1])
    self._check(number, at, thread, "written")
    self._buffers[number][at] = data
    self._writers[number][at] = np.reshape(thread, (-1, 1))

  def _find(self, address: np.ndarray, size: int) -> tuple[int, np.ndarray]:
    numbers, offsets = np.divmod(address.astype(np.int64), _BUFFER)
    number = int(numbers[0])
    if (numbers != number).any() or not 0 < number <= len(self._buffers):
      raise Fault(f"global addresses {address} are in no buffer, or in several")
    end = len(self._buffers[number - 1])
    if (offsets + size > end).any():
      raise Fault(f"global memory ends at byte {end}, accessed {offsets.max()}")
    if (offsets % size).any():
      raise Fault(f"global addresses {offsets} are no multiples of {size}")
    return number - 1, offsets[:, None] + np.arange(size)

  def _check(
    self, number: int, at: np.ndarray, thread: np.ndarray | int, what: str
  ) -> None:
    writer = self._writers[number][at]
    racing = (writer != _NOBODY) & (writer != np.reshape(thread, (-1, 1)))
    if racing.any():
      row, column = np.argwhere(racing)[0]
      raise Fault(
        f"race: global byte {at[row, column]}, written by thread"
        f" {writer[row, column]} of all, is {what} by another"
      )


@dataclasses.dataclass
class Access:
  """Who accesses shared memory.

  Attributes:
    warp: of the block, or a number behind those for the tensor cores that a
      warpgroup has, or `ELSEWHERE`.
    clock: `[readers + 1]`: what is known of the time of each of these, and of the
      copy engine's.
  """

  warp: int
  clock: np.ndarray


class Shared:
  """The shared memory of a block, from address `SHARED_BASE` on."""

  def __init__(self, size: int, readers: int):
    words = -(-size // _WORD)
    self._engine = readers * WARP
    self._bytes = np.full(words, _GARBAGE, np.uint32).view(np.uint8)
    self._size = size
    # Of every word: who wrote it last, and when; who has read it since, and when.
    self._writer = np.full(words, _NOBODY, np.int32)
    self._written = np.zeros(words, np.int64)
    self._reader = np.full((words, readers), _NOBODY, np.int32)
    self._read = np.full((words, readers), -1, np.int64)
    # Words that a warp has written and no fence has shown to other engines.
    self._unfenced = np.full(words, _NOBODY, np.int32)

  def _offsets(self, address: np.ndarray, size: int, align: int) -> np.ndarray:
    offsets = address.astype(np.int64) - SHARED_BASE
    if (offsets < 0).any() or (offsets + size > self._size).any():
      raise Fault(
        f"shared memory has {self._size} bytes, accessed {size} from"
        f" {offsets.min()} to {offsets.max()}"
      )
    if (offsets % align).any():
      raise Fault(f"shared addresses {offsets} are no multiples of {align}")
    return offsets[:, None] + np.arange(size)

  def load(
    self, address: np.ndarray, size: int, lanes: np.ndarray, who: Access
  ) -> np.ndarray:
    """`[lanes, size]` uint8."""
    at = self._offsets(address, size, size)
    words, thread = self._touched(at, lanes, who)
    self._check_writes(words, thread, who, "read")
    same = (self._read[words, who.warp] == who.clock[who.warp]) & (
      self._reader[words, who.warp] != thread
    )
    self._reader[words, who.warp] = np.where(same, _SEVERAL, thread)
    # Words that several lanes read at once have no single reader.
    unique, counts = np.unique(words, return_counts=True)
    self._reader[unique[counts > 1], who.warp] = _SEVERAL
    self._read[words, who.warp] = who.clock[who.warp]
    return self._bytes[at]

  def store(
    self, address: np.ndarray, data: np.ndarray, lanes: np.ndarray, who: Access
  ) -> None:
    """Writes `[lanes, size]` uint8."""
    at = self._offsets(address, data.shape[1], data.shape[1])
    if len(np.unique(at)) != at.size:
      raise Fault("several lanes of a warp write to the same shared address")
    words, thread = self._touched(at, lanes, who)
    self._check_writes(words, thread, who, "written")
    self._check_reads(words, thread, who)
    self._writer[words] = thread
    self._written[words] = who.clock[who.warp]
    self._unfenced[words] = who.warp
    self._bytes[at] = data

  def _touched(
    self, at: np.ndarray, lanes: np.ndarray, who: Access
  ) -> tuple[np.ndarray, np.ndarray]:
    """Words, and the thread that touches each."""
    words = at[:, ::_WORD] // _WORD
    thread = np.broadcast_to((who.warp * WARP + lanes)[:, None], words.shape)
    return words.reshape(-1), thread.reshape(-1)

  def _check_writes(
    self, words: np.ndarray, thread: np.ndarray, who: Access, what: str
  ) -> None:
    writer = self._writer[words]
    known = who.clock[np.maximum(writer, 0) // WARP]
    racing = (
      (writer != _NOBODY) & (writer != thread) & (self._written[words] >= known)
    )
    if racing.any():
      first = np.flatnonzero(racing)[0]
      raise Fault(
        f"race: shared byte {words[first] * _WORD}, written by thread"
        f" {writer[first]}, is {what} by thread {thread[first]} without a"
        " barrier between them"
      )

  def _check_reads(
    self, words: np.ndarray, thread: np.ndarray, who: Access
  ) -> None:
    read = self._read[words]
    racing = read >= who.clock[None, :-1]
    if who.warp != ELSEWHERE:
      reader = self._reader[words, who.warp]
      racing[:, who.warp] &= (reader != thread) & (reader != _ENGINE)
    if racing.any():
      first, warp = np.argwhere(racing)[0]
      raise Fault(
        f"race: shared byte {words[first] * _WORD}, read by warp {warp}, is written"
        f" by thread {thread[first]} without a barrier between them"
      )

  def fence(self, warp: int) -> None:
    """Shows the copy engine what a warp has written."""
    self._unfenced[self._unfenced == warp] = _NOBODY

  def claim(self, offset: int, size: int, who: Access, time: int) -> None:
    """Makes garbage of bytes that the copy engine is about to write, at its time."""
    words = np.arange(offset // _WORD, (offset + size) // _WORD)
    thread = np.full_like(words, _NOBODY)
    self._offsets(np.array([offset + SHARED_BASE]), size, 1)
    self._check_writes(words, thread, who, "copied to")
    self._check_reads(words, thread, who)
    self._bytes.view(np.uint32)[words] = _GARBAGE
    self._writer[words] = self._engine
    self._written[words] = time
    self._unfenced[words] = _NOBODY

  def put_at(self, offsets: np.ndarray, data: np.ndarray) -> None:
    """Bytes from the copy engine."""
    self._bytes[offsets] = data

  def for_engine(self, offset: int, size: int, who: Access) -> np.ndarray:
    """All bytes, for an engine that reads some of them for a warp."""
    self._offsets(np.array([offset + SHARED_BASE]), size, 1)
    words = np.arange(offset // _WORD, -(-(offset + size) // _WORD))
    if (self._unfenced[words] != _NOBODY).any():
      raise Fault(
        f"shared bytes from {offset} on are copied or multiplied, and no"
        " fence.proxy.async follows their write"
      )
    self._check_writes(words, np.full_like(words, _NOBODY), who, "copied")
    self._reader[words, who.warp] = _ENGINE
    self._read[words, who.warp] = who.clock[who.warp]
    return self._bytes
