# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Checks of arguments: what was expected, what came, and how to mend the call.

They look at types, shapes and dtypes, and at numbers that are known before
tracing; never at what an array holds. All raise ValueError; `fix` is a sentence.
"""

import numbers
import re
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

# What an array may hold, in the words of the messages.
_DTYPES = {
  "": (np.generic,),
  "bool": (np.bool_,),
  "floating point": (jnp.floating,),
  "integer": (jnp.integer,),
  "real": (jnp.integer, jnp.floating),
  # Counts: sums in fewer bits wrap, and so do differences without a sign.
  "int32 or int64": (np.int32, np.int64),
}


def check_array(
  name: str, x: Any, shape: str, dtype: str, fix: str, **sizes: int
) -> None:
  """Checks a dtype and a shape, as "[T, E]" or "[..., E]".

  The dtype is a key of `_DTYPES` or the name of one. `sizes` are those of the
  letters that are known; T and N alone may be 0.
  """
  found, letters = getattr(x, "dtype", None), re.findall(r"\w+", shape)
  if isinstance(x, np.ndarray) and found == np.float64:
    found = jax.dtypes.canonicalize_dtype(found)  # what JAX takes it for
  kinds = _DTYPES.get(dtype) or (np.dtype(dtype),)
  is_array = isinstance(found, np.dtype) and hasattr(x, "shape")
  if is_array and any(jnp.issubdtype(found, kind) for kind in kinds):
    rest = max(len(x.shape) - len(letters), 0) if "..." in shape else 0
    last = x.shape[rest:]
    if len(last) == len(letters) and all(
      size == sizes[letter] if letter in sizes else size or letter in "TN"
      for size, letter in zip(last, letters, strict=True)
    ):
      return
    dtype = ""  # The message leaves out what is right.
  known = re.sub(
    r"\w+", lambda m: f"{m[0]}={sizes[m[0]]}" if m[0] in sizes else m[0], shape
  )
  words = f"{dtype} {known}".strip()
  raise ValueError(f"`{name}` must be {words}, got {describe(x)}. {fix}")


def as_jax(x: Any) -> Any:
  """An array of NumPy's floats as JAX takes it; anything else as it is."""
  is_numpy = isinstance(x, np.ndarray) and jnp.issubdtype(x.dtype, jnp.floating)
  return jnp.asarray(x) if is_numpy else x


def as_expert_idx(expert_idx: Any, num_experts: int) -> Any:
  """Integer indices as int32, and E for what that cannot hold: no expert."""
  if jnp.iinfo(expert_idx.dtype).max > jnp.iinfo(jnp.int32).max:
    # In 32 bits an index past all experts could become that of one.
    is_here = (expert_idx >= 0) & (expert_idx < num_experts)
    xp = expert_idx.__array_namespace__()
    expert_idx = xp.where(is_here, expert_idx, num_experts)
  return expert_idx.astype(jnp.int32)


def check_key(name: str, x: Any) -> None:
  """Checks that `x` is one random key, new or old."""
  dtype = getattr(x, "dtype", None)
  if isinstance(dtype, np.dtype) and dtype == np.uint32:
    # An old key of another length is of another generator.
    is_key = x.shape == jax.eval_shape(jax.random.PRNGKey, 0).shape
  else:
    is_key = dtype is not None and x.shape == ()
    is_key = is_key and jnp.issubdtype(dtype, jax.dtypes.prng_key)
  if not is_key:
    raise ValueError(
      f"`{name}` must be one random key, got {describe(x)}. Pass"
      " `jax.random.key(seed)`."
    )


def check_mask(token_mask: Any, num_tokens: int) -> None:
  """Checks that a mask is None or of so many tokens."""
  if token_mask is not None:
    fix = "True marks real tokens. A layer's `out.routing.token_mask` is flat."
    check_array("token_mask", token_mask, "[T]", "bool", fix, T=num_tokens)


def check_mask_of(x: Any, token_mask: Any) -> None:
  """Checks that there is a bool for each of the tokens `x`, `[..., D]`."""
  leading = x.shape[:-1]
  fix = f"Pass a bool, True for real tokens, for the leading axes of `x`, {leading}."
  check_array("token_mask", token_mask, "[...]", "bool", fix)
  if token_mask.shape != leading:
    raise ValueError(
      f"`token_mask` must have the leading shape of `x`, {leading}, got"
      f" {token_mask.shape}. True marks real tokens."
    )


def describe(x: Any) -> str:
  """What was passed, in a few words: a dtype and shape, a value, or a type."""
  if x is None or isinstance(x, str | int | float | complex):
    return reprlib.repr(x)
  if hasattr(x, "shape") and hasattr(x, "dtype"):
    value = _item(x)
    return f"{x.dtype} {x.shape if value is x else value}"
  if isinstance(x, type | np.dtype):
    return str(x)
  if type(x) is tuple and len(x) <= 4:
    return f"({', '.join(map(describe, x))})"
  return f"a {type(x).__name__}"


