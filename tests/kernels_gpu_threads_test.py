# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a thread of a GPU does: its twin in JAX, and that CUDA takes it."""

import inspect

import gpu_mesh
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxroute.kernels.gpu import threads, twins
from jaxroute.kernels.gpu.threads import THREADS, WARP, Threads

pytestmark = gpu_mesh.needs_kernels

_TWINS = twins.Twins()
_METHODS = [name for name in vars(Threads) if not name.startswith("_")]


def _words(seed=0):
  """[128] int32 with all bits in use."""
  rng = np.random.default_rng(seed)
  return rng.integers(-(2**31), 2**31, THREADS).astype(np.int32)


def _bit(words, i):
  return np.int64(words) >> i & 1


def _word(bits):
  """int32 of 32 bits, the lowest first."""
  total = sum(int(bit) << i for i, bit in enumerate(bits))
  return np.uint32(total).astype(np.int32)


@pytest.mark.parametrize("name", _METHODS)
def test_every_operation_has_a_twin_of_its_signature(name):
  assert name in vars(twins.Twins)
  ours, twin = (
    inspect.signature(getattr(kind, name)) for kind in (Threads, twins.Twins)
  )
  assert ours == twin


def test_the_index_counts_threads():
  np.testing.assert_array_equal(_TWINS.index(), range(THREADS))
  assert _TWINS.index().dtype == jnp.int32


def test_barriers_return_nothing():
  assert _TWINS.block_barrier() is _TWINS.warp_barrier() is None


@pytest.mark.parametrize("distance", (1, 2, 3, 5, 8, 16, 21, 31))
@pytest.mark.parametrize("dtype", (np.int32, np.float32))
def test_shuffle_xor(distance, dtype):
  x = _words().astype(dtype)
  expected = [x[thread ^ distance] for thread in range(THREADS)]
  actual = _TWINS.shuffle_xor(jnp.asarray(x), distance)
  np.testing.assert_array_equal(actual, np.array(expected))
  assert actual.dtype == dtype


