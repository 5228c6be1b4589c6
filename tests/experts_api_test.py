# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Grouped products and expert layers against the oracle and dense einsums."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxroute import dispatch, experts, layer, types

IMPLEMENTATIONS = (None, "tiled", "batched", "ragged_dot")
E, D, F = 4, 6, 5

each = pytest.mark.parametrize(
  "implementation", ("tiled", "batched", "ragged_dot")
)


def _normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


def _params(seed=0, e=E, d=D, f=F):
  return experts.init_expert_params(jax.random.key(seed), e, d, f)


def _sizes(*sizes):
  return jnp.asarray(sizes, jnp.int32)


_matmul = jax.jit(experts.grouped_matmul, static_argnames="implementation")
_swiglu = jax.jit(experts.swiglu, static_argnames="implementation")


def _owner(group_sizes, n):
  """[N, E] one-hot float32: which group owns a row, 0 past the groups."""
  ends = np.cumsum(np.asarray(group_sizes))
  begins = ends - np.asarray(group_sizes)
  row = np.arange(n)[:, None]
  return jnp.asarray((begins <= row) & (row < ends), jnp.float32)


def _einsum_matmul(lhs, rhs, owner):
  return jnp.einsum("nd,edf,ne->nf", lhs, rhs, owner)


def _einsum_swiglu(x, params, owner):
  gate = _einsum_matmul(x, params.w_gate, owner)
  up = _einsum_matmul(x, params.w_up, owner)
  return _einsum_matmul(jax.nn.silu(gate) * up, params.w_down, owner)


def _gradients(fn):
  """Gradients of a curved function of `fn`'s result, compiled."""

  def loss(x, weights, third):
    return jnp.sum(jnp.sin(fn(x, weights, third)))

  return jax.jit(jax.grad(loss, argnums=(0, 1)))


def _assert_close(actual, expected, tolerance=2e-6):
  """Equal trees, to a tolerance relative to each array's largest entry."""
  assert jax.tree.structure(actual) == jax.tree.structure(expected)
  for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True):
    assert a.dtype == b.dtype
    scale = np.max(np.abs(np.asarray(b, np.float32)), initial=1.0)
    np.testing.assert_allclose(
      np.asarray(a, np.float32),
      np.asarray(b, np.float32),
      rtol=0,
      atol=tolerance * scale,
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_pattern_of_empty_groups(implementation):
  n = 150  # more than all the groups own
  lhs, rhs = _normal(0, n, D), _normal(1, E, D, F)
  for empty in itertools.product((0, 1), repeat=E):
    group_sizes = np.array([5, 70, 1, 64]) * empty
    out = _matmul(lhs, rhs, _sizes(*group_sizes), implementation=implementation)
    expected = oracle.grouped_matmul(
      np.asarray(lhs), np.asarray(rhs), group_sizes
    )
    _assert_close(out, jnp.asarray(expected))


# Around the tile sizes, the largest twice; the last group ends at the last row.
LAYOUTS = (
  (0, 1200, 0, 0),
  (513, 512, 175, 0),
  (1, 511, 64, 624),
  (1023, 0, 65, 112),
  (63, 65, 1, 1071),
  (300, 300, 300, 299),
  (0, 0, 0, 0),
)


@each
def test_groups_longer_and_shorter_than_a_tile(implementation):
  n = 1200
  lhs, params = _normal(0, n, D), _params()
  for group_sizes in LAYOUTS:
    owner, sizes = _owner(group_sizes, n), _sizes(*group_sizes)
    out = _matmul(lhs, params.w_up, sizes, implementation=implementation)
    _assert_close(out, _einsum_matmul(lhs, params.w_up, owner))
    out = _swiglu(lhs, params, sizes, implementation=implementation)
    _assert_close(out, _einsum_swiglu(lhs, params, owner))


@pytest.mark.parametrize("implementation", ("tiled", "batched"))
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(0, 175), min_size=E, max_size=E))
def test_any_group_sizes(implementation, group_sizes):
  lhs, rhs = _normal(0, 700, D), _normal(1, E, D, F)
  sizes = _sizes(*group_sizes)
  out = _matmul(lhs, rhs, sizes, implementation=implementation)
  _assert_close(out, _einsum_matmul(lhs, rhs, _owner(group_sizes, 700)))


