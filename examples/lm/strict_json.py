# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""JSON of numbers that may be NaN or infinite, which JSON has no word for."""

import json
import math
from typing import Any


def dumps(value: Any, **options: Any) -> str:
  """`json.dumps`, with null for numbers that are not finite."""
  return json.dumps(_finite(value), allow_nan=False, **options)


def loads(text: str | bytes) -> Any:
  """`json.loads`, with NaN for null."""
  return _numbers(json.loads(text))


def _finite(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _finite(v) for k, v in value.items()}
  if isinstance(value, (list, tuple)):
    return [_finite(v) for v in value]
  if isinstance(value, float) and not math.isfinite(value):
    return None
  return value


def _numbers(value: Any) -> Any:
  if isinstance(value, dict):
    return {k: _numbers(v) for k, v in value.items()}
  if isinstance(value, list):
    return [_numbers(v) for v in value]
  return float("nan") if value is None else value
