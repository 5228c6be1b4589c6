# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Every argument of every public function, spoiled: the error names the mistake.

What is raised has to be ours, before anything is compiled, and to say which
argument it was and what it got.
"""

import inspect
import pathlib

import jax
import pytest
from mistakes_cases import CALLS, LAYERS

import jaxroute
from jaxroute import (
  assignment,
  dispatch,
  dual,
  experts,
  layer,
  linen,
  losses,
  metrics,
  nnx,
  plot,
  remat,
  routing,
)
from jaxroute.dual import solvers
from jaxroute.parallel import all_gather, mesh
from jaxroute.routing import bias_histogram

pytestmark = pytest.mark.any_jax

_PACKAGE = str(pathlib.Path(jaxroute.__file__).parent)
_MODULES = (
  jaxroute,
  assignment,
  dispatch,
  dual,
  solvers,
  experts,
  layer,
  losses,
  metrics,
  routing,
  bias_histogram,
  remat,
  plot,
  linen,
  nnx,
  all_gather,
  mesh,
)
# Functions that are not in the table, by name or by the module they are of.
_EXCLUDED = {
  "center": "has no arguments",
  "alternating_quantiles": "has no arguments",
  "bip": "has no arguments",
  "save_routing": "is called by JAX",
  "check_config": "is a check itself",
  "check_inputs": "is a check itself",
  "check_layer": "is a check itself",
  "check_params": "is a check itself",
  "check_router_weight": "is a check itself",
  "check_routing": "is a check itself",
  "check_scores": "is a check itself",
  "check_tokens": "is a check itself",
  "jaxroute.step": "tests/step_test.py",
  "jaxroute.train": "tests/train_test.py",
  "jaxroute.nnx_step": "tests/nnx_step_test.py",
  "jaxroute.linen": "tests/linen_test.py",
  "jaxroute.nnx": "tests/nnx_test.py",
  "jaxroute.parallel.all_gather": "tests/parallel_all_gather_test.py",
  "jaxroute.parallel.mesh": "tests/parallel_mesh_test.py",
}


def _functions(module):
  """The public functions of a module: those it lists, or those it defines."""
  if listed := getattr(module, "__all__", None):
    values = [getattr(module, name) for name in listed]
  else:
    values = [
      value
      for name, value in vars(module).items()
      if getattr(value, "__module__", None) == module.__name__
      and not name.startswith("_")
    ]
  return [x for x in values if inspect.isfunction(inspect.unwrap(x))]


def test_no_public_function_is_missing():
  found = [f for module in _MODULES for f in _functions(module)]
  missing = {
    f"{f.__module__}.{f.__name__}"
    for f in found
    if f not in CALLS and not {f.__name__, f.__module__} & set(_EXCLUDED)
  }
  assert not missing
  assert set(CALLS) <= set(found)


def _mistake(function, argument, value, good):
  """What is wrong with what a call raises, or None."""

  def call(bad):
    function(**(good | {argument: bad}))

  try:
    leaves = jax.tree.leaves(value)
    is_traced = leaves and all(isinstance(x, jax.Array) for x in leaves)
    # Nothing is compiled or run, even if no error is raised.
    if is_traced and function.__module__ != plot.__name__:
      jax.eval_shape(call, value)
    else:
      jax.eval_shape(lambda: call(value))
  except (ValueError, TypeError) as error:
    frame = inspect.getinnerframes(error.__traceback__)[-1]
    words = str(error)
    is_named = any(f"`{name}" in words for name in good)
    if frame.filename.startswith(_PACKAGE) and is_named and "got" in words:
      return None
    return f"{type(error).__name__} in {frame.filename}: {words[:200]}"
  except Exception as error:  # noqa: BLE001
    return f"{type(error).__name__}: {str(error)[:200]}"
  return "no error"


def _assert_mistakes_are_named(function, arguments):
  good = {name: argument.good for name, argument in arguments.items()}
  jax.eval_shape(lambda: (function(**good), None)[1])
  missed = [
    f"{name} = {value!r}: {mistake}"
    for name, argument in arguments.items()
    for value in argument.bad
    if (mistake := _mistake(function, name, value, good))
  ]
  assert not missed, "\n".join(missed)


@pytest.mark.parametrize("function", CALLS, ids=lambda f: f.__qualname__)
def test_a_mistake_is_named(function):
  assert set(CALLS[function]) == set(inspect.signature(function).parameters)
  _assert_mistakes_are_named(function, CALLS[function])


@pytest.mark.parametrize("name", LAYERS)
def test_a_mistake_in_a_layer_is_named(name):
  _assert_mistakes_are_named(*LAYERS[name])
