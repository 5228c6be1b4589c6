# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts by the kernels for TPU: values, and where they are taken."""

import functools
import re

import experts_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_mesh
from jax import export
from jax.sharding import AxisType

from jaxroute import experts
from jaxroute.kernels.tpu import device

E, D, F, N = 3, 128, 256, 300
KERNEL = "jaxroute_grouped"
_AUTO = AxisType.Auto


@pytest.fixture(autouse=True)
def older_compiler(monkeypatch):
  """The kernels are taken without their name, whatever the version of JAX."""
  monkeypatch.setattr(device, "multiplies_groups", lambda: False)


def _operands(dtype=jnp.bfloat16, n=N, d=D, f=F):
  x, params = experts_cases.normal(0, n, d), experts_cases.params(0, E, d, f)
  x, params = jax.tree.map(lambda v: v.astype(dtype), (x, params))
  return x, params, experts_cases.sizes(100, 0, n - 140)


def _step(x, params, sizes, implementation=None):
  def loss(x, params):
    out = experts.swiglu(x, params, sizes, implementation=implementation)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  return jax.grad(loss, argnums=(0, 1))(x, params)


def _lowered(function, *args, platform="tpu"):
  traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


def test_swiglu_and_its_gradient():
  dtype = jnp.float16  # which the kernels get as float32
  x, params, sizes = _operands(dtype)
  x, d_out = x.at[-40:].set(jnp.nan), x[::-1].at[-40:].set(jnp.nan)

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def both(implementation, interpret, x, d_out):
    swiglu = functools.partial(
      experts.swiglu, implementation=implementation, interpret=interpret
    )
    out, pull = jax.vjp(lambda x, p: swiglu(x, p, sizes), x, params)
    return out, *pull(d_out)

  # Without a name, the first kernel is the one that is interpreted.
  actual = both(None, True, x, d_out)
  expected = both("ragged_dot", False, x, d_out)
  # Both round between the products, at times to different neighbours.
  experts_cases.assert_close(actual, expected, 2 * float(jnp.finfo(dtype).eps))
  np.testing.assert_array_equal(actual[0][-40:], 0)
  np.testing.assert_array_equal(actual[1][-40:], 0)


@pytest.mark.parametrize("kind", ("TPU v5 lite", "TPU v6 lite", "TPU7x"))
def test_every_product_on_a_tpu_without_the_name(kind):
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(1, _AUTO, kind)):
    text = _lowered(_step, *_operands())
  assert len(re.findall(r"call @(?:matmul|outer)", text)) == 9
  assert "ragged_dot" not in text


@pytest.mark.parametrize(
  "operands", (dict(n=120), dict(f=100)), ids=("rows", "width")
)
def test_what_it_cannot_do_is_done_by_xla(operands):
  operands = _operands(**operands)
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(1, _AUTO)):
    text = _lowered(_step, *operands)
    assert KERNEL not in text
    assert "ragged_dot" in text
    words = "'pallas_tpu' cannot: the TPU kernel takes.*Use None"
    with pytest.raises(NotImplementedError, match=words):
      experts.swiglu(*operands, implementation="pallas_tpu")


def test_a_newer_compiler_is_left_to_its_own_products(monkeypatch):
  monkeypatch.setattr(device, "multiplies_groups", lambda: True)
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(1, _AUTO)):
    # Of a size that no other test has traced.
    assert KERNEL not in _lowered(_step, *_operands(n=304))


def test_an_older_tpu_takes_what_xla_has():
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(1, _AUTO, "TPU v4")):
    assert KERNEL not in _lowered(_step, *_operands())


def test_by_name_it_lowers_for_tpu_alone():
  def step(*args):
    return _step(*args, implementation="pallas_tpu")

  exported = export.export(jax.jit(step), platforms=("tpu",))(*_operands())
  assert KERNEL in exported.mlir_module()
  words = "the TPU kernel of `swiglu` was traced.*another platform"
  with pytest.raises(NotImplementedError, match=words):
    jax.jit(step).lower(*_operands())


def test_inside_shard_map_and_vmap():
  x, params, sizes = _operands()
  args = jnp.stack([x, x]), params, jnp.stack([sizes, sizes])
  vmapped = jax.vmap(_step, (0, None, 0))
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(2, _AUTO)):
    mapped = jax.shard_map(
      vmapped,
      in_specs=(jax.P("data"), jax.P(), jax.P("data")),
      out_specs=(jax.P("data"), jax.P("data")),
      check_vma=True,
    )
    assert KERNEL in _lowered(mapped, *args)


def test_under_remat_in_a_scan_with_64_bits():
  x, params, sizes = _operands()

  def loss(x, params):
    def layer(x, _):
      return x + experts.swiglu(x, params, sizes), None

    out, _ = jax.lax.scan(jax.checkpoint(layer), x, length=2)
    return jnp.sum(out.astype(jnp.float32))

  mesh = tpu_mesh.abstract(1, _AUTO)
  with jax.sharding.use_abstract_mesh(mesh), jax.enable_x64(True):
    assert KERNEL in _lowered(jax.grad(loss, argnums=(0, 1)), x, params)


@pytest.mark.tpu
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float32))
def test_on_a_tpu_it_is_ragged_dot(dtype):
  x, params, _ = _operands(dtype, 3000, 512, 640)
  for sizes in ((1000, 3, 1900), (0, 0, 3000), (0, 0, 0)):
    sizes = experts_cases.sizes(*sizes)
    x = x.at[sum(sizes) :].set(jnp.nan)
    actual, again, expected = (
      jax.jit(_step, static_argnames="implementation")(
        x, params, sizes, implementation=implementation
      )
      for implementation in ("pallas_tpu", "pallas_tpu", "ragged_dot")
    )
    tolerance = 4 * float(jnp.finfo(dtype).eps)
    experts_cases.assert_close(actual, expected, tolerance)
    jax.tree.map(np.testing.assert_array_equal, actual, again)