def test_ballot():
  flags = _words() % 3
  expected = [
    _word(flags[thread // WARP * WARP :][:WARP] != 0)
    for thread in range(THREADS)
  ]
  np.testing.assert_array_equal(_TWINS.ballot(jnp.asarray(flags)), expected)
  full = jnp.full(THREADS, -7, jnp.int32)
  np.testing.assert_array_equal(_TWINS.ballot(full), -1)
  np.testing.assert_array_equal(_TWINS.ballot(full * 0), 0)


def test_any_tells_of_one():
  flags = jnp.zeros(THREADS, jnp.int32)
  assert _TWINS.any(flags) == 0
  assert _TWINS.any(flags.at[77].set(-4)) == 1


def test_count_bits():
  x = np.concatenate([_words()[:-3], [0, -1, -(2**31)]]).astype(np.int32)
  expected = [sum(_bit(word, i) for i in range(32)) for word in x]
  np.testing.assert_array_equal(_TWINS.count_bits(jnp.asarray(x)), expected)


def test_transpose_bits():
  x = _words()
  expected = []
  for thread in range(THREADS):
    warp, lane = divmod(thread, WARP)
    rows = x[warp * WARP :][:WARP]
    expected.append(_word(_bit(row, lane) for row in rows))
  once = _TWINS.transpose_bits(jnp.asarray(x))
  np.testing.assert_array_equal(once, expected)
  np.testing.assert_array_equal(_TWINS.transpose_bits(once), x)


@pytest.mark.parametrize("dtype", (np.int32, np.float32, jnp.bfloat16, bool))
def test_gather(dtype):
  table = (np.arange(50) % 3).astype(dtype)
  index = _words() % 50
  actual = _TWINS.gather(jax.new_ref(jnp.asarray(table)), jnp.asarray(index))
  np.testing.assert_array_equal(actual, table[index])
  assert actual.dtype == (np.int32 if dtype is bool else dtype)


@pytest.mark.parametrize("dtype", (np.int32, bool))
@pytest.mark.parametrize("masked", (False, True))
def test_scatter(dtype, masked):
  index = np.random.default_rng(0).permutation(200)[:THREADS].astype(np.int32)
  value = _words(1) % 2
  keep = _words(2) % 2 if masked else None
  ref = jax.new_ref(jnp.zeros(200, dtype))
  _TWINS.scatter(
    ref, *(x if x is None else jnp.asarray(x) for x in (index, value, keep))
  )
  expected = np.zeros(200, dtype)
  for thread in range(THREADS):
    if keep is None or keep[thread]:
      expected[index[thread]] = value[thread]
  np.testing.assert_array_equal(ref[...], expected)
  assert ref.dtype == dtype


def test_add_to_sums_what_meets():
  index, value, keep = _words() % 10, _words(1) % 100, _words(2) % 2
  ref = jax.new_ref(jnp.arange(10, dtype=jnp.int32))
  _TWINS.add_to(ref, *map(jnp.asarray, (index, value, keep)))
  expected = np.arange(10)
  np.add.at(expected, index, value * keep)
  np.testing.assert_array_equal(ref[...], expected)


def test_what_is_not_kept_may_point_anywhere():
  index = jnp.full(THREADS, 2**20, jnp.int32)
  nothing = jnp.zeros(THREADS, jnp.int32)
  for write in (_TWINS.scatter, _TWINS.add_to):
    ref = jax.new_ref(jnp.arange(10, dtype=jnp.int32))
    write(ref, index, index, nothing)
    np.testing.assert_array_equal(ref[...], range(10))


@pytest.mark.parametrize("width", (8, 32))
def test_gather_rows(width):
  table = np.random.default_rng(0).normal(size=300).astype(np.float32)
  start = _words() % 60 * 4
  actual = _TWINS.gather_rows(
    jax.new_ref(jnp.asarray(table)), jnp.asarray(start), width
  )
  expected = np.stack([table[s : s + width] for s in start])
  np.testing.assert_array_equal(actual, expected)


@pytest.mark.parametrize("shape", ((THREADS,), (THREADS, 4)))
def test_functions_of_numbers(shape):
  rng = np.random.default_rng(0)
  x, y = rng.uniform(0.5, 4, (2, *shape)).astype(np.float32)
  for actual, expected in (
    (_TWINS.reciprocal(x), 1 / x),
    (_TWINS.scale(x, 0.3), x * np.float32(0.3)),
    (_TWINS.divide(x, y), x / y),
    (_TWINS.sqrt(jnp.asarray(x)), np.sqrt(x)),
    (_TWINS.log1p(jnp.asarray(x)), np.log1p(x)),
  ):
    np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_is_less_of_infinities_and_equals():
  inf = np.inf
  triples = (
    (1.0, 2.0, 1),
    (2.0, 1.0, 0),
    (1.0, 1.0, 0),
    (0.0, 0.0, 0),
    (-inf, 0.0, 1),
    (0.0, -inf, 0),
    (-inf, -inf, 0),
    (inf, inf, 0),
    (0.0, inf, 1),
    (inf, 0.0, 0),
    (-inf, inf, 1),
  )
  x, y, expected = jnp.float32(triples).T
  actual = _TWINS.is_less(x, y)
  np.testing.assert_array_equal(actual, expected)
  assert actual.dtype == jnp.int32


def _use_index(ops, floats, ints):
  del floats, ints
  return ops.index()


def _use_scatter(ops, floats, ints):
  del floats
  ops.scatter(ints, ops.index(), ops.index(), threads.full(1, jnp.int32))
  ops.scatter(ints, ops.index(), ops.index(), None)
  return ops.index()


def _use_add_to(ops, floats, ints):
  del floats
  ops.add_to(ints, ops.index(), ops.index(), threads.full(1, jnp.int32))
  return ops.index()


def _use_gather_rows(ops, floats, ints):
  del ints
  rows = ops.gather_rows(floats, ops.index() * 4, 8)
  total, *others = threads.columns(rows)
  for other in others:
    total = total + other
  return total


def _on_ints(name, *args):
  def use(ops, floats, ints):
    del floats
    return getattr(ops, name)(ops.gather(ints, ops.index()), *args)

  return use


def _on_floats(name, number):
  def use(ops, floats, ints):
    del ints
    x = ops.gather(floats, ops.index())
    row = getattr(ops, name)(*[x] * number)
    if name == "is_less":
      return row
    wide = getattr(ops, name)(*[threads.widen(x, 8)] * number)
    return row + threads.columns(wide)[3]

  return use


def _barrier(name):
  def use(ops, floats, ints):
    del floats, ints
    getattr(ops, name)()
    return ops.index()

  return use


# What a kernel does with vectors of float32 and of int32, and returns `[128]` of.
_USES = {
  "index": _use_index,
  "block_barrier": _barrier("block_barrier"),
  "warp_barrier": _barrier("warp_barrier"),
  "shuffle_xor": _on_ints("shuffle_xor", 5),
  "ballot": _on_ints("ballot"),
  "any": lambda ops, floats, ints: jnp.where(
    ops.any(ops.gather(ints, ops.index())) != 0, ops.index(), 0
  ),
  "count_bits": _on_ints("count_bits"),
  "transpose_bits": _on_ints("transpose_bits"),
  "gather": lambda ops, floats, ints: ops.gather(ints, ops.index()),
  "scatter": _use_scatter,
  "add_to": _use_add_to,
  "gather_rows": _use_gather_rows,
  "reciprocal": _on_floats("reciprocal", 1),
  "scale": lambda ops, floats, ints: ops.scale(
    ops.gather(floats, ops.index()), 0.3
  ),
  "divide": _on_floats("divide", 2),
  "sqrt": _on_floats("sqrt", 1),
  "log1p": _on_floats("log1p", 1),
  "is_less": _on_floats("is_less", 2),
}


@pytest.mark.parametrize("name", _METHODS)
def test_every_operation_is_lowered_for_cuda(name):
  ops, dtype = Threads(), jnp.int32
  if name in ("gather_rows", "reciprocal", "scale", "divide", "sqrt", "log1p"):
    dtype = jnp.float32

  def kernel(floats_ref, ints_ref, out_ref):
    ops.scatter(
      out_ref, ops.index(), _USES[name](ops, floats_ref, ints_ref), None
    )

  def call(floats, ints):
    return plgpu.kernel(
      kernel,
      out_type=jax.ShapeDtypeStruct((THREADS,), dtype),
      compiler_params=plgpu.CompilerParams(
        lowering_semantics=plgpu.LoweringSemantics.Lane,
        unsafe_no_auto_barriers=True,
      ),
      kernel_name=f"uses_{name}",
    )(floats, jax.new_ref(ints))

  text = gpu_mesh.export(
    call, jnp.zeros(8 * THREADS), jnp.zeros(THREADS, jnp.int32)
  )
  assert f"uses_{name}" in text