@each
@pytest.mark.parametrize("n", (0, 1, 63, 65))
def test_few_rows(implementation, n):
  lhs, params = _normal(0, n, D), _params()
  sizes, owner = _sizes(0, n, 0, 0), _owner((0, n, 0, 0), n)

  def ours(lhs, params, sizes):
    return experts.swiglu(lhs, params, sizes, implementation=implementation)

  assert ours(lhs, params, sizes).shape == (n, D)
  actual, expected = _gradients(ours), _gradients(_einsum_swiglu)
  _assert_close(actual(lhs, params, sizes), expected(lhs, params, owner))


GRADIENT_LAYOUTS = ((700, 0, 64, 436), (1, 2, 3, 4), (0, 0, 0, 0))


@each
def test_matmul_gradients(implementation):
  lhs, rhs = _normal(0, 1200, D), _normal(1, E, D, F)

  def ours(lhs, rhs, sizes):
    return experts.grouped_matmul(
      lhs, rhs, sizes, implementation=implementation
    )

  actual, by_einsum, by_ragged_dot = map(
    _gradients, (ours, _einsum_matmul, jax.lax.ragged_dot)
  )
  for group_sizes in GRADIENT_LAYOUTS:
    sizes, owner = _sizes(*group_sizes), _owner(group_sizes, 1200)
    _assert_close(actual(lhs, rhs, sizes), by_einsum(lhs, rhs, owner))
    _assert_close(actual(lhs, rhs, sizes), by_ragged_dot(lhs, rhs, sizes))


@each
def test_swiglu_gradients(implementation):
  x, params = _normal(0, 1200, D), _params()

  def ours(x, params, sizes):
    return experts.swiglu(x, params, sizes, implementation=implementation)

  actual, expected = _gradients(ours), _gradients(_einsum_swiglu)
  for group_sizes in GRADIENT_LAYOUTS:
    sizes, owner = _sizes(*group_sizes), _owner(group_sizes, 1200)
    _assert_close(actual(x, params, sizes), expected(x, params, owner))


@each
def test_rows_past_the_groups_are_not_read(implementation):
  n, sizes = 100, _sizes(30, 0, 10, 5)
  x = _normal(0, n, D).at[45:].set(jnp.nan)
  params = _params()

  def loss(x, params):
    out = experts.swiglu(x, params, sizes, implementation=implementation)
    # The cotangent of those rows is NaN as well.
    return jnp.sum(out * x), out

  (d_x, d_params), out = jax.grad(loss, argnums=(0, 1), has_aux=True)(x, params)
  np.testing.assert_array_equal(out[45:], 0)
  np.testing.assert_array_equal(d_x[45:], 0)
  assert all(jnp.all(jnp.isfinite(w)) for w in jax.tree.leaves(d_params))
  out, pull = jax.vjp(
    lambda lhs, rhs: experts.grouped_matmul(
      lhs, rhs, sizes, implementation=implementation
    ),
    x,
    params.w_up,
  )
  d_lhs, d_rhs = pull(x[:, :F])
  np.testing.assert_array_equal(out[45:], 0)
  np.testing.assert_array_equal(d_lhs[45:], 0)
  assert jnp.all(jnp.isfinite(d_rhs))


@each
def test_bfloat16_sums_in_float32(implementation):
  # A bfloat16 sum of ones stops at 256.
  n, d = 1000, 1024
  lhs, rhs = jnp.ones((n, d), jnp.bfloat16), jnp.ones((1, d, 1), jnp.bfloat16)

  def matmul(lhs, rhs):
    return experts.grouped_matmul(
      lhs, rhs, _sizes(n), implementation=implementation
    )

  @jax.jit
  def both_ways(lhs, rhs):
    out, pull = jax.vjp(matmul, lhs, rhs)
    return out, *pull(out / d)

  out, d_lhs, d_rhs = both_ways(lhs, rhs)
  assert out.dtype == d_lhs.dtype == d_rhs.dtype == jnp.bfloat16
  np.testing.assert_array_equal(out, d)
  np.testing.assert_array_equal(d_rhs, n)
  wide = experts.grouped_matmul(
    lhs,
    rhs,
    _sizes(n),
    implementation=implementation,
    preferred_element_type=jnp.float32,
  )
  assert wide.dtype == jnp.float32


