# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Signals that ask a run to stop: all its processes do, after the same step."""

import contextlib
import itertools
import os
import signal
import threading
import types
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

# Of all runs of this process: JAX wants numbers that grow.
_CALLS = itertools.count(1)


class Stop:
  """Whether the run is to stop.

  Attributes:
    number: the signal that asked for it, 0 so far.
  """

  number = 0

  def reached(self) -> bool:
    """Whether to stop after this step; to be asked once a step, by all processes.

    Where there are several, a signal to one is passed on by JAX, and true for all
    after the same step, a second or two later.
    """
    if jax.process_count() > 1:
      reached = multihost_utils.reached_preemption_sync_point(next(_CALLS))
      if reached and not self.number:
        self.number = signal.SIGTERM
      return reached
    return self.number > 0


@contextlib.contextmanager
def on_signal() -> Iterator[Stop]:
  """Notes the first SIGINT or SIGTERM; a second one has its default effect.

  Of several processes, JAX itself waits for SIGTERM, and SIGINT becomes one.
  """
  stop = Stop()
  default = {
    signal.SIGINT: signal.default_int_handler,
    signal.SIGTERM: signal.SIG_DFL,
  }
  if jax.process_count() > 1:
    del default[signal.SIGTERM]

  def note(number: int, frame: types.FrameType | None) -> None:
    del frame
    stop.number = number
    for each, handler in default.items():
      signal.signal(each, handler)
    if jax.process_count() > 1:
      os.kill(os.getpid(), signal.SIGTERM)

  if threading.current_thread() is not threading.main_thread():
    yield stop
    return
  before = {number: signal.signal(number, note) for number in default}
  try:
    yield stop
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)
