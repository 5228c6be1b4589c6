# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""One ladder for all operations: who is asked, who answers, what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxroute import ladder


def _refusal(reason):
  def refuse():
    raise ladder.Refusal(reason)

  return refuse


def test_none_takes_the_first_that_can():
  implementations = {
    "fast": _refusal("no such chip"),
    "good": lambda: 1,
    "plain": lambda: 2,
  }
  assert ladder.climb("op", implementations, None) == 1
  assert ladder.climb("op", implementations, "plain") == 2


def test_an_entry_under_none_is_for_none_alone():
  implementations = {
    "fast": _refusal("no such chip"),
    None: lambda: "by platform",
    "plain": lambda: "plain",
  }
  assert ladder.climb("op", implementations, None) == "by platform"
  assert ladder.climb("op", implementations, "plain") == "plain"


def test_an_unknown_name_is_a_value_error_with_those_there_are():
  implementations = {None: lambda: 0, "a": lambda: 1, "b": lambda: 2}
  words = "`implementation` of `op` must be None or one of 'a', 'b', got 'c'"
  with pytest.raises(ValueError, match=words):
    ladder.climb("op", implementations, "c")


def test_what_was_asked_for_says_why_it_cannot_and_what_can():
  implementations = {"fast": _refusal("no such chip"), "plain": lambda: 2}
  words = r"`op`: 'fast' cannot: no such chip. Use None, or one of \['plain'\]"
  with pytest.raises(NotImplementedError, match=words):
    ladder.climb("op", implementations, "fast")


def test_where_none_can_the_error_has_the_reasons_of_all():
  implementations = {"a": _refusal("no chip"), "b": _refusal("no memory")}
  words = "'a' cannot: no chip. 'b' cannot: no memory."
  with pytest.raises(NotImplementedError, match=words):
    ladder.climb("op", implementations, None)


@pytest.mark.parametrize("kind", (ValueError, NotImplementedError))
def test_no_slower_one_hides_a_defect(kind):
  def broken():
    raise kind("bad shape")

  for implementation in (None, "a"):
    with pytest.raises(kind, match="^bad shape$"):
      ladder.climb("op", {"a": broken, "b": lambda: 1}, implementation)


def _double_on_tpu(x):
  return ladder.call_kernel("double", "tpu", lambda x: {"y": 2 * x}, False, x)


@pytest.mark.parametrize("transform", (lambda f: f, jax.jit, jax.vmap))
def test_a_kernel_lowered_for_another_platform_says_so(transform):
  with pytest.raises(
    NotImplementedError,
    match="the TPU kernel of `double` was traced.*interpret=True",
  ):
    transform(_double_on_tpu)(jnp.ones(3))


def test_it_is_traced_and_lowered_for_its_own_platform():
  x = jnp.ones(3)
  assert jax.eval_shape(_double_on_tpu, x)["y"].shape == (3,)
  traced = jax.jit(_double_on_tpu).trace(x)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "multiply" in text
  with pytest.raises(NotImplementedError, match="the TPU kernel"):
    traced.lower(lowering_platforms=("cuda",))


def test_a_kernel_for_several_devices_is_refused_before_its_own_compiler_does():
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  sharding = jax.NamedSharding(mesh, jax.P("data"))
  x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=sharding)
  traced = jax.jit(_double_on_tpu).trace(x)
  with pytest.raises(
    NotImplementedError, match="no mesh is in force.*8 devices.*`partition`"
  ):
    traced.lower(lowering_platforms=("tpu",))


def test_inside_shard_map_the_two_branches_vary_alike():
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  mapped = jax.shard_map(
    _double_on_tpu, mesh=mesh, in_specs=jax.P("data"), out_specs=jax.P("data")
  )
  shape = jax.eval_shape(jax.jit(mapped), np.ones(16, np.float32))["y"].shape
  assert shape == (16,)


def _check(**kwargs):
  arguments = dict(unavailable=lambda: "no TPU", by_name=False, interpret=False)
  ladder.check_can_run(None, **arguments | kwargs)


def test_a_kernel_that_was_not_asked_for_needs_its_device_and_mesh():
  auto = (jax.sharding.AxisType.Auto,)
  one = jax.make_mesh((1,), ("data",), axis_types=auto)
  with jax.set_mesh(one), pytest.raises(NotImplementedError, match="no TPU"):
    _check()
  with pytest.raises(NotImplementedError, match="8 devices"):
    _check(unavailable=lambda: None)


def test_a_kernel_asked_for_by_name_needs_no_device_here():
  _check(by_name=True)
  auto = (jax.sharding.AxisType.Auto,)
  eight = jax.make_mesh((8,), ("data",), axis_types=auto)
  with (
    jax.set_mesh(eight),
    pytest.raises(NotImplementedError, match="shard_map"),
  ):
    _check(by_name=True)


def test_an_interpreted_kernel_runs_anywhere_but_not_on_what_it_cannot_do():
  auto = (jax.sharding.AxisType.Auto,)
  with jax.set_mesh(jax.make_mesh((8,), ("data",), axis_types=auto)):
    _check(interpret=True)
  with pytest.raises(NotImplementedError, match="K is too large"):
    ladder.check_can_run(
      "K is too large",
      unavailable=lambda: None,
      by_name=True,
      interpret=True,
    )