@each
def test_bfloat16_swiglu(implementation):
  x, params, sizes = _normal(0, 130, 32), _params(0, E, 32, 48), (70, 0, 9, 50)
  x, params = jax.tree.map(lambda v: v.astype(jnp.bfloat16), (x, params))

  def ours(x, params, sizes):
    out = experts.swiglu(x, params, sizes, implementation=implementation)
    assert out.dtype == jnp.bfloat16
    return out.astype(jnp.float32)

  def exact(x, params, owner):
    x, params = jax.tree.map(lambda v: v.astype(jnp.float32), (x, params))
    return _einsum_swiglu(x, params, owner)

  sizes, owner = _sizes(*sizes), _owner(sizes, 130)
  _assert_close(jax.jit(ours)(x, params, sizes), exact(x, params, owner), 1e-2)
  _assert_close(
    _gradients(ours)(x, params, sizes),
    _gradients(exact)(x, params, owner),
    2e-2,
  )


def _routing(expert_idx, weights, token_mask=None, num_experts=E):
  t = expert_idx.shape[0]
  mask = np.ones(t, bool) if token_mask is None else token_mask
  load = np.bincount(
    np.asarray(expert_idx)[mask].ravel(), minlength=num_experts
  )
  return types.Routing(
    expert_idx=jnp.asarray(expert_idx, jnp.int32),
    weights=jnp.asarray(weights, jnp.float32),
    counts=types.Counts(load=jnp.asarray(load, jnp.int32)),
    cutoff=jnp.zeros(t),
    token_mask=jnp.asarray(mask),
  )


def _choices(seed, t, k, num_experts=E):
  rng = np.random.default_rng(seed)
  order = np.argsort(rng.random((t, num_experts)), axis=1)
  return order[:, :k].astype(np.int32), rng.random((t, k)).astype(np.float32)


def _oracle_moe(x, params, routing, kept):
  weights = (params.w_gate, params.w_up, params.w_down)
  out = oracle.moe(
    *map(np.asarray, (x, *weights, routing.expert_idx, routing.weights)), kept
  )
  return jnp.asarray(out)


_moe = jax.jit(layer.local_moe, static_argnames=("capacity", "implementation"))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("t, k", [(0, 2), (1, 4), (7, 1), (90, 3)])
def test_moe_against_the_oracle(implementation, t, k):
  x, params = _normal(0, t, D), _params()
  routing = _routing(*_choices(1, t, k))
  out, group_sizes = _moe(x, routing, params, implementation=implementation)
  _assert_close(out, _oracle_moe(x, params, routing, np.ones((t, k), bool)))
  np.testing.assert_array_equal(group_sizes, routing.load)


@pytest.mark.parametrize("capacity", (1, 7, 50))
def test_an_expert_keeps_its_first_assignments_in_token_order(capacity):
  t, k = 40, 2
  x, params = _normal(0, t, D), _params()
  routing = _routing(*_choices(1, t, k))
  kept, seen = np.zeros((t, k), bool), np.zeros(E, int)
  for i, j in itertools.product(range(t), range(k)):
    e = int(routing.expert_idx[i, j])
    kept[i, j] = seen[e] < capacity
    seen[e] += 1
  out, group_sizes = _moe(x, routing, params, capacity=capacity)
  _assert_close(out, _oracle_moe(x, params, routing, kept))
  np.testing.assert_array_equal(group_sizes, np.minimum(seen, capacity))


