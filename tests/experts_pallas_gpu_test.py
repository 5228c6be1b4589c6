# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The experts by the kernels for Hopper: values, and where they are taken."""

import functools
import re

import experts_cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import AxisType

from jaxroute import experts
from jaxroute.kernels.gpu import device

needs_kernels = pytest.mark.skipif(
  device.too_old() is not None, reason=str(device.too_old())
)

E, D, F, N = 3, 128, 192, 152
KERNEL = "mosaic_gpu"


def _operands(dtype=jnp.bfloat16, n=N, d=D, f=F):
  x, params = experts_cases.normal(0, n, d), experts_cases.params(0, E, d, f)
  x, params = jax.tree.map(lambda v: v.astype(dtype), (x, params))
  return x, params, experts_cases.sizes(70, 0, n - 90)


def _step(x, params, sizes, implementation=None):
  def loss(x, params):
    out = experts.swiglu(x, params, sizes, implementation=implementation)
    return jnp.sum(out.astype(jnp.float32) ** 2)

  return jax.grad(loss, argnums=(0, 1))(x, params)


def _on(kind, axis_types=(AxisType.Auto,), size=1):
  """A context in which programs are for some devices of a kind."""
  target = jax.sharding.AbstractDevice(
    device_kind=kind, num_cores=132, platform="gpu"
  )
  mesh = jax.sharding.AbstractMesh(
    (size,), ("x",), axis_types=axis_types, abstract_device=target
  )
  return jax.sharding.use_abstract_mesh(mesh)


def _lowered(function, *args, platform="cuda"):
  traced = jax.jit(function).trace(*args)
  return traced.lower(lowering_platforms=(platform,)).as_text()


@needs_kernels
def test_swiglu_and_its_gradient():
  x, params, sizes = _operands()
  x, d_out = x.at[-20:].set(jnp.nan), x[::-1].at[-20:].set(jnp.nan)

  def both(**how):
    swiglu = functools.partial(experts.swiglu, **how)
    out, pull = jax.vjp(lambda x, p: swiglu(x, p, sizes), x, params)
    return out, *pull(d_out)

  actual = both(implementation="pallas_gpu", interpret=True)
  expected = both(implementation="ragged_dot")
  # Both round between the products, at times to different neighbours.
  experts_cases.assert_close(actual, expected, 2**-7)
  np.testing.assert_array_equal(actual[0][-20:], 0)
  np.testing.assert_array_equal(actual[1][-20:], 0)


@needs_kernels
def test_every_product_on_hopper():
  step = functools.partial(_step, implementation="pallas_gpu")
  with _on("NVIDIA H100 80GB HBM3"):
    text = _lowered(step, *_operands())
  assert len(re.findall(r"call @(?:matmul|outer)", text)) == 9


@needs_kernels
def test_hopper_takes_them_without_the_name():
  with _on("NVIDIA H100 80GB HBM3"):
    text = _lowered(_step, *_operands())
  assert KERNEL in text
  assert len(re.findall(r"call @(?:matmul|outer)", text)) == 9


@pytest.mark.parametrize(
  "kind, operands",
  [
    ("NVIDIA A100-SXM4-80GB", {}),
    ("NVIDIA B200", {}),
    ("NVIDIA H100", dict(dtype=jnp.float32)),
    ("NVIDIA H100", dict(n=156)),
    ("NVIDIA H100", dict(d=100)),
  ],
)
def test_what_they_cannot_do_is_batched(kind, operands):
  with _on(kind):
    text = _lowered(_step, *_operands(**operands))
  assert KERNEL not in text
  assert "while" in text
  assert "ragged_dot" not in text


@needs_kernels
def test_by_name_it_lowers_for_cuda_alone():
  def step(*args):
    return _step(*args, implementation="pallas_gpu")

  exported = export.export(jax.jit(step), platforms=("cuda",))(*_operands())
  assert KERNEL in exported.mlir_module()
  words = "the CUDA kernel of `swiglu` was traced.*another platform"
  with pytest.raises(NotImplementedError, match=words):
    jax.jit(step).lower(*_operands())


