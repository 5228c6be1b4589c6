# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The text of a PTX kernel as a list of instructions."""

import dataclasses
import functools
import re

_DECLARED = re.compile(r"\.reg\s+\.\w+\s+(\w+)\s*;|^\s*(\w+):", re.MULTILINE)
_GUARD = re.compile(r"@(!?)([%\w]+)\s+")
# Words of a statement that is not an instruction.
_DIRECTIVE = re.compile(r"\.(reg|loc|file|shared|align|param|pragma)\b")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One instruction.

  Attributes:
    name: its first word, such as "setp.lt.f32".
    operands: what stands between commas; lists in braces are tuples.
    guard: the predicate it waits for, and whether that must not hold; or None.
    text: as it was written.
    source: the file and line that it comes from.
  """

  name: str
  operands: tuple["str | tuple[str, ...]", ...]
  guard: tuple[str, bool] | None
  text: str
  source: str = ""

  @property
  def parts(self) -> list[str]:
    """The name between dots."""
    return re.split(r"\.|::", self.name)

  @functools.cached_property
  def ends(self) -> bool:
    """Whether it ends a thread."""
    return self.name in ("ret", "exit")

  @functools.cached_property
  def jumps(self) -> bool:
    """Whether another than the next may follow."""
    return self.ends or self.parts[0] == "bra"

  @functools.cached_property
  def needs_all(self) -> bool:
    """Whether all lanes of a warp have to be there."""
    if self.parts[0] == "elect":
      return False
    together = {"sync", "aligned", "setmaxnreg"}
    return not together.isdisjoint(self.parts)


@dataclasses.dataclass(frozen=True)
class Program:
  """A kernel.

  Attributes:
    name: of its entry.
    params: names of its parameters, in order.
    threads: of a block.
    instructions: in order.
    labels: the number of the instruction behind a label.
  """

  name: str
  params: tuple[str, ...]
  threads: int
  instructions: tuple[Instruction, ...]
  labels: dict[str, int]


def parse(text: str) -> Program:
  """Reads the only kernel of a module.

  Args:
    text: PTX.

  Returns:
    `Program`.
  """
  text = re.sub(r"//[^\n]*", "", text)
  entry = re.search(r"\.entry (\w+)\((.*?)\)(.*?)\n\{", text, re.DOTALL)
  assert entry is not None
  name, params, head = entry.groups()
  threads = re.search(r"\.maxntid (\d+)", head)
  assert threads is not None
  body = text[entry.end() : text.index("$L__func_end")]
  files = dict(re.findall(r'\.file\s+(\d+) "(.*?)"', text))
  instructions: list[Instruction] = []
  labels: dict[str, int] = {}
  source = ""
  # A line of debug information ends without a semicolon.
  body = re.sub(r"(\.loc[^\n]*)\n", r"\1;\n", body)
  for statement in _with_scopes_named(_apart(body)).split(";"):
    while start := re.match(r"\s*(?:[{}]|([$\w]+):(?!:))", statement):
      if start[1]:
        labels[start[1]] = len(instructions)
      statement = statement[start.end() :]
    statement = " ".join(statement.split())
    if place := re.match(r"\.loc\s+(\d+) (\d+)", statement):
      source = f"{files[place[1]].rpartition('/')[2]}:{place[2]}"
    if not statement or _DIRECTIVE.match(statement):
      continue
    instructions.append(
      dataclasses.replace(_instruction(statement), source=source)
    )
  return Program(
    name=name,
    params=tuple(re.findall(rf"{name}_param_\d+", params)),
    threads=int(threads[1]),
    instructions=tuple(instructions),
    labels=labels,
  )


def _apart(body: str) -> str:
  """The text with scopes in braces on lines of their own, where no list is."""
  hidden = re.sub(r"\{([^{};]*)\}", "\x01\\1\x02", body)
  apart = re.sub(r"\{([^{}]*)\}", "\n{\n\\1\n}\n", hidden)
  return apart.replace("\x01", "{").replace("\x02", "}")


def _with_scopes_named(body: str) -> str:
  """Gives what is declared within braces a name of its own."""
  number = 0

  def rename(scope: re.Match[str]) -> str:
    nonlocal number
    number += 1
    text = scope[1]
    for declared in {a or b for a, b in _DECLARED.findall(text)}:
      text = re.sub(rf"(?<![%$\w.]){declared}\b", f"{declared}_{number}", text)
    return text

  return re.sub(r"\n\{\n(.*?)\n\}\n", rename, body, flags=re.DOTALL)


def _instruction(statement: str) -> Instruction:
  guard, rest = None, statement
  if found := _GUARD.match(statement):
    guard = found[2], bool(found[1])
    rest = statement[found.end() :]
  name, _, operands = rest.partition(" ")
  return Instruction(name, _operands(operands), guard, statement)


def _operands(text: str) -> tuple["str | tuple[str, ...]", ...]:
  """Splits at commas outside of braces and brackets."""
  found, depth, word = [], 0, ""
  for c in text + ",":
    depth += (c in "{[") - (c in "}]")
    if c == "," and not depth:
      word = word.strip()
      if word.startswith("{"):
        found.append(tuple(x.strip() for x in word[1:-1].split(",")))
      elif word:
        found.append(word)
      word = ""
    else:
      word += c
  return tuple(found)
