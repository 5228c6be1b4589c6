# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The processes of a run: how they find each other, and what they agree on.

Every process runs the same program on its own devices. The first alone prints
and writes; what one of them finds wrong, all of them raise.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from config import SaveError, SetupError

# JAX has no public name for what `initialize` would find.
from jax._src import clusters
from jax.experimental import multihost_utils

_LAUNCHERS = (
  clusters.SlurmCluster,
  clusters.OmpiCluster,
  clusters.GkeTpuCluster,
  clusters.GceTpuCluster,
)


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags that may differ between the processes of a run."""
  flags.DEFINE_string(
    "coordinator",
    "",
    "HOST:PORT, a free port of the host of process 0. Needed only where neither"
    " Cloud TPU nor SLURM tells processes of each other.",
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "num_processes", None, "Beside --coordinator.", flag_values=flag_values
  )
  flags.DEFINE_integer(
    "process_id",
    None,
    "Beside --coordinator: from 0 on, another for each process.",
    flag_values=flag_values,
  )
  flags.DEFINE_integer(
    "heartbeat_seconds",
    100,
    "A process that is not heard of for so long has died, and all end.",
    lower_bound=1,
    flag_values=flag_values,
  )


def start(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Has the processes of a run find each other; nothing if there is one.

  To be called before JAX looks for devices.

  Args:
    flag_values: the flags of `define_flags`, parsed.

  Raises:
    SetupError: if the flags are not those of a process, or the first process
      cannot be found.
  """
  f = flag_values
  address, count, number = f.coordinator or None, f.num_processes, f.process_id
  if (address, count, number) == (None, None, None):
    if not _several():
      return
  elif (
    not re.fullmatch(r"\S+:[0-9]+", f.coordinator)
    or count is None
    or number is None
    or not 0 <= number < count
  ):
    raise SetupError(
      "--coordinator=HOST:PORT, --num_processes=N and --process_id from 0 to N - 1"
      f" go together, got {f.coordinator!r}, {count} and {number}. On Cloud TPU and"
      " under srun leave all three out."
    )
  try:
    jax.distributed.initialize(
      address, count, number, heartbeat_timeout_seconds=f.heartbeat_seconds
    )
  except (ValueError, RuntimeError) as error:
    raise SetupError(
      f"the processes did not find each other: {error} Give each of N processes"
      " --coordinator=HOST:PORT, --num_processes=N and its own --process_id."
    ) from error


def _several() -> bool:
  """Whether a launcher that JAX knows has started several processes."""
  for launcher in _LAUNCHERS:
    if launcher.is_env_present():
      return launcher.get_process_count() > 1
  return False


def is_first() -> bool:
  """Whether this is the process that prints and writes."""
  return jax.process_index() == 0


def gather(value: Any) -> list[Any]:
  """What each process has for a value, in their order; all have to call it.

  Args:
    value: JSON-like.
  """
  if jax.process_count() == 1:
    return [value]
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32(len(text)))
  row = np.zeros(sizes.max(), np.uint8)
  row[: len(text)] = text
  rows = multihost_utils.process_allgather(row)
  return [json.loads(r[:n].tobytes()) for r, n in zip(rows, sizes, strict=True)]


def agree(values: Mapping[str, Any]) -> None:
  """Raises SetupError, which names who differs, unless all have the same values.

  Args:
    values: JSON-like; the name of each, as a user knows it, to what it is here.
  """
  first, *others = gather(dict(values))
  differing = [
    f"{name}: {first[name]!r} in process 0, {there[name]!r} in process {i}"
    for i, there in enumerate(others, start=1)
    for name in first
    if there[name] != first[name]
  ]
  if differing:
    raise SetupError(
      f"the processes of a run must agree ({'; '.join(differing[:5])}). Start all"
      " with the same settings, the same corpus, and one --out that all see."
    )


@contextlib.contextmanager
def together() -> Iterator[None]:
  """Has all processes raise what one of them raises: a setup or save error.

  In it nothing may wait for another process after what can fail in one alone.
  """
  error = None
  try:
    yield
  except (SetupError, SaveError) as found:
    error = found
  kind = error and type(error).__name__
  everyone = gather([kind, str(error)] if error else None)
  if error:
    raise error
  for i, failed in enumerate(everyone):
    if failed:
      kind, text = failed
      raise (SaveError if kind == "SaveError" else SetupError)(
        f"process {i}: {text}"
      )
