# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What PTX instructions do to a warp, as functions of the warp and the lanes."""

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from ptx import (
  arithmetic,
  barriers,
  memory,
  program,
  tensor_cores,
  transfers,
)
from ptx.memory import WARP, Fault

if TYPE_CHECKING:
  from ptx.machine import Warp

_LANES = np.arange(WARP)
Step = Callable[["Warp", np.ndarray], Any]
"""Returns None; or, of an instruction that waits, a function: is the wait over?"""


def step(i: program.Instruction) -> Step:
  """What an instruction does, as a function of a warp and lanes."""
  kind = i.parts[0]
  for prefix, make in _STEPS.items():
    if i.name.startswith(prefix):
      return make(i)
  if i.parts[-1] == "f32x2":
    return _compute_pairs(i)
  dtype = arithmetic.DTYPES.get(i.parts[-1])
  function = None if dtype is None else arithmetic.operation(i.parts, dtype)
  if function is None:
    raise NotImplementedError(f"no meaning is known of {i.text!r}")
  target, *sources = i.operands
  # The last operand of some is of another type than the others.
  types = [dtype] * len(sources)
  if kind in ("shl", "shr", "bfe"):
    types[1:] = [np.uint32] * (len(sources) - 1)
  elif kind == "selp":
    types[-1] = np.bool_
  elif kind == "mad" and "wide" in i.parts:
    types[-1] = {np.int32: np.int64, np.uint32: np.uint64}[dtype]

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    values = [warp.value(s, t) for s, t in zip(sources, types, strict=True)]
    warp.write(target, _computed(kind, function, values), lanes)

  return run


def _computed(
  kind: str, function: Callable[..., np.ndarray], values: list[np.ndarray]
) -> np.ndarray:
  with np.errstate(all="ignore"):
    result = function(*values)
  if result.dtype == np.float32 and kind in arithmetic.CANONICAL_NAN:
    result = np.where(np.isnan(result), arithmetic.NAN, result)
  return result


def _compute_pairs(i: program.Instruction) -> Step:
  """Arithmetic on two float32 in a register of 64 bits, as Blackwell has."""
  function = arithmetic.operation(i.parts, np.float32)
  if function is None:
    raise NotImplementedError(f"no meaning is known of {i.text!r}")
  target, *sources = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    values = [
      np.ascontiguousarray(warp.value(s, np.uint64)).view(np.float32)
      for s in sources
    ]
    result = _computed(i.parts[0], function, values)
    warp.write(target, result.view(np.uint64), lanes)

  return run


def _move_vector(i: program.Instruction) -> Step:
  """`mov` of several registers to one, or of one to several."""
  target, source = i.operands
  dtype = arithmetic.DTYPES[i.parts[-1]]
  if not isinstance(target, tuple) and not isinstance(source, tuple):

    def move(warp: "Warp", lanes: np.ndarray) -> None:
      warp.write(target, warp.value(source, dtype), lanes)

    return move

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    if isinstance(source, tuple):
      part = np.dtype(f"u{np.dtype(dtype).itemsize // len(source)}").type
      values = np.stack([warp.value(s, part) for s in source], axis=-1)
      warp.write(target, np.ascontiguousarray(values).view(dtype)[:, 0], lanes)
      return
    part = np.dtype(f"u{np.dtype(dtype).itemsize // len(target)}").type
    values = warp.value(source, dtype).copy().view(part).reshape(WARP, -1)
    for name, value in zip(target, values.T, strict=True):
      warp.write(name, np.ascontiguousarray(value), lanes)

  return run


def _compare(i: program.Instruction) -> Step:
  """`setp`, with another predicate to combine with or without."""
  how, dtype = i.parts[1], arithmetic.DTYPES[i.parts[-1]]
  combine = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
  target, a, b, *other = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    values = [warp.value(x, dtype) for x in (a, b)]
    if i.parts[-1] == "bf16":
      values = [arithmetic.from_bfloat16(x) for x in values]
    found = arithmetic.compare(how, *values)
    for name, value in zip(target.split("|"), (found, ~found), strict=False):
      if other:
        value = combine[i.parts[2]](value, warp.value(other[0], np.bool_))
      warp.write(name, value, lanes)

  return run