@each
def test_masked_and_nan_tokens(implementation):
  t, k = 30, 2
  expert_idx, weights = _choices(1, t, k)
  mask = np.arange(t) % 3 != 0
  weights[~mask] = 0
  weights[9] = np.nan  # a token with a NaN logit: in no group, and it shows
  routing = _routing(expert_idx, weights, mask)
  params = _params()
  x = _normal(0, t, D)

  def loss(x, params):
    out, group_sizes = layer.local_moe(
      x, routing, params, implementation=implementation
    )
    return jnp.sum(jnp.where(mask[:, None], out, 0)), (out, group_sizes)

  grad = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
  (_, clean), (expected, _) = grad(x, params)
  dirty = jnp.where(mask[:, None], x, jnp.nan)
  (d_x, d_params), (out, group_sizes) = grad(dirty, params)
  np.testing.assert_array_equal(out, expected)
  np.testing.assert_array_equal(out[9], jnp.nan)
  padding = ~mask & (np.arange(t) != 9)
  np.testing.assert_array_equal(out[padding], 0)
  np.testing.assert_array_equal(d_x[~mask], 0)
  np.testing.assert_array_equal(group_sizes, routing.load)
  jax.tree.map(np.testing.assert_array_equal, d_params, clean)
  assert all(jnp.all(jnp.isfinite(w)) for w in jax.tree.leaves(d_params))


@each
def test_shards_of_the_experts_sum_to_the_whole(implementation):
  t, k, half = 40, 3, E // 2
  expert_idx, weights = _choices(1, t, k)
  x, params = _normal(0, t, D), _params()
  total = jnp.zeros_like(x)
  for first in (0, half):
    local = expert_idx - first
    local = np.where((local >= 0) & (local < half), local, half)
    shard = jax.tree.map(lambda w, i=first: w[i : i + half], params)
    out, group_sizes = _moe(
      x, _routing(local, weights), shard, implementation=implementation
    )
    assert group_sizes.shape == (half,)
    total += out
  whole, _ = _moe(x, _routing(expert_idx, weights), params)
  _assert_close(total, whole)


def test_a_shard_is_cut_for_its_share():
  t, k, half = 400, 2, E // 2
  routing, params = _routing(*_choices(1, t, k)), _params(e=half)
  moe = functools.partial(layer.local_moe, implementation="batched")
  text = str(jax.make_jaxpr(moe)(_normal(0, t, D), routing, params))
  # 1.25 times half of the 800 rows, over the half of the experts.
  assert f"f32[{half},256,{D}]" in text
  assert f"f32[{half},504,{D}]" not in text


@pytest.mark.gpu
def test_on_a_gpu():
  gpu = jax.devices("gpu")[0]
  x, params, sizes = (
    _normal(0, 300, 64),
    _params(0, 8, 64, 48),
    (0, 150, *[25] * 6),
  )
  owner, sizes = _owner(sizes, 300), _sizes(*sizes)
  x, params, sizes = jax.device_put((x, params, sizes), gpu)
  with jax.default_matmul_precision("highest"):
    actual = _gradients(experts.swiglu)(x, params, sizes)
    expected = _gradients(_einsum_swiglu)(x, params, jax.device_put(owner, gpu))
  _assert_close(jax.device_get(actual), jax.device_get(expected), 1e-5)


@each
def test_moe_gradients(implementation):
  t, k = 50, 3
  expert_idx, weights = _choices(1, t, k)
  x, params, weights = _normal(0, t, D), _params(), jnp.asarray(weights)

  def ours(x, params, weights):
    routing = types.Routing(
      expert_idx=jnp.asarray(expert_idx),
      weights=weights,
      counts=types.Counts(load=jnp.zeros(E, jnp.int32)),
      cutoff=jnp.zeros(t),
      token_mask=jnp.ones(t, bool),
    )
    return layer.local_moe(x, routing, params, implementation=implementation)[0]

  def dense(x, params, weights):
    one_hot = jax.nn.one_hot(expert_idx, E)
    parts = [
      _einsum_swiglu(x, params, one_hot[:, i]) * weights[:, i, None]
      for i in range(k)
    ]
    return sum(parts[1:], parts[0])

  def grads(fn):
    def loss(*args):
      return jnp.sum(jnp.sin(fn(*args)))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(x, params, weights)

  _assert_close(grads(ours), grads(dense), 5e-6)


