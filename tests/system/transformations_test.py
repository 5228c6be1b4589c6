# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Every transformation of JAX on every public function, against the plain call.

`PYTHONPATH=.:tests python tests/system/transformations_test.py` prints the table.
"""

import dataclasses
import functools
import os
import warnings

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.experimental import checkify
from public_functions import FUNCTIONS

import jaxroute


def _close(actual, expected, tolerance=1e-5):
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    if jnp.issubdtype(a.dtype, jnp.floating):
      np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)
    else:
      np.testing.assert_array_equal(a, b)


def _variants(args, count=3):
  """Arguments unlike each other."""
  return [
    jax.tree.map(lambda x, i=i: jnp.roll(x, i) if x.ndim else x, args)
    for i in range(count)
  ]


def _stack(trees):
  return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _loss(f):
  """A curved function of the part of the result that has a derivative."""
  return lambda *args: sum(
    jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(f.smooth(f.call(*args)))
  )


def _is_float(args):
  is_float = [
    jnp.issubdtype(jax.tree.leaves(arg)[0].dtype, jnp.floating) for arg in args
  ]
  return tuple(i for i, is_one in enumerate(is_float) if is_one)


def _grad(f):
  return jax.grad(_loss(f), argnums=_is_float(f.args))


@functools.cache
def _jitted(f):
  """The plain call, compiled once for all that is held to it."""
  return jax.jit(f.call)


@functools.cache
def _jitted_grad(f):
  return jax.jit(_grad(f))


def _direction(f):
  """A tangent of the arguments that have one."""
  return tuple(jax.tree.map(jnp.cos, f.args[i]) for i in _is_float(f.args))


def _along(f, function):
  """A function of the arguments that have a tangent."""

  def call(*moving):
    args = list(f.args)
    for i, arg in zip(_is_float(f.args), moving, strict=True):
      args[i] = arg
    return function(*args)

  return call


def _moving(f):
  return tuple(f.args[i] for i in _is_float(f.args))


def _dot(a, b):
  return sum(
    jnp.sum(x * y) for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True)
  )


def _slope(function, at, direction, h=2e-3):
  """The derivative along a direction, by differences of fourth order."""

  def moved(by):
    return function(*jax.tree.map(lambda x, d: x + by * h * d, at, direction))

  return jax.tree.map(
    lambda a, b, c, d: (8 * (b - c) - (a - d)) / (12 * h),
    *map(moved, (2, 1, -1, -2)),
  )


def _check_vmap(f, varying):
  varies = [
    varying in ("both", "tokens" if i < f.tokens else "parameters")
    for i in range(len(f.args))
  ]
  all_args = [
    [
      new if v else old
      for new, old, v in zip(args, f.args, varies, strict=True)
    ]
    for args in _variants(f.args)
  ]
  batched = [
    new if v else old
    for new, old, v in zip(_stack(all_args), f.args, varies, strict=True)
  ]
  vmapped = jax.vmap(f.call, [0 if v else None for v in varies])
  call = _jitted(f)
  expected = _stack([call(*args) for args in all_args])
  _close(jax.jit(vmapped)(*batched), expected)


def _check_map(f):
  args = _variants(f.args)
  mapped = jax.jit(
    lambda args: jax.lax.map(lambda a: f.call(*a), args, batch_size=2)
  )(_stack(args))
  call = _jitted(f)
  _close(mapped, _stack([call(*a) for a in args]))


def _check_scan(f):
  args = _variants(f.args)
  _, outs = jax.jit(
    lambda args: jax.lax.scan(lambda c, a: (c, f.call(*a)), 0, args)
  )(_stack(args))
  call = _jitted(f)
  _close(outs, _stack([call(*a) for a in args]))


def _check_grad(f):
  value = jax.jit(_along(f, _loss(f)))
  slope = _slope(value, _moving(f), _direction(f))
  gradient = _jitted_grad(f)(*f.args)
  _close(_dot(gradient, _direction(f)), slope, 2e-2)


def _check_remat(f):
  expected = _jitted_grad(f)(*f.args)
  for policy in (jaxroute.save_routing, jax.checkpoint_policies.dots_saveable):
    saved = dataclasses.replace(f, call=jax.checkpoint(f.call, policy=policy))
    _close(jax.jit(_grad(saved))(*f.args), expected)


def _check_custom_vjp(f):
  value, moving = _along(f, _loss(f)), _moving(f)
  ours = jax.custom_vjp(value)
  ours.defvjp(lambda *at: jax.vjp(value, *at), lambda pull, d_out: pull(d_out))
  argnums = range(len(moving))
  actual = jax.jit(jax.grad(ours, argnums))(*moving)
  _close(actual, _jitted_grad(f)(*f.args))


def _check_jacrev(f):
  def flat(*args):
    leaves = jax.tree.leaves(f.smooth(f.call(*args)))
    return jnp.concatenate([jnp.ravel(leaf) for leaf in leaves])

  jacobian = jax.jit(jax.jacrev(flat, _is_float(f.args)))(*f.args)
  d_flat = jnp.cos(jax.jit(flat)(*f.args))
  expected = _jitted_grad(f)(*f.args)
  _close(
    jax.tree.map(lambda j: jnp.tensordot(d_flat, j, 1), jacobian), expected
  )


def _check_vmap_of_grad(f):
  args = _variants(f.args)
  gradient = _jitted_grad(f)
  expected = _stack([gradient(*a) for a in args])
  _close(jax.jit(jax.vmap(_grad(f)))(*_stack(args)), expected)


def _check_grad_of_vmap(f):
  """Parameters are shared, so that their gradients are summed."""
  shared = f.args[f.tokens :]
  all_args = [(*args[: f.tokens], *shared) for args in _variants(f.args)]
  axes = [0 if i < f.tokens else None for i in range(len(f.args))]
  moving = _is_float(f.args)

  def loss(*args):
    return jnp.sum(jax.vmap(_loss(f), axes)(*args))

  batched = (*_stack([args[: f.tokens] for args in all_args]), *shared)
  actual = jax.jit(jax.grad(loss, moving))(*batched)
  gradient = _jitted_grad(f)
  parts = _stack([gradient(*args) for args in all_args])
  expected = tuple(
    part if i < f.tokens else jax.tree.map(lambda x: jnp.sum(x, 0), part)
    for i, part in zip(moving, parts, strict=True)
  )
  _close(actual, expected)


def _check_forward(f):
  value = _along(f, _loss(f))
  at, direction = _moving(f), _direction(f)
  out, push = jax.jit(lambda *at: jax.linearize(value, *at))(*at)
  _close(out, jax.jit(value)(*at))
  tangent = jax.jit(push)(*direction)
  _close(tangent, _dot(_jitted_grad(f)(*f.args), direction))
  _close(jax.jit(lambda a, d: jax.jvp(value, a, d))(at, direction)[1], tangent)


def _check_second(f):
  """`jvp` of `grad` by differences, and `grad` of `grad` by it."""
  argnums = range(len(_moving(f)))
  gradient = jax.grad(_along(f, _loss(f)), argnums)
  at, direction = _moving(f), _direction(f)
  _, product = jax.jit(lambda a, d: jax.jvp(gradient, a, d))(at, direction)
  _close(product, _slope(jax.jit(gradient), at, direction), 2e-2)

  def slope(*at):
    return _dot(gradient(*at), direction)

  _close(jax.jit(jax.grad(slope, argnums))(*at), product, 1e-4)


def _check_shard_map(f):
  """Arguments that vary over the mesh, and parameters that do not."""
  shared = f.args[f.tokens :] if f.tokens else ()
  count = len(f.args) - len(shared)
  all_args = [args[:count] for args in _variants(f.args, 2)]
  mesh = jax.make_mesh((2,), ("data",))

  def run(args, shared):
    out = f.call(*jax.tree.map(lambda x: x[0], args), *shared)
    return jax.tree.map(lambda x: x[None], out)

  with jax.set_mesh(mesh):
    mapped = jax.shard_map(
      run, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P("data")
    )
    args = jax.device_put(_stack(all_args), jax.P("data"))
    shared_args = jax.device_put(shared, jax.P())
    actual = jax.device_get(jax.jit(mapped)(args, shared_args))
  call = _jitted(f)
  expected = _stack([call(*args, *shared) for args in all_args])
  _close(jax.tree.map(jnp.asarray, actual), expected)


def _check_export(f):
  """One program for every platform and any number of tokens."""
  (t,) = export.symbolic_shape("T")
  tokens, shared = f.args[: f.tokens], f.args[f.tokens :]
  specs = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((t, *x.shape[1:]), x.dtype), tokens
  )
  exported = export.export(_jitted(f), platforms=("cpu", "cuda", "tpu"))
  program = exported(*specs, *shared)
  twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), tokens)
  for some in (tokens, twice):
    _close(program.call(*some, *shared), _jitted(f)(*some, *shared))


def _check_compile_time(f):
  def trace(x):
    with jax.ensure_compile_time_eval():
      return x, f.call(*f.args)

  _close(jax.jit(trace)(0)[1], _jitted(f)(*f.args))


def _check_checkify(f):
  errors = checkify.all_checks
  # JAX's check of indices dies of a scatter in a vmap, and of `x[...] += y`.
  if f in [FUNCTIONS[name] for name in ("losses", "train_step", "nnx.MoE")]:
    errors -= checkify.index_checks
  checked = checkify.checkify(f.call, errors=errors)
  error, out = jax.jit(checked)(*f.args)
  error.throw()
  _close(out, _jitted(f)(*f.args))


def _check_shape(f):
  out = _jitted(f)(*f.args)
  shapes = jax.eval_shape(f.call, *f.args)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), out) == jax.tree.map(
    lambda x: (x.shape, x.dtype), shapes
  )
  jaxpr = jax.make_jaxpr(f.call)(*f.args)
  leaves = jax.core.eval_jaxpr(
    jaxpr.jaxpr, jaxpr.consts, *jax.tree.leaves(f.args)
  )
  _close(leaves, jax.tree.leaves(out))


def _check_compile(f):
  """Compiled ahead of time, and of arguments that are given away."""
  args = jax.tree.map(jnp.copy, f.args)
  argnums = tuple(range(len(args)))
  donating = jax.jit(f.call, donate_argnums=argnums)
  with warnings.catch_warnings():
    # Not every result has room in an argument.
    warnings.filterwarnings("ignore", "Some donated buffers were not usable")
    out = donating.lower(*args).compile()(*args)
  _close(out, _jitted(f)(*f.args))


def _is_smooth(f):
  return None if f.smooth else "it has no derivative"


def _is_smooth_twice(f):
  return _is_smooth(f) or (None if f.twice else "custom_vjp: see `experts`")


def _has_tokens(f):
  return None if f.tokens else "it takes a state"


def _any(f):
  del f


# What a transformation is checked by, and why it is not for a function.
TRANSFORMATIONS = {
  "eval_shape, make_jaxpr": (_check_shape, _any),
  "lower, compile, donate": (_check_compile, _any),
  "vmap tokens": (
    functools.partial(_check_vmap, varying="tokens"),
    _has_tokens,
  ),
  "vmap parameters": (
    functools.partial(_check_vmap, varying="parameters"),
    lambda f: None if f.tokens < len(f.args) else "it has no parameters",
  ),
  "vmap both": (functools.partial(_check_vmap, varying="both"), _any),
  "map in batches": (_check_map, _any),
  "scan": (_check_scan, _any),
  "grad": (_check_grad, _is_smooth),
  "jacrev": (_check_jacrev, _is_smooth),
  "vmap of grad": (_check_vmap_of_grad, _is_smooth),
  "grad of vmap": (_check_grad_of_vmap, _is_smooth),
  "remat": (_check_remat, _is_smooth),
  "custom_vjp": (_check_custom_vjp, _is_smooth),
  "jvp, linearize": (_check_forward, _is_smooth_twice),
  "second derivatives": (_check_second, _is_smooth_twice),
  "shard_map": (_check_shard_map, _any),
  "export": (_check_export, _has_tokens),
  "compile-time eval": (_check_compile_time, _any),
  "checkify": (_check_checkify, _any),
}

# What else is not there, and why.
EXCLUDED = {("export", "dual.solve"): "it needs a number of tokens"}

# These are made of the others.
_COMPOSED = (
  "layer.moe, layer.moe batched, layer.moe ragged_dot, linen.MoE, nnx.MoE, losses,"
  " metrics, update, train_step, dual.solve"
).split(", ")


def _cells():
  """Every transformation with every function, where it is for it.

  A third of the cells is tested always: of any three functions that are
  neighbours, one meets each transformation. The others are for `--all`, of the
  functions in `_COMPOSED`, or for one version of JAX.
  """
  for i, (transformation, (_, why_not)) in enumerate(TRANSFORMATIONS.items()):
    for j, (function, f) in enumerate(FUNCTIONS.items()):
      # Of the layers, only `ragged_dot` is differentiable twice.
      is_composed = function in _COMPOSED and not (
        why_not is _is_smooth_twice and function == "layer.moe ragged_dot"
      )
      other = pytest.mark.long if is_composed else pytest.mark.any_jax
      marks = [other] if (i + j) % 3 else []
      if why_not(f) is None and (transformation, function) not in EXCLUDED:
        yield pytest.param(transformation, function, marks=marks)


@pytest.mark.parametrize(("transformation", "function"), [*_cells()])
def test_transformation(transformation, function):
  check, _ = TRANSFORMATIONS[transformation]
  check(FUNCTIONS[function])


def _print_table():
  for transformation, (check, why_not) in TRANSFORMATIONS.items():
    print(transformation)
    for name, f in FUNCTIONS.items():
      result = why_not(f) or EXCLUDED.get((transformation, name))
      if result is None:
        try:
          check(f)
          result = "ok"
        except Exception as error:  # It is printed.
          result = f"{type(error).__name__}: {error}".splitlines()[0]
      print(f"  {name:28} {result}", flush=True)


if __name__ == "__main__":
  _print_table()
