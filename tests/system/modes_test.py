# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Every public function, jitted and eagerly, in every mode of JAX and model dtype.

No mode may change a dtype, an integer or which numbers are finite, nor a float
by more than a tolerance. Strict dtype promotion and refused rank promotion are
on in all tests. A table of functions and modes is printed by

    python tests/system/modes_test.py
"""

import functools
import inspect
import pathlib
import re
import sys

if __name__ == "__main__":
  _tests = pathlib.Path(__file__).resolve().parents[1]
  _root = _tests.parent
  sys.path[:0] = [str(_tests), str(_root), str(_root / "examples" / "lm")]
  import conftest  # noqa: F401  (what every test stands on)

import hypothesis
import jax
import jax.numpy as jnp
import model as model_lib
import numpy as np
import pytest
from hypothesis import strategies as st
from public_calls import CASES, arguments

import jaxroute
import jaxroute.linen
import jaxroute.nnx
from jaxroute import (
  assignment,
  dispatch,
  dual,
  experts,
  layer,
  losses,
  metrics,
  routing,
)
from jaxroute import scores as scores_lib
from jaxroute.dual import solvers

# On the host, in NumPy: no mode of JAX reaches them.
_ON_HOST = {"assignment.solve", "assignment.regret", "dispatch.expert_capacity"}
# It is a policy, of primitives.
_NO_ARRAYS = {"jaxroute.save_routing"}


def _named():
  """The public functions that are named in `CASES`."""
  for case in CASES:
    yield from re.sub(r" \(.*", "", case).split(" + ")


def _is_of(module, x):
  """Whether `x` is a class or function of a module, or of one within it."""
  return callable(x) and (x.__module__ or "").startswith(module.__name__)


def test_every_public_function_has_a_case():
  modules = [jaxroute, assignment, dispatch, dual, experts, layer, losses]
  modules += [
    metrics,
    routing,
    scores_lib,
    solvers,
    jaxroute.linen,
    jaxroute.nnx,
  ]
  aliases = {}
  for module in modules:
    own = [n for n, x in vars(module).items() if _is_of(module, x)]
    for name in getattr(module, "__all__", own):
      function = getattr(module, name)
      is_checked = _is_of(jaxroute, function) and not inspect.isclass(function)
      if is_checked and not name.startswith(("_", "check_")):
        place = module.__name__.split(".")[-1]
        aliases.setdefault(function, set()).add(f"{place}.{name}")
  named = {*_named(), *_ON_HOST, *_NO_ARRAYS}
  assert not [names for names in aliases.values() if not names & named]
  assert named <= set().union(*aliases.values())


# What a call takes that has the dtype of the model.
_OF_MODEL = {
  "logits",
  "tokens",
  "rows",
  "matrices",
  "gates",
  "shared",
  "params",
}
# The parts of the results that have it, by the beginnings of their paths.
_NARROW = {
  "jaxroute.route (gradient)": ["[1][0]"],
  "jaxroute.route (kernel)": ["[1][0]"],
  "jaxroute.train_step + jaxroute.init_train_state": [
    "[0].params",
    "[0].opt_state",
  ],
  "nnx.update + nnx.init_rule_state + nnx.router_state": ["[0]"],
  "dispatch.dispatch": [""],
  "dispatch.combine": ["[0]", "[1][0]"],
  "experts.grouped_matmul (ragged_dot)": [""],
  "experts.grouped_matmul (tiled)": [""],
  "experts.grouped_matmul (batched)": [""],
  "experts.swiglu": [""],
  "experts.dense_swiglu": [""],
  "layer.router + layer.moe + layer.local_moe": ["[0][0]"],
}

# A mode to how it is entered, and whether functions are jitted in it.
MODES = {
  "x64": (lambda: jax.enable_x64(True), True),
  "x64, eager": (lambda: jax.enable_x64(True), False),
  "debug_nans": (lambda: jax.debug_nans(True), False),
  "disable_jit": (jax.disable_jit, False),
  "promotion": (lambda: jax.numpy_dtype_promotion("standard"), True),
  "rank": (lambda: jax.numpy_rank_promotion("allow"), True),
  "matmul": (lambda: jax.default_matmul_precision("highest"), True),
  "prng": (lambda: jax.default_prng_impl("rbg"), True),
}
# `debug_nans` and `test_jitted_is_eager` are without `jit` too.
_LONG = {"x64, eager", "disable_jit", "promotion", "rank", "matmul", "prng"}
DTYPES = ("bfloat16", "float16")


@functools.cache
def _jitted(case):
  return jax.jit(CASES[case])


def _call(function, case, values):
  names = inspect.signature(CASES[case]).parameters
  return jax.block_until_ready(function(*(values[n] for n in names)))


@functools.cache
def _expected(case):
  """What a jitted function gives, and a check of its dtypes."""
  out = _call(_jitted(case), case, arguments(0))
  dtypes = {str(x.dtype) for x in jax.tree.leaves(out)}
  assert dtypes <= {"float32", "int32", "bool"}, dtypes
  return out


def _assert_same(found, expected, narrow=(), dtype=jnp.float32):
  """Equal up to rounding; the parts that begin with `narrow` have that dtype."""
  leaves = jax.tree_util.tree_leaves_with_path(expected)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  for (path, want), got in zip(leaves, jax.tree.leaves(found), strict=True):
    path = jax.tree_util.keystr(path)
    is_narrow = want.dtype == jnp.float32 and path.startswith(tuple(narrow))
    want_dtype = dtype if is_narrow else want.dtype
    assert (got.shape, got.dtype) == (want.shape, want_dtype), path
    if not jnp.issubdtype(want.dtype, jnp.floating):
      np.testing.assert_array_equal(got, want, path)
      continue
    got, want = np.float32(got), np.float32(want)
    size = np.abs(want, where=np.isfinite(want), out=np.zeros_like(want))
    error = 4 * float(jnp.finfo(dtype).eps) + 1e-5
    np.testing.assert_allclose(
      got, want, rtol=error, atol=error * size.max(initial=0.0), err_msg=path
    )


def _check_mode(case, mode):
  expected = _expected(case)
  enter, is_jitted = MODES[mode]
  function = _jitted(case) if is_jitted else CASES[case]
  values = arguments(0)
  with enter():
    _assert_same(_call(function, case, values), expected)


def _check_dtype(case, name):
  """A narrow model is that of the same numbers in float32, up to rounding."""
  values, dtype = arguments(0), jnp.dtype(name)
  narrow = values | jax.tree.map(
    lambda x: x.astype(dtype), {k: values[k] for k in _OF_MODEL}
  )
  rounded = narrow | jax.tree.map(
    lambda x: x.astype(jnp.float32), {k: narrow[k] for k in _OF_MODEL}
  )
  expected = _call(_jitted(case), case, rounded)
  found = _call(_jitted(case), case, narrow)
  _assert_same(found, expected, _NARROW.get(case, ()), dtype)


def _marks(case, mode):
  if mode in _LONG:
    return [pytest.mark.long]
  # What is NaN on the way, or needs `jit`, follows from what we wrote.
  return [] if mode == "x64" else [pytest.mark.any_jax]


@pytest.mark.parametrize(
  ("case", "mode"),
  [
    pytest.param(case, mode, marks=_marks(case, mode))
    for case in CASES
    for mode in MODES
  ],
)
def test_a_mode_changes_no_dtype_and_no_value(case, mode):
  _check_mode(case, mode)


@pytest.mark.parametrize(
  "case",
  [c for c in CASES if _OF_MODEL & set(inspect.signature(CASES[c]).parameters)],
)
@pytest.mark.parametrize(
  # JAX promotes both alike.
  "name",
  [DTYPES[0], pytest.param(DTYPES[1], marks=pytest.mark.long)],
)
def test_a_narrow_model_has_float32_weights_and_int32_counts(case, name):
  _check_dtype(case, name)


@pytest.mark.any_jax
@pytest.mark.parametrize("case", CASES)
@hypothesis.settings(max_examples=2)
@hypothesis.given(seed=st.integers(0, 2**31 - 1))
def test_jitted_is_eager(case, seed):
  values = arguments(seed, special=True)
  expected = _call(CASES[case], case, values)
  _assert_same(_call(_jitted(case), case, values), expected)


def test_the_example_turns_positions_by_float32_angles():
  x = jax.ShapeDtypeStruct((1, 4, 2, 8), jnp.float32)
  with jax.enable_x64(True):
    assert jax.eval_shape(model_lib.rotate, x).dtype == jnp.float32


def main():
  """Prints a row per case, and a column per mode and dtype."""
  checks = {mode: functools.partial(_check_mode, mode=mode) for mode in MODES}
  checks |= {
    name: functools.partial(_check_dtype, name=name) for name in DTYPES
  }
  for i, name in enumerate(checks):
    print(" " * 4 * i + name)
  for case in CASES:
    row, errors = [], []
    for name, check in checks.items():
      try:
        check(case)
        row.append("ok  ")
      except Exception as error:  # The table goes on, and shows all.
        row.append("FAIL")
        errors.append(f"    {name}: {str(error).strip().splitlines()[0]}")
    print(*row, case, flush=True)
    print("\n".join(errors), end="\n" * bool(errors), flush=True)


if __name__ == "__main__":
  main()