def _convert(i: program.Instruction) -> Step:
  target, *sources = i.operands
  dtype = arithmetic.DTYPES[i.parts[-1]]

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    values = [warp.value(s, dtype) for s in sources]
    if "bf16x2" in i.parts:
      high, low = map(arithmetic.to_bfloat16, values)
      warp.write(target, (high << 16) | low, lanes)
    elif "f16x2" in i.parts:
      high, low = (v.astype(np.float16).view(np.uint16) for v in values)
      warp.write(target, (high.astype(np.uint32) << 16) | low, lanes)
    elif i.parts[-1] == "bf16":
      warp.write(target, arithmetic.from_bfloat16(values[0]), lanes)
    elif i.parts[-2] == "bf16":
      warp.write(
        target, arithmetic.to_bfloat16(values[0]).astype(np.uint16), lanes
      )
    else:
      with np.errstate(all="ignore"):
        warp.write(target, arithmetic.convert(i.parts, values[0]), lanes)

  return run


def _copy_address(i: program.Instruction) -> Step:
  target, source = i.operands
  return lambda warp, lanes: warp.write(
    target, warp.value(source, np.uint64), lanes
  )


def _registers(operand: Any) -> tuple[str, ...]:
  return operand if isinstance(operand, tuple) else (operand,)


def _load(i: program.Instruction) -> Step:
  names, address = _registers(i.operands[0]), i.operands[1]
  dtype = np.dtype(arithmetic.DTYPES[i.parts[-1]])
  size, space = dtype.itemsize * len(names), i.parts[1]

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    if space == "param":
      warp.write(names[0], warp.value(address.strip("[]"), dtype.type), lanes)
      return
    at = warp.address(address)[lanes]
    block = warp.block
    if space == "shared":
      data = block.shared.load(at, size, _LANES[lanes], warp.who)
    else:
      data = block.launch.memory.load(at, size, warp.threads[lanes])
    values = np.zeros((WARP, len(names)), dtype)
    values[lanes] = np.ascontiguousarray(data).view(dtype)
    for name, value in zip(names, values.T, strict=True):
      warp.write(name, np.ascontiguousarray(value), lanes)

  return run


def _store(i: program.Instruction) -> Step:
  address, names = i.operands[0], _registers(i.operands[1])
  dtype = np.dtype(arithmetic.DTYPES[i.parts[-1]])
  is_shared = "shared" in i.parts

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    values = np.stack(
      [warp.value(n, dtype.type)[lanes] for n in names], axis=-1
    )
    data = np.ascontiguousarray(values).view(np.uint8)
    at = warp.address(address)[lanes]
    if is_shared:
      warp.block.shared.store(at, data, _LANES[lanes], warp.who)
    else:
      warp.block.launch.memory.store(at, data, warp.threads[lanes])

  return run


def _atomic(i: program.Instruction) -> Step:
  """`red` and `atom`, of global memory."""
  is_red = i.parts[0] == "red"
  target, address, source = ("_", *i.operands) if is_red else i.operands
  dtype = np.dtype(arithmetic.DTYPES[i.parts[-1]])
  if "add" not in i.parts or "global" not in i.parts:
    raise NotImplementedError(f"no meaning is known of {i.text!r}")

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    ram, values = warp.block.launch.memory, warp.value(source, dtype.type)
    found = np.zeros(WARP, dtype)
    # Lanes may add to the same address.
    for lane in _LANES[lanes]:
      at = warp.address(address)[[lane]]
      old = ram.load(at, dtype.itemsize, memory.ATOMIC).view(dtype)[:, 0]
      found[lane] = old[0]
      new = (old + values[lane]).astype(dtype)[:, None].view(np.uint8)
      ram.store(at, new, memory.ATOMIC)
    warp.write(target, found, lanes)

  return run


def _shuffle(i: program.Instruction) -> Step:
  target, source, by, clamp, mask = i.operands
  how, (name, *is_in_range) = i.parts[2], target.split("|")

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    if warp.value(mask, np.int32)[0] != -1 or not lanes.all():
      raise Fault("a shuffle of some lanes only")
    x, distance = warp.value(source, np.uint32), warp.value(by, np.int32)
    c = warp.value(clamp, np.int32)
    segment, limit = (c >> 8) & 31, c & 31
    first = _LANES & segment
    last = first | (limit & ~segment)
    at = {
      "idx": first | (distance & ~segment),
      "bfly": _LANES ^ distance,
      "up": _LANES - distance,
      "down": _LANES + distance,
    }[how]
    fits = at >= limit if how == "up" else at <= last
    warp.write(name, x[np.where(fits, at, _LANES)], lanes)
    for predicate in is_in_range:
      warp.write(predicate, fits, lanes)

  return run