def check_choice(name: str, x: Any, choices: Sequence[str], fix: str) -> None:
  """Checks that `x` is one of some strings."""
  if not (isinstance(x, str) and x in choices):
    raise ValueError(
      f"`{name}` must be one of {tuple(choices)}, got {describe(x)}. {fix}"
    )


def check_instance(name: str, x: Any, kind: Any, fix: str) -> None:
  """Checks that `x` is a `kind`."""
  if not isinstance(x, kind):
    raise ValueError(
      f"`{name}` must be a `{kind.__name__}`, got {describe(x)}. {fix}"
    )


def check_transformation(name: str, x: Any) -> None:
  """Checks that a rule or an optimizer has optax's two functions."""
  if all(callable(getattr(x, f, None)) for f in ("init", "update")):
    return
  fix = "Pass what a rule of `jaxroute.dual` returns: `dual.sign(1e-3)`."
  if name == "optimizer":
    fix = "Pass what optax returns: `optax.adamw(1e-3)`."
  elif isinstance(x, Mapping):
    fix = (
      "For a linen model: `jaxroute.linen.init_router_state(variables, rule)`."
    )
  raise ValueError(
    f"`{name}` must be an optax transformation, got {describe(x)}. {fix}"
  )


def check_callable(name: str, x: Any) -> None:
  """Checks that an argument is a function."""
  if not callable(x):
    raise ValueError(
      f"`{name}` must be a function, got {describe(x)}. Pass it uncalled."
    )


def as_float_dtype(name: str, dtype: Any) -> np.dtype:
  """A floating-point dtype, from what NumPy or JAX calls one."""
  try:
    found = jnp.dtype(dtype)
  except TypeError:
    found = np.dtype(object)
  if dtype is None or not jnp.issubdtype(found, jnp.floating):
    raise ValueError(
      f"`{name}` must be a floating-point dtype, got {describe(dtype)}. Pass"
      " jnp.float32 or jnp.bfloat16, say."
    )
  return found


def check_flag(name: str, x: Any, fix: str) -> None:
  """Checks that `x` is one bool, which may be traced."""
  if isinstance(x, bool):
    return
  is_bool = getattr(x, "dtype", None) == np.bool_
  if not is_bool or x.shape != ():
    raise ValueError(f"`{name}` must be one bool, got {describe(x)}. {fix}")


def as_bool(name: str, x: Any, fix: str) -> bool:
  """The bool in a Python, NumPy or JAX scalar."""
  value = _item(x)
  if not isinstance(value, bool):
    raise ValueError(f"`{name}` must be a bool, got {describe(x)}. {fix}")
  return value


def as_int(name: str, x: Any, fix: str, low: int = 1, **high: int) -> Any:
  """The int in a scalar, at least `low` and at most `high`, as in `E=8`.

  A symbolic size, as `jax.export` has them, is returned as it is.
  """
  if export.is_symbolic_dim(x):
    return x
  value, words = _item(x), f"an int of at least {low}"
  for letter, most in high.items():
    words = f"in [{low}, {letter}={most}], an int"
  is_int = isinstance(value, int) and not isinstance(value, bool)
  if not is_int or not low <= value <= min(high.values(), default=value):
    raise ValueError(f"`{name}` must be {words}, got {describe(x)}. {fix}")
  return value


def as_float(
  name: str, x: Any, interval: str, fix: str, may_be_traced: bool = False
) -> Any:
  """The float in a scalar, within "[0, 1)", say, also when it is float32.

  A traced scalar is returned as it is, if it may be one.
  """
  if may_be_traced and isinstance(x, jax.core.Tracer) and x.shape == ():
    return x
  value, is_inside = _item(x), False
  if isinstance(value, numbers.Real) and not isinstance(value, bool):
    low, high = map(float, interval[1:-1].split(","))
    number = _in_float32(value)
    is_inside = low < number < high
    is_inside |= number == low and interval[0] == "["
  if not is_inside:
    raise ValueError(
      f"`{name}` must be a number in {interval}, finite in float32, got"
      f" {describe(x)}. {fix}"
    )
  return float(value)


def _in_float32(value: Any) -> float:
  """What float32 makes of a number, where subnormal ones are flushed to 0."""
  with np.errstate(over="ignore", under="ignore"):
    try:
      number = float(np.float32(float(value)))
    except OverflowError:
      return float("inf")
  return 0.0 if abs(number) < np.finfo(np.float32).tiny else number


def _item(x: Any) -> Any:
  """The Python number in a NumPy scalar or an array without axes; else `x`."""
  is_scalar = isinstance(getattr(x, "dtype", None), np.dtype) and x.shape == ()
  if isinstance(x, jax.core.Tracer) or not is_scalar or not hasattr(x, "item"):
    return x
  return x.item()