@needs_kernels
@pytest.mark.parametrize(
  "operands, words",
  [
    (dict(dtype=jnp.float32), "bfloat16 and float16, got float32"),
    (dict(n=120), "rows of 128 or more, in multiples of 8, got 120"),
    (dict(f=100), "in multiples of 64, got 100"),
  ],
)
def test_what_it_cannot_do_is_said_before_tracing(operands, words):
  x, params, sizes = _operands(**operands)
  words = f"'pallas_gpu' cannot: .*{words}.*Use None"
  with pytest.raises(NotImplementedError, match=words):
    experts.swiglu(x, params, sizes, implementation="pallas_gpu")


@needs_kernels
def test_another_gpu_is_refused_by_name():
  words = "'pallas_gpu' cannot: compute capability 9.0 is needed, got 10.0"
  with _on("NVIDIA B200"), pytest.raises(NotImplementedError, match=words):
    jax.eval_shape(
      lambda *args: experts.swiglu(*args, implementation="pallas_gpu"),
      *_operands(),
    )


@pytest.mark.skipif(device.too_old() is None, reason="this jax has kernels")
def test_an_older_jax_is_told():
  words = "'pallas_gpu' cannot: jax 0.11 or newer is needed"
  with pytest.raises(NotImplementedError, match=words):
    experts.swiglu(*_operands(), implementation="pallas_gpu")


@needs_kernels
def test_inside_shard_map_and_vmap():
  x, params, sizes = _operands()
  args = jnp.stack([x, x]), params, jnp.stack([sizes, sizes])

  def one(x, params, sizes):
    return _step(x, params, sizes, implementation="pallas_gpu")

  vmapped = jax.vmap(one, (0, None, 0))
  assert KERNEL in _lowered(vmapped, *args)
  with _on("NVIDIA H100 80GB HBM3", size=2):
    mapped = jax.shard_map(
      vmapped,
      in_specs=(jax.P("x"), jax.P(), jax.P("x")),
      out_specs=(jax.P("x"), jax.P("x")),
      check_vma=True,
    )
    assert KERNEL in _lowered(mapped, *args)


@needs_kernels
def test_under_remat_in_a_scan_with_64_bits():
  x, params, sizes = _operands()

  def loss(x, params):
    def layer(x, _):
      out = experts.swiglu(x, params, sizes, implementation="pallas_gpu")
      return x + out, None

    out, _ = jax.lax.scan(jax.checkpoint(layer), x, length=2)
    return jnp.sum(out.astype(jnp.float32))

  with _on("NVIDIA H100 80GB HBM3"), jax.enable_x64(True):
    assert KERNEL in _lowered(jax.grad(loss, argnums=(0, 1)), x, params)


@needs_kernels
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (jnp.bfloat16, jnp.float16))
def test_on_a_gpu_they_are_batched(dtype):
  if device.capability() != (9, 0):
    pytest.skip(f"needs compute capability 9.0, found {device.capability()}")
  x, params, _ = _operands(dtype, 3000, 512, 704)
  for sizes in ((1000, 3, 1900), (0, 0, 3000), (997, 1001, 1002), (0, 0, 0)):
    sizes = experts_cases.sizes(*sizes)
    padded = x.at[sum(sizes) :].set(jnp.nan)
    actual, again, expected = (
      jax.jit(_step, static_argnames="implementation")(
        padded, params, sizes, implementation=implementation
      )
      for implementation in ("pallas_gpu", "pallas_gpu", "batched")
    )
    experts_cases.assert_close(
      actual, expected, 4 * float(jnp.finfo(dtype).eps)
    )
    jax.tree.map(np.testing.assert_array_equal, actual, again)