def test_dense_swiglu_is_one_expert_of_all_rows():
  x, params = _normal(0, 20, D), _params(e=1)
  dense = experts.dense_swiglu(x, jax.tree.map(lambda w: w[0], params))
  _assert_close(dense, experts.swiglu(x, params, _sizes(20)))


def test_one_trace_lowers_for_every_platform():
  params = jax.eval_shape(lambda: _params(0, 8, 128, 128))
  x = jax.ShapeDtypeStruct((512, 128), jnp.float32)
  sizes = jax.ShapeDtypeStruct((8,), jnp.int32)

  def step(x, params, sizes):
    def loss(x, params):
      return jnp.sum(experts.swiglu(x, params, sizes))

    return jax.value_and_grad(loss, argnums=(0, 1))(x, params)

  traced = jax.jit(step).trace(x, params, sizes)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert "ragged_dot" in text
  assert "while" not in text
  for platform in ("cpu", "cuda"):
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert "ragged_dot" not in text
    assert "while" in text
    # All experts in one product, of 1.25 times their share of the rows.
    batched = "tensor<8x80x128xf32>, tensor<8x128x128xf32>" in text
    assert batched == (platform == "cuda")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_inside_shard_map_with_replicated_parameters(implementation):
  mesh = jax.make_mesh((4,), ("data",))
  x, params = _normal(0, 4, 60, D), _params()
  sizes = _sizes((1, 2, 3, 4), (60, 0, 0, 0), (0, 0, 0, 0), (0, 20, 20, 20))

  def grads(x, params, sizes):
    def loss(x, params):
      out = experts.swiglu(
        x[0], params, sizes[0], implementation=implementation
      )
      return jnp.sum(jnp.sin(out))

    return jax.grad(loss, argnums=(0, 1))(x, params)

  specs = jax.P("data"), jax.P()
  with jax.set_mesh(mesh):
    args = [
      jax.device_put(v, spec)
      for v, spec in zip((x, params, sizes), (*specs, specs[0]), strict=True)
    ]
    d_x, d_params = jax.jit(
      jax.shard_map(
        grads, in_specs=(*specs, specs[0]), out_specs=specs, check_vma=True
      )
    )(*args)
  local = jax.jit(grads)
  parts = [local(x[i : i + 1], params, sizes[i : i + 1]) for i in range(4)]
  _assert_close(
    jax.device_get(d_x), np.concatenate([np.asarray(p[0]) for p in parts])
  )
  total = jax.tree.map(
    lambda *w: np.sum(np.stack(w), 0), *[p[1] for p in parts]
  )
  _assert_close(jax.device_get(d_params), total)


