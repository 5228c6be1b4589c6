# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The machine instructions that a warp executes, from a disassembly.

The code is walked from its entry. Registers whose value was known when it was
compiled are computed, so that a loop of a fixed number of trips is walked as
often as it runs, however the assembler unrolled it or moved its counter. All
others are unknown, and so are the predicates that compare them:

- A jump forward on an unknown predicate is not taken: what it might skip counts
  once, and slow paths that stand behind the end of the code do not. Which of two
  paths a warp takes by a vote for any of its threads can be said.
- A jump back on an unknown predicate is not taken either where its loop waits
  for a barrier in memory (SYNCS): a wait counts as one trip. Elsewhere the count
  depends on data, which is an error.

A function that is called, as for the slow path of a division, counts as the
call. All of it is integer arithmetic on a dozen operations; one that is not
known here makes its results unknown, which can end in an error but in no wrong
count.
"""

import operator
import re
import struct
from typing import NamedTuple

# More than any kernel of ours executes.
_LIMIT = 1_000_000
_WORD = 2**32

# Register or predicate to its value.
Values = dict[str, int]


class Instruction(NamedTuple):
  """One of a disassembly.

  Attributes:
    predicate: under which it does something; "PT" is always.
    op: with its flags.
    operands: as they are written.
    control: what the assembler tells the core of it, if that is shown:
      counters to wait for, those to set when it has read and written, whether
      others may go first, and cycles until the next.
  """

  predicate: str
  op: str
  operands: list[str]
  control: str = ""

  @property
  def base(self) -> str:
    """The operation without flags."""
    return self.op.split(".")[0]


_COMPARISONS = {
  "EQ": operator.eq,
  "NE": operator.ne,
  "LT": operator.lt,
  "LE": operator.le,
  "GT": operator.gt,
  "GE": operator.ge,
}


def executed(sass: str) -> int:
  """Machine instructions that a warp executes at most, NOP left out.

  Where warps vote, a thread needs the path that few need.

  Args:
    sass: one kernel, disassembled by nvdisasm.

  Returns:
    The count.

  Raises:
    ValueError: if the trips of a loop are not known.
  """
  return sum(step.base != "NOP" for step in walk(sass, votes=1))


def walk(sass: str, votes: int | None = None) -> list[Instruction]:
  """Lists the instructions that a warp executes, in their order.

  Args:
    sass: one kernel, disassembled by nvdisasm.
    votes: what votes of a warp for any of its threads, `VOTE.ANY`, are taken to
      find, 0 or 1; None if that is not known.

  Returns:
    Those to the first EXIT.

  Raises:
    ValueError: if the trips of a loop are not known.
  """
  code, labels = _parse(sass)
  values: Values = {}
  at, steps = 0, []
  while at < len(code) and len(steps) < _LIMIT:
    step = code[at]
    op, operands = step.op, step.operands
    holds = _value(step.predicate, values)
    steps.append(step)
    if step.base == "EXIT" and holds:
      return steps
    if step.base == "BRA":
      # A second predicate may stand before the label.
      for extra in operands[:-1]:
        also = _value(extra, values)
        holds = also if holds else holds
      label = labels[operands[-1].strip("`()")]
      if holds is None and label <= at:
        if not any(other.base == "SYNCS" for other in code[label : at + 1]):
          raise ValueError(
            f"expected loops of a fixed number of trips; that to {operands[-1]}"
            " depends on data, or on an operation that is not known here"
          )
      at = label if holds else at + 1
      continue
    if holds is None or not _compute(op, operands, values):
      for name in _written(op, operands):
        values.pop(name, None)
      is_vote = holds and op == "VOTE.ANY" and _is_predicate(operands[0])
      if is_vote and votes is not None:
        values[operands[0]] = votes
    at += 1
  raise ValueError(f"expected EXIT within {_LIMIT} instructions, found none")


def _parse(sass: str) -> tuple[list[Instruction], dict[str, int]]:
  """Every instruction; and the places of the labels."""
  code, labels = [], {}
  for line in sass.splitlines():
    if label := re.match(r"(\.L_x_\d+):", line):
      labels[label[1]] = len(code)
    elif found := re.search(
      r"([^\s/]*)\s*/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*)",
      line,
    ):
      operands = [x.strip() for x in found[4].split(",") if x.strip()]
      code.append(Instruction(found[2] or "PT", found[3], operands, found[1]))
  return code, labels


def _value(operand: str, values: Values) -> int | None:
  """An operand as an unsigned word, or a predicate as 0 or 1; None: unknown."""
  text = operand.removesuffix(".reuse")
  if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
    return int(text, 0) % _WORD
  if text[0] in "-~!":
    value = _value(text[1:], values)
    if value is None:
      return None
    return {"-": -value, "~": ~value, "!": 1 - value}[text[0]] % _WORD
  if text in ("RZ", "URZ", "SRZ"):
    return 0
  if text in ("PT", "UPT"):
    return 1
  return values.get(text)


def _written(op: str, operands: list[str]) -> list[str]:
  """The registers and predicates that an instruction may write."""
  base, *flags = op.split(".")
  if not operands:
    return []
  if base == "R2P":
    return [f"P{i}" for i in range(7)]
  if _is_predicate(operands[0]):
    return operands[:2]
  found = re.fullmatch(r"(U?R)(\d+)", operands[0])
  if not found:
    return []
  width = 1
  if {"64", "WIDE"} & set(flags) or base in ("CS2R", "FADD2", "FMUL2", "FFMA2"):
    width = 2
  if "128" in flags or base in ("ATOM", "ATOMS", "ATOMG"):
    width = 4
  if base == "LDSM":
    # So many matrices of 8 x 8.
    width = next((n for n in (4, 2) if str(n) in flags), 1)
  names = [f"{found[1]}{int(found[2]) + i}" for i in range(width)]
  # A sum writes its carry, too.
  return names + [x for x in operands[1:3] if _is_predicate(x)]


def _is_predicate(operand: str) -> bool:
  return re.fullmatch(r"U?P(\d|T)", operand) is not None


def _compute(op: str, operands: list[str], values: Values) -> bool:
  """Writes the results of an instruction, if it is known; returns whether."""
  base, *flags = op.split(".")
  written = _written(op, operands)
  sources = [
    _value(x, values)
    for x in operands[1:]
    if base.endswith(("SETP", "PLOP3")) or not _is_predicate(x)
  ]
  results: list[int | None]
  match base.removeprefix("U"), sources:
    case "CS2R", [0]:
      results = [0, 0]
    case "MOV" | "R2UR", [int(a)] if not flags or flags == ["U32"]:
      results = [a]
    case "IADD3" | "VIADD" | "IADD", _ if not flags and None not in sources:
      results = [sum(x for x in sources if x is not None)]
    case "IMAD", [int(a), int(b), int(c)] if not {"WIDE", "HI", "X"} & {*flags}:
      results = [a * b + c]
    case "HFMA2", [0, 0, *_]:
      # The assembler's way to write a small number.
      high, low = (struct.pack("<e", float(x)) for x in operands[-2:])
      results = [int.from_bytes(low + high, "little")]
    case "ISETP", [_, int(a), int(b), int(c)] if "EX" not in flags:
      if "U32" not in flags:
        a, b = ((x ^ 2**31) - 2**31 for x in (a, b))
      result = _COMPARISONS[flags[0]](a, b)
      results = [result & c if "AND" in flags else result | c, None]
    case "PLOP3", [_, int(a), int(b), int(c), int(table), _]:
      results = [table >> (4 * a + 2 * b + c) & 1, None]
    case _:
      return False
  for name in written:
    values.pop(name, None)
  for name, result in zip(written, results, strict=False):
    if result is not None:
      values[name] = int(result) % _WORD
  return True
