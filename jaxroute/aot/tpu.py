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
from collections.abc import Callable
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
class Profile:
  """What the compiler says of one program.

  Attributes:
    cycles: of one core, the sum of the compiler's static estimates of all ops. A
      loop counts about once, and what a SparseCore does not at all.
    moved: bytes of arguments and results in HBM.
    temporaries: bytes in HBM.
    vmem: bytes of vector memory that the op with the most of it takes.
  """

  cycles: int
  moved: int
  temporaries: int
  vmem: int


def missing() -> str:
  """Why nothing can be compiled for a TPU here, and how to mend it; or ""."""
  if importlib.util.find_spec("libtpu") is None:
    return (
      "libtpu, the compiler for TPUs, is not installed: pip install libtpu, on"
      " Linux on x86-64"
    )
  return ""


def version() -> str:
  """The version of libtpu, the compiler."""
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
  text, moved, memory = _compiled(make, *args)
  used = r'"used_scoped_memory_configs":\[{"memory_space":"1".*?"size":"(\d+)"'
  return Profile(
    cycles=_cycles(folder, text),
    moved=moved,
    temporaries=memory.temp_size_in_bytes,
    vmem=max(map(int, re.findall(used, text)), default=0),
  )


def _compiled(
  make: Callable[..., jax.stages.Compiled], *args: Any
) -> tuple[str, int, Any]:
  """The text of a program, what it moves, and the memory that it takes."""
  jax.config.update("jax_platforms", "cpu")
  # What is in the cache is not compiled.
  jax.config.update("jax_enable_compilation_cache", False)
  compiled = make(*args)
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text is not None and memory is not None
  moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
  return text, moved, memory


def _cycles(folder: pathlib.Path, text: str) -> int:
  """The sum over all ops; of several that are the same one is estimated."""
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
    same[without_names(op)].append(name)
  for names in same.values():
    known = [cycles[name] for name in names if name in cycles]
    if known and len(names) > 1:
      cycles.update({n: known[0] for n in names if n not in cycles})
  return cycles.total()


def without_names(op: str) -> str:
  """An op of a compiled program; of several that are the same one is compiled.

  Args:
    op: as the program's text has it, after its name.

  Returns:
    What is the same for all of them.
  """
  return re.sub(r"%\S+?(?=[,)])|, metadata=.*|, backend_config=.*", "", op)


def listing(
  make: Callable[..., jax.stages.Compiled], *args: Any, dump_to: pathlib.Path
) -> tuple[str, int]:
  """Compiles in a process of its own, and keeps the instructions of all kernels.

  Args:
    make: as of `profile`.
    *args: its arguments.
    dump_to: the folder for them.

  Returns:
    The text of the program, and the bytes of arguments and results in HBM.

  Raises:
    RuntimeError: if the compiler ended its process.
  """
  options = f"--xla_jf_dump_to={dump_to} --xla_jf_dump_llo_text=true"
  return process.apart(
    _listing,
    make,
    *args,
    environment=_ENVIRONMENT | {"LIBTPU_INIT_ARGS": options},
  )


def _listing(
  make: Callable[..., jax.stages.Compiled], *args: Any
) -> tuple[str, int]:
  """See `listing`."""
  text, moved, _ = _compiled(make, *args)
  return text, moved
