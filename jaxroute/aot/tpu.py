# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The TPU compiler without a TPU: where it is, and what it says of a program."""

import collections
import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxroute.aot import process

# The compiler works without a TPU, but looks for one, and for others that use it,
# unless told not to.
_ENVIRONMENT = {
  "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  "TPU_ACCELERATOR_TYPE": "v5litepod-4",
  "TPU_SKIP_MDS_QUERY": "1",
  "TPU_WORKER_HOSTNAMES": "localhost",
}


@dataclasses.dataclass(frozen=True)
class Op:
  """What the compiler says of one op.

  Attributes:
    name: in the compiled program.
    code: name of the op whose instructions it runs: of several that are the same
      one is compiled.
    cycles: the compiler's static estimate. A loop counts about once, and what a
      SparseCore does not at all.
  """

  name: str
  code: str
  cycles: int


@dataclasses.dataclass(frozen=True)
class Profile:
  """What the compiler says of one program.

  Attributes:
    ops: of one core, those that are estimated.
    moved: bytes of arguments and results in HBM.
    temporaries: bytes in HBM.
    vmem: bytes of vector memory that the op with the most of it takes.
  """

  ops: Sequence[Op]
  moved: int
  temporaries: int
  vmem: int

  @property
  def cycles(self) -> int:
    """The sum over all ops."""
    return sum(op.cycles for op in self.ops)


def missing() -> str:
  """Why nothing can be compiled for a TPU here, and how to mend it; or ""."""
  if importlib.util.find_spec("libtpu") is None:
    return (
      "libtpu, the compiler for TPUs, is not installed: pip install libtpu, on"
      " Linux on x86-64"
    )
  return ""


def version() -> str:
  """That of the compiler."""
  return importlib.metadata.version("libtpu")


def prepare() -> None:
  """Sets what the compiler needs where there is no TPU; before it is loaded."""
  for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)


def lacking(error: Exception) -> tuple[float, float] | None:
  """The memory that a program needs, and what there is, if that is the error.

  Args:
    error: of the compiler.

  Returns:
    Bytes, twice; or None.
  """
  found = re.search(
    r"Used ([\d.]+[GT]) of ([\d.]+G) hbm|"
    r"total memory required[^(]*\(([\d.]+[GT])\)[^(]*\(([\d.]+G)\)",
    str(error),
  )
  if found is None:
    return None
  units = {"G": 2**30, "T": 2**40}
  needed, there = (float(g[:-1]) * units[g[-1]] for g in found.groups() if g)
  return needed, there


def profile(
  make: Callable[..., jax.stages.Compiled],
  *args: Any,
  dump_to: pathlib.Path | None = None,
) -> Profile:
  """Compiles in a process of its own, and reads what the compiler estimates.

  Args:
    make: what compiles; of a module that can be imported.
    *args: its arguments, which can be pickled.
    dump_to: a folder for the instructions of all kernels, or None.

  Returns:
    `Profile`.

  Raises:
    RuntimeError: if the compiler ended its process, or estimated nothing.
  """
  with tempfile.TemporaryDirectory() as folder:
    options = f"--xla_jf_dump_static_llo_profile_to={folder}"
    if dump_to:
      options += f" --xla_jf_dump_to={dump_to} --xla_jf_dump_llo_text=true"
    return process.apart(
      _profile,
      pathlib.Path(folder),
      make,
      *args,
      environment=_ENVIRONMENT | {"LIBTPU_INIT_ARGS": options},
    )


def _profile(
  folder: pathlib.Path, make: Callable[..., jax.stages.Compiled], *args: Any
) -> Profile:
  """See `profile`, which has the compiler write to `folder`."""
  jax.config.update("jax_platforms", "cpu")
  # What is in the cache is not compiled.
  jax.config.update("jax_enable_compilation_cache", False)
  compiled = make(*args)
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None and memory is not None
  used = r'"used_scoped_memory_configs":\[{"memory_space":"1".*?"size":"(\d+)"'
  return Profile(
    ops=_ops(folder, text),
    moved=memory.argument_size_in_bytes + memory.output_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    vmem=max(map(int, re.findall(used, text)), default=0),
  )


def _ops(folder: pathlib.Path, text: str) -> list[Op]:
  """All ops that the compiler estimated, and those that are the same as one."""
  cycles: collections.Counter[str] = collections.Counter()
  for path in folder.glob("*_static_llo_profile.textproto"):
    for op, n in re.findall(
      r'hlo_op_name: "([^"]+)"\s+estimated_cycles: (\d+)', path.read_text()
    ):
      cycles[op] += int(n)
  if not cycles:
    raise RuntimeError("the TPU compiler wrote no estimate of the program")
  same = collections.defaultdict(list)
  for name, op in re.findall(r"%(\S+) = (.*)", text):
    op = re.sub(r"%\S+?(?=[,)])|, metadata=.*|, backend_config=.*", "", op)
    same[op].append(name)
  ops = [Op(name, name, n) for name, n in cycles.items()]
  for names in same.values():
    known = next((name for name in names if name in cycles), None)
    if known is not None:
      others = [name for name in names if name not in cycles]
      ops += [Op(name, known, cycles[known]) for name in others]
  return ops
