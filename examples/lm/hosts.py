# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The processes of a run: how they find each other, and what they agree on.

Every process runs the same program on its own devices. The first alone prints
and writes; what one of them finds wrong, all of them raise.
"""

import contextlib
import faulthandler
import json
import os
import re
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from absl import flags
from config import SaveError, SetupError

# JAX has no public name for what `initialize` would find, nor for its store.
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

_LAUNCHERS = (
  clusters.SlurmCluster,
  clusters.OmpiCluster,
  clusters.GkeTpuCluster,
  clusters.GceTpuCluster,
)
_NOT_FOUND = "the processes did not find each other"
_MEND = (
  "Start the same command on all hosts at about the same time; where neither"
  " Cloud TPU nor SLURM tells them of each other, give each of N"
  " --coordinator=HOST:PORT (of process 0, a free port that all reach),"
  " --num_processes=N and its own --process_id."
)
# Seconds for the processes to find each other, and to wait in silence.
_PATIENCE, _SILENCE = 300, 20


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
    not _is_address(f.coordinator)
    or count is None
    or number is None
    or not 0 <= number < count
  ):
    raise SetupError(
      "--coordinator=HOST:PORT, --num_processes=N and --process_id from 0 to N - 1"
      f" go together, got {f.coordinator!r}, {count} and {number}. On Cloud TPU and"
      " under srun leave all three out."
    )
  # JAX ends a process in C++ if another is lost, and says so. The stacks of all
  # threads would hide that.
  faulthandler.disable()
  try:
    with _patience("" if address is None else f" {count}, at {address}"):
      jax.distributed.initialize(
        address,
        count,
        number,
        initialization_timeout=2 * _PATIENCE,
        heartbeat_timeout_seconds=f.heartbeat_seconds,
      )
  except (ValueError, RuntimeError) as error:
    reason = str(error).strip().split("\n")[0]
    raise SetupError(f"{_NOT_FOUND}: {reason}. {_MEND}") from error
  if count is not None:
    _agree_on_count(count, number)


def _is_address(text: str) -> bool:
  found = re.fullmatch(r"\S+:0*([1-9][0-9]{0,4})", text)
  return bool(found) and int(found[1]) < 2**16


@contextlib.contextmanager
def _patience(whom: str) -> Iterator[None]:
  """Says that it waits, if it takes long, and ends this process if too long.

  JAX would end it, too, but by an abort that does not say what to do.
  """

  def say(text: str) -> None:
    print(f"train.py: {text}", file=sys.stderr, flush=True)

  def end() -> None:
    say(f"{_NOT_FOUND} in {_PATIENCE} s. {_MEND}")
    os._exit(2)

  note = f"waiting for all processes{whom} ({_PATIENCE} s at most)."
  timers = [
    threading.Timer(_SILENCE, say, [note]),
    threading.Timer(_PATIENCE, end),
  ]
  for timer in timers:
    timer.daemon = True
    timer.start()
  try:
    yield
  finally:
    for timer in timers:
      timer.cancel()


def _agree_on_count(count: int, number: int) -> None:
  """Raises SetupError unless all have been given the same --num_processes.

  Devices would be waited for that no process has.
  """
  store: Any = distributed.global_state.client
  store.key_value_set(f"num_processes/{number}", str(count))
  for i in range(count) if number == 0 else [0]:
    there = store.blocking_key_value_get(f"num_processes/{i}", 1000 * _PATIENCE)
    if there != str(count):
      raise SetupError(
        f"--num_processes must be the same in all processes, got {count} in"
        f" process {number} and {there} in process {i}."
      )


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
