# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Products of Hopper's tensor cores: `wgmma` of 16-bit operands in shared memory."""

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import program, transfers
from ptx.memory import SHARED_BASE, Access, Fault

if TYPE_CHECKING:
  from ptx.machine import Warp

_DEPTH = 16
_ROWS = 16  # of the 64, those of one warp


@dataclasses.dataclass
class _Sums:
  """Registers that products add to.

  Attributes:
    values: `[32]` of each.
    products: that are not done.
  """

  values: list[np.ndarray]
  products: int = 0


def multiply(i: program.Instruction) -> Any:
  """`wgmma.mma_async`: 64 x 16 by 16 x n, of which a warp has 16 rows."""
  size = re.search(r"m64n(\d+)k16\.f32\.(f16|bf16)\.(f16|bf16)$", i.name)
  if size is None:
    raise NotImplementedError(f"no meaning is known of {i.text[:80]!r}")
  columns, kind = int(size[1]), size[2]
  sums, lhs, rhs, adds, scale_a, scale_b, trans_a, trans_b = i.operands
  if (scale_a, scale_b) != ("1", "1"):
    raise NotImplementedError(f"negated operands in {i.text[:80]!r}")

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    descriptors = [int(warp.value(x, np.uint64)[0]) for x in (lhs, rhs)]
    is_added = bool(warp.value(adds, np.bool_)[0])
    if sums not in warp.sums:
      # Until they are waited for, nobody may look.
      warp.sums[sums] = _Sums([warp.value(x, np.float32).copy() for x in sums])
      for name in sums:
        warp.write(name, np.float32(np.nan), lanes)
    pending = warp.sums[sums]
    pending.products += 1

    def finish() -> None:
      row = warp.number % 4 * _ROWS
      a = _operand(warp, descriptors[0], _ROWS, trans_a == "1", kind, row)
      b = _operand(warp, descriptors[1], columns, trans_b == "1", kind, 0)
      with np.errstate(all="ignore"):
        values = _spread(a @ b.T)
        if is_added:
          values = [x + y for x, y in zip(pending.values, values, strict=True)]
      pending.values = values
      pending.products -= 1
      if not pending.products:
        for name, value in zip(sums, warp.sums.pop(sums).values, strict=True):
          warp.write(name, value, lanes)

    warp.products.add(finish)

  return run


def wait(i: program.Instruction) -> Any:
  """`wgmma.wait_group`: the four warps of a warpgroup multiply together.

  When one of them has waited, the operands of all have been read.
  """
  pending = int(i.operands[0])

  def run(warp: "Warp", lanes: np.ndarray) -> Callable[[], bool]:
    del lanes
    block, group = warp.block, warp.number // 4
    groups = warp.products.committed - pending

    def is_over() -> bool:
      together = block.members[4 * group : 4 * group + 4]
      if any(other.products.committed < groups for other in together):
        return False
      for other in together:
        other.products.end(groups)
      block.product_times[group] += 1
      place = block.times.start + block.warps + group
      warp.clock[place] = block.product_times[group]
      return True

    return is_over

  return run


def _reader(warp: "Warp") -> Access:
  """The tensor cores, which know what a warp knows."""
  block, group = warp.block, warp.number // 4
  number, clock = block.warps + group, warp.who.clock.copy()
  clock[number] = block.product_times[group]
  return Access(number, clock)


def _spread(product: np.ndarray) -> list[np.ndarray]:
  """`[16, n]` to the registers of a warp, `[32]` each."""
  lane = np.arange(32)
  registers = []
  for number in range(product.shape[1] // 2):
    row = lane // 4 + 8 * (number // 2 % 2)
    column = number // 4 * 8 + lane % 4 * 2 + number % 2
    registers.append(product[row, column])
  return registers


def _operand(
  warp: "Warp",
  descriptor: int,
  size: int,
  is_transposed: bool,
  kind: str,
  first: int,
) -> np.ndarray:
  """`[size, 16]` float32, rows `first` on of a matrix in shared memory."""
  start = (descriptor & 0x3FFF) << 4
  leading = (descriptor >> 16 & 0x3FFF) << 4
  stride = (descriptor >> 32 & 0x3FFF) << 4
  if descriptor >> 49 & 7:
    raise Fault("a base offset of a matrix is not known")
  width = {0: 16, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
  row = (first + np.arange(size))[:, None]
  depth = np.arange(_DEPTH)[None]
  if width == 16:
    raise NotImplementedError("matrices without a swizzle")
  if is_transposed:
    # Rows of the matrix lie side by side, `width` bytes of them; 8 of the depth
    # make a pattern.
    elements = width // 2
    plain = row % elements * 2 + depth % 8 * width
    plain = plain + row // elements * leading + depth // 8 * stride
  else:
    plain = row % 8 * width + row // 8 * stride + depth * 2
  address = transfers.swizzle(start + plain, width) - SHARED_BASE
  low, high = int(address.min()), int(address.max()) + 2
  shared = warp.block.shared.for_engine(low, high - low, _reader(warp))
  halves = shared[address[..., None] + np.arange(2)].view(np.uint16)[..., 0]
  if kind == "f16":
    return halves.view(np.float16).astype(np.float32)
  return (halves.astype(np.uint32) << 16).view(np.float32)