def test_scan_over_layers_and_remat_change_nothing():
  x, layers, sizes = _normal(0, 90, D), 3, _sizes(30, 40, 0, 15)
  params = jax.tree.map(
    lambda *w: jnp.stack(w), *[_params(i) for i in range(layers)]
  )

  def layer(x, params):
    return x + experts.swiglu(x, params, sizes)

  def loop(x, params):
    for i in range(layers):
      x = layer(x, jax.tree.map(lambda w, i=i: w[i], params))
    return x

  def scan(fn):
    return lambda x, params: jax.lax.scan(
      lambda x, p: (fn(x, p), None), x, params
    )[0]

  def grads(fn):
    def loss(x, params):
      return jnp.sum(jnp.sin(fn(x, params)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))(x, params)

  expected = grads(loop)
  _assert_close(grads(scan(layer)), expected)
  _assert_close(grads(scan(jax.checkpoint(layer))), expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_vmap_over_layers(implementation):
  x, sizes = _normal(0, 2, 90, D), _sizes((30, 40, 0, 15), (0, 0, 90, 0))
  params = jax.tree.map(lambda *w: jnp.stack(w), _params(0), _params(1))

  def swiglu(x, params, sizes):
    return experts.swiglu(x, params, sizes, implementation=implementation)

  parts = [
    swiglu(x[i], jax.tree.map(lambda w, i=i: w[i], params), sizes[i])
    for i in range(2)
  ]
  _assert_close(jax.vmap(swiglu)(x, params, sizes), jnp.stack(parts))


def test_new_group_sizes_do_not_retrace():
  traces = []

  @jax.jit
  def step(x, params, sizes):
    traces.append(1)
    return experts.swiglu(x, params, sizes)

  for sizes in ((10, 0, 0, 0), (0, 3, 3, 3)):
    step(_normal(0, 10, D), _params(), _sizes(*sizes))
  assert len(traces) == 1


def test_init_has_variance_one_over_fan_in():
  params = experts.init_expert_params(
    jax.random.key(0), 8, 64, 256, jnp.bfloat16
  )
  assert params.w_gate.shape == params.w_up.shape == (8, 64, 256)
  assert params.w_down.shape == (8, 256, 64)
  assert {w.dtype for w in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
  for w, fan_in in ((params.w_gate, 64), (params.w_down, 256)):
    variance = np.var(np.asarray(w, np.float32))
    np.testing.assert_allclose(variance, 1 / fan_in, rtol=0.05)
  assert not np.array_equal(params.w_gate, params.w_up)


LHS, RHS, SIZES = jnp.ones((3, D)), jnp.ones((E, D, F)), jnp.ones(E, jnp.int32)


@pytest.mark.parametrize(
  "args, words",
  [
    ((jnp.ones((2, 3, D)), RHS, SIZES), r"`lhs`.*\[N, D\].*\(2, 3, 6\)"),
    ((LHS, RHS[0], SIZES), r"`rhs` \[E, D, F\].*got .*\(6, 5\)"),
    ((LHS[:, :2], RHS, SIZES), r"one D, got \(3, 2\)"),
    ((LHS.astype(jnp.bfloat16), RHS, SIZES), "one dtype, got bfloat16"),
    ((LHS, RHS, SIZES[:2]), r"`group_sizes`.*\[E=4\].*\(2,\)"),
    ((LHS, RHS, jnp.ones(E)), "`group_sizes` must be int32.*got float32"),
  ],
)
def test_bad_matmul_arguments_are_named(args, words):
  with pytest.raises(ValueError, match=words):
    experts.grouped_matmul(*args)


def test_bad_swiglu_arguments_are_named():
  params = _params()

  def replaced(**arrays):
    fields = {f: getattr(params, f) for f in ("w_gate", "w_up", "w_down")}
    return experts.ExpertParams(**(fields | arrays))

  for bad, words in (
    (replaced(w_up=params.w_up[:, :, :2]), r"`w_up` and `w_down`.*\(4, 6, 2\)"),
    (replaced(w_down=params.w_up), r"\[E, F, D\], got .*\(4, 6, 5\)"),
    (replaced(w_up=params.w_up.astype(jnp.bfloat16)), "`w_up`.*bfloat16"),
    (replaced(w_down=params.w_down.astype(jnp.bfloat16)), "`w_down`.*bfloat16"),
  ):
    with pytest.raises(ValueError, match=words):
      experts.swiglu(LHS, bad, SIZES)


def test_unknown_implementation_is_refused():
  words = "None or one of 'ragged_dot', 'tiled', 'batched', got 'tpu'"
  with pytest.raises(ValueError, match=words):
    experts.grouped_matmul(LHS, RHS, SIZES, implementation="tpu")
  with pytest.raises(ValueError, match=words):
    experts.swiglu(LHS, _params(), SIZES, implementation="tpu")


def test_negative_expected_rows_are_refused():
  with pytest.raises(ValueError, match="`expected_rows`.*got -1"):
    experts.swiglu(LHS, _params(), SIZES, expected_rows=-1)


def test_identity_experts_give_back_the_tokens():
  # Through the same order as a layer's, with weights that sum to 1.
  t, k = 33, 3
  expert_idx, weights = _choices(0, t, k)
  weights = jnp.asarray(weights / weights.sum(1, keepdims=True))
  x, identity = _normal(0, t, D), jnp.tile(jnp.eye(D), (E, 1, 1))
  order = dispatch.sort_by_expert(jnp.asarray(expert_idx), E)
  rows = experts.grouped_matmul(
    dispatch.dispatch(x, order), identity, order.group_sizes
  )
  _assert_close(dispatch.combine(rows, weights, order), x)