def _vote(i: program.Instruction) -> Step:
  target, predicate, _ = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    if i.parts[2] not in ("ballot", "any") or not lanes.all():
      raise Fault("only votes of all lanes are known")
    flags = warp.value(predicate, np.bool_)
    if i.parts[2] == "any":
      warp.write(target, flags.any(), lanes)
      return
    bits = np.sum(flags.astype(np.uint64) << _LANES.astype(np.uint64))
    warp.write(target, np.array(bits, np.uint64).astype(np.uint32), lanes)

  return run


def _elect(i: program.Instruction) -> Step:
  name, predicate = i.operands[0].split("|")

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    first = _LANES[lanes][0]
    warp.write(name, np.uint32(first), lanes)
    warp.write(predicate, _LANES == first, lanes)

  return run


def _matrix_rows(
  warp: "Warp", i: program.Instruction, operand: str
) -> np.ndarray:
  """Addresses `[matrices, 8]` of rows of 16 bytes."""
  count = int(i.parts[4][1:])
  return warp.address(operand)[: 8 * count].reshape(count, 8)


def _load_matrix(i: program.Instruction) -> Step:
  names, address = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    rows = _matrix_rows(warp, i, address)
    for name, at in zip(names, rows, strict=True):
      if "trans" in i.parts:
        data = warp.block.shared.load(at, 16, _LANES[:8], warp.who)
        halves = np.ascontiguousarray(data).view(np.uint16).T
        words = np.ascontiguousarray(halves).view(np.uint32).reshape(-1)
      else:
        at = (at[:, None] + 4 * np.arange(4)).reshape(-1)
        data = warp.block.shared.load(at, 4, _LANES, warp.who)
        words = np.ascontiguousarray(data).view(np.uint32)[:, 0]
      warp.write(name, words, lanes)

  return run


def _store_matrix(i: program.Instruction) -> Step:
  address, names = i.operands

  def run(warp: "Warp", lanes: np.ndarray) -> None:
    rows = _matrix_rows(warp, i, address)
    for name, at in zip(names, rows, strict=True):
      words = warp.value(name, np.uint32)
      if "trans" in i.parts:
        halves = np.ascontiguousarray(words).view(np.uint16).reshape(8, 8).T
        data = np.ascontiguousarray(halves).view(np.uint8)
        warp.block.shared.store(at, data, _LANES[:8], warp.who)
      else:
        at = (at[:, None] + 4 * np.arange(4)).reshape(-1)
        data = np.ascontiguousarray(words)[:, None].view(np.uint8)
        warp.block.shared.store(at, data, _LANES, warp.who)

  return run


def _nothing(i: program.Instruction) -> Step:
  del i
  return lambda warp, lanes: None


def _fence(i: program.Instruction) -> Step:
  del i
  return lambda warp, lanes: warp.block.shared.fence(warp.number)


_STEPS: dict[str, Callable[[program.Instruction], Step]] = {
  # `machine` follows these.
  "bra": _nothing,
  "ret": _nothing,
  "exit": _nothing,
  "setp": _compare,
  "cvta": _copy_address,
  "cvt.": _convert,
  "mov.b": _move_vector,
  "ld.": _load,
  "st.": _store,
  "red.": _atomic,
  "atom.": _atomic,
  "shfl.sync": _shuffle,
  "vote.sync": _vote,
  "elect.sync": _elect,
  "ldmatrix": _load_matrix,
  "stmatrix": _store_matrix,
  "bar.warp.sync": barriers.wait_for_warp,
  "bar.sync": barriers.wait_for_block,
  "barrier.sync": barriers.wait_for_block,
  "barrier.cluster": barriers.meet_cluster,
  "mapa.shared::cluster": barriers.map_address,
  "mbarrier.init": barriers.init_mbarrier,
  "mbarrier.arrive": barriers.arrive,
  "mbarrier.try_wait": barriers.try_wait,
  "fence.proxy.async": _fence,
  "fence.mbarrier_init": _nothing,
  "prefetch": _nothing,
  "setmaxnreg": _nothing,
  "cp.async.bulk.tensor": transfers.copy,
  "cp.async.bulk.commit_group": transfers.commit,
  "cp.async.bulk.wait_group": transfers.wait,
  "wgmma.fence": _nothing,
  "wgmma.mma_async": tensor_cores.multiply,
  "wgmma.commit_group": functools.partial(transfers.commit, queue="products"),
  "wgmma.wait_group": tensor_cores.wait,
}
