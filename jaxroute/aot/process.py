# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Processes of their own, for compilers that keep what they once did."""

import concurrent.futures
import multiprocessing
import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

_T = TypeVar("_T")


def apart(
  function: Callable[..., _T],
  *args: Any,
  environment: Mapping[str, str] | None = None,
) -> _T:
  """`function(*args)`, in a process of its own.

  Args:
    function: of a module that can be imported.
    *args: what can be pickled.
    environment: variables that are set there first, before a compiler is loaded.

  Returns:
    What it returns.

  Raises:
    RuntimeError: if the process died.
  """
  spawn = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
    return pool.submit(_run, dict(environment or {}), function, *args).result()


def _run(
  environment: dict[str, str], function: Callable[..., _T], *args: Any
) -> _T:
  os.environ.update(environment)
  return function(*args)
