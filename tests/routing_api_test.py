# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""`route` against the oracle, its edge rules, gradients, sharding and errors."""

import functools

import cases
import conformance
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

import jaxroute
from jaxroute import dispatch, scores

pytestmark = pytest.mark.optimized

_route = jax.jit(jaxroute.route, static_argnames=("config", "implementation"))
_bias = conformance.bias


def _config(num_experts=8, top_k=2, **kwargs):
  return jaxroute.RouterConfig(num_experts=num_experts, top_k=top_k, **kwargs)


def _assert_equal(a, b):
  jax.tree.map(np.testing.assert_array_equal, a, b)


_assert_is_oracle = functools.partial(
  conformance.assert_is_oracle,
  jax.jit(conformance.with_selection(_route), static_argnames="config"),
)


@pytest.mark.parametrize("shape", conformance.rows(cases.SHAPES))
def test_route_is_the_oracle_on_every_shape(shape):
  t, e, k = shape
  for kind in cases.KINDS:
    _assert_is_oracle(cases.logits(kind, t, e), _bias(e), _config(e, k))


@pytest.mark.parametrize("name", conformance.rows(cases.FAMILIES))
def test_route_is_the_oracle_for_every_family(name):
  for kind in cases.KINDS:
    _assert_is_oracle(cases.logits(kind, 23, 64), _bias(64), cases.family(name))


def test_token_mask_is_the_oracle():
  mask = np.random.default_rng(0).random(23) < 0.5
  for kind in ("random", "nan"):
    _assert_is_oracle(
      cases.logits(kind, 23, 64), _bias(64), cases.family("deepseek_v3"), mask
    )


@pytest.mark.any_jax
def test_many_experts_per_token_are_the_oracle():
  config = _config(64, 20)
  for kind in ("ties", "masked"):
    _assert_is_oracle(cases.logits(kind, 9, 64), None, config)


def test_bfloat16_logits_are_compared_in_float32():
  logits = cases.logits("random", 23, 64)
  low = jnp.asarray(logits, jnp.bfloat16)
  config = cases.family("deepseek_v3")
  a = _route(low, _bias(64), config)
  b = _route(low.astype(jnp.float32), _bias(64), config)
  _assert_equal(a, b)


def test_ties_go_to_the_lowest_index():
  r = _route(jnp.zeros((3, 8)), None, _config(top_k=3))
  np.testing.assert_array_equal(r.expert_idx, [[0, 1, 2]] * 3)
  np.testing.assert_array_equal(r.load, [3, 3, 3, 0, 0, 0, 0, 0])


@pytest.mark.parametrize("zeros", ([0.0, -0.0], [-0.0, 0.0]))
def test_zeros_of_both_signs_tie(zeros):
  logits = jnp.array([[-1.0, *zeros, -2.0]])
  r = _route(logits, None, _config(4, 2, bias_space="logits"))
  np.testing.assert_array_equal(r.expert_idx, [[1, 2]])


def test_infinite_logits_come_first_and_masked_ones_last():
  inf = jnp.inf
  logits = jnp.array([[-inf, 1.0, -inf, inf, -inf, -3e38, -inf, -inf]])
  config = _config(8, 5, score_after_top_k=True, score_fn="sigmoid")
  r = _route(logits, None, config)
  np.testing.assert_array_equal(r.expert_idx, [[3, 1, 5, 0, 2]])
  np.testing.assert_array_equal(r.cutoff, [-inf])


def test_masked_experts_outside_the_best_groups_tie_with_those_inside():
  # Groups 1 and 3 are kept; one expert of them is left, then index 0 comes.
  x = jnp.full((1, 16), -jnp.inf).at[0, jnp.array([5, 12, 13])].set(1.0)
  config = _config(16, 5, num_groups=4, group_top_k=2, group_score="top1")
  r = _route(x, None, config)
  np.testing.assert_array_equal(r.expert_idx, [[5, 12, 13, 0, 1]])


def test_a_bias_cannot_unmask_an_expert():
  logits = jnp.array([[0.0, -jnp.inf, 0.0, 0.0]])
  bias = jnp.array([0.0, 1e9, 0.0, 0.0])
  r = _route(logits, bias, _config(4, 3))
  np.testing.assert_array_equal(r.expert_idx, [[0, 2, 3]])


def test_nan_never_beats_a_finite_logit():
  nan = jnp.nan
  logits = jnp.array([[nan, -50.0, nan, -60.0], [nan, nan, nan, 1.0]])
  for score_fn in ("sigmoid", "softmax", "sqrtsoftplus"):
    r = _route(logits, None, _config(4, 2, score_fn=score_fn))
    np.testing.assert_array_equal(r.expert_idx, [[1, 3], [3, 0]])
    assert jnp.isfinite(r.weights[0]).all()
    assert jnp.isnan(r.weights[1]).all()
    np.testing.assert_array_equal(r.load, [0, 1, 0, 1])
    np.testing.assert_array_equal(r.token_mask, [True, False])


def test_padding_is_invisible():
  logits, bias = cases.logits("random", 23, 64), _bias(64)
  config = cases.family("deepseek_v3")
  padded = np.full((32, 64), np.nan, np.float32)
  padded[:23] = logits
  a = _route(logits, bias, config)
  b = _route(padded, bias, config, np.arange(32) < 23)
  np.testing.assert_array_equal(b.expert_idx[:23], a.expert_idx)
  np.testing.assert_array_equal(b.weights[:23], a.weights)
  np.testing.assert_array_equal(b.weights[23:], 0)
  np.testing.assert_array_equal(b.load, a.load)


def test_the_bias_chooses_but_never_weighs():
  logits = jnp.array([[0.0, 2.0, 1.0, -1.0]])
  bias = jnp.array([0.0, 0.0, 0.0, 1.0])
  r = _route(logits, bias, _config(4, 2, normalize_weights=False))
  np.testing.assert_array_equal(r.expert_idx, [[3, 1]])
  np.testing.assert_allclose(
    r.weights, jax.nn.sigmoid(jnp.array([[-1.0, 2.0]])), rtol=1e-6
  )


def test_a_constant_bias_changes_nothing():
  # Multiples of 1/8 below 16: the shift by 2 is exact in float32.
  rng = np.random.default_rng(0)
  logits = rng.integers(-64, 64, (23, 64)).astype(np.float32) / 8
  logits[rng.random((23, 64)) < 0.3] = -np.inf
  bias = rng.integers(-16, 16, 64).astype(np.float32) / 8
  config = cases.family("sigmoid_logit_bias")
  a, b = _route(logits, bias, config), _route(logits, bias + 2, config)
  np.testing.assert_array_equal(a.expert_idx, b.expert_idx)
  np.testing.assert_array_equal(a.weights, b.weights)
  np.testing.assert_array_equal(a.cutoff + 2, b.cutoff)


@pytest.mark.parametrize(
  "name", ("deepseek_v3", "deepseek_v4", "mixtral", "olmoe", "soft_cap")
)
def test_gradient_is_that_of_plain_indexing(name):
  config = cases.family(name)
  logits, bias = jnp.asarray(cases.logits("random", 5, 64)), _bias(64)
  out = jnp.asarray(cases.logits("random", 5, config.top_k, seed=2))
  idx = _route(logits, bias, config).expert_idx

  def plain(x):
    x = scores.prepare_logits(x, config)
    rows = jnp.arange(5)[:, None]
    if config.score_after_top_k:
      w = scores.apply_score_fn(x[rows, idx], config.score_fn)
    else:
      w = scores.apply_score_fn(x, config.score_fn)[rows, idx]
    if config.normalize_weights:
      w = w / (w.sum(axis=1, keepdims=True) + config.norm_eps)
    return jnp.sum(out * w * config.scaling_factor)

  def ours(x, b):
    return jnp.sum(out * jaxroute.route(x, b, config).weights)

  grad, bias_grad = jax.jit(jax.grad(ours, argnums=(0, 1)))(logits, bias)
  expected = jax.jit(jax.grad(plain))(logits)
  np.testing.assert_allclose(grad, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(bias_grad, 0)


@pytest.mark.any_jax
@pytest.mark.parametrize(
  "name", ("deepseek_v3", "deepseek_v4", "mixtral", "lfb")
)
def test_gradient_is_finite(name):
  config = cases.family(name)

  @jax.jit
  def grad(x, mask):
    return jax.grad(
      lambda x: jnp.sum(jaxroute.route(x, None, config, mask).weights ** 2)
    )(x)

  everyone = np.ones(10, bool)
  for kind in ("masked", "saturated", "constant"):
    x = cases.logits(kind, 10, 64)
    assert jnp.isfinite(grad(x, everyone)).all(), kind
  x = cases.logits("random", 10, 64)
  x[7:] = np.nan
  g = grad(x, np.arange(10) < 7)
  assert jnp.isfinite(g).all()
  np.testing.assert_array_equal(g[7:], 0)


@pytest.mark.any_jax
def test_rematerialisation_changes_nothing():
  config, x = cases.family("deepseek_v3"), cases.logits("ties", 16, 64)

  def loss(x):
    r = jaxroute.route(x, _bias(64), config)
    return jnp.sum(r.weights**2), r

  grad = jax.jit(jax.grad(loss, has_aux=True))
  remat = jax.jit(jax.grad(jax.checkpoint(loss), has_aux=True))
  (a, r), (b, s) = grad(x), remat(x)
  _assert_equal(r, s)
  np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_vmap_is_a_loop():
  config, x = cases.family("deepseek_v3"), cases.logits("ties", 24, 64)
  x = x.reshape(3, 8, 64)
  batched = jax.jit(jax.vmap(lambda x: jaxroute.route(x, None, config)))(x)
  for i in range(3):
    one = _route(x[i], None, config)
    _assert_equal(jax.tree.map(lambda a, i=i: a[i], batched), one)


def _sharded_inputs(mesh):
  x = cases.logits("ties", 64, 64)
  mask = np.arange(64) % 5 > 0
  tokens = jax.NamedSharding(mesh, jax.P("data"))
  return x, mask, jax.device_put((x, mask), tokens)


@pytest.mark.devices(8)
def test_explicit_sharding_changes_nothing():
  config = cases.family("deepseek_v3")
  mesh = jax.make_mesh((8,), ("data",))
  x, mask, sharded = _sharded_inputs(mesh)
  expected = _route(x, _bias(64), config, mask)
  with jax.set_mesh(mesh):
    actual = _route(sharded[0], _bias(64), config, sharded[1])
  _assert_equal(actual, expected)
  assert jax.typeof(actual.expert_idx).sharding.spec == jax.P("data", None)
  assert jax.typeof(actual.load).sharding.spec == jax.P(None)
  assert actual.load.is_fully_replicated


@pytest.mark.devices(8)
def test_automatic_sharding_changes_nothing():
  config = cases.family("deepseek_v3")
  auto = (jax.sharding.AxisType.Auto,)
  mesh = jax.make_mesh((8,), ("data",), axis_types=auto)
  x, mask, sharded = _sharded_inputs(mesh)
  actual = _route(sharded[0], _bias(64), config, sharded[1])
  _assert_equal(actual, _route(x, _bias(64), config, mask))


@pytest.mark.devices(8)
def test_shard_map_changes_nothing():
  config = cases.family("deepseek_v3")
  mesh = jax.make_mesh((8,), ("data",))
  x, mask, sharded = _sharded_inputs(mesh)
  tokens, whole = jax.P("data"), jax.P()

  @jax.jit
  @functools.partial(
    jax.shard_map,
    mesh=mesh,
    in_specs=(tokens, whole, tokens),
    out_specs=(tokens, tokens, whole),
    check_vma=True,
  )
  def sharded_route(x, bias, mask):
    r = jaxroute.route(x, bias, config, mask)
    return r.expert_idx, r.weights, jax.lax.psum(r.load, "data")

  expected = _route(x, _bias(64), config, mask)
  _assert_equal(
    sharded_route(sharded[0], _bias(64), sharded[1]),
    (expected.expert_idx, expected.weights, expected.load),
  )


def test_new_values_do_not_retrace():
  traces = []

  @jax.jit
  def count(x, bias, mask):
    traces.append(1)
    return jaxroute.route(x, bias, _config(), mask).load

  for seed in range(3):
    x = cases.logits("random", 4, 8, seed)
    count(x, _bias(8, seed), np.arange(4) < seed)
  assert len(traces) == 1


@pytest.mark.cpu("an accelerator's own kernel is for no other platform")
@pytest.mark.parametrize("platform", ("tpu", "cuda"))
@pytest.mark.parametrize("name", ("deepseek_v3", "lfb"))
def test_lowers_for(platform, name):
  config = cases.family(name)

  def routes(x, bias, mask):
    r = jaxroute.route(x, bias, config, mask)
    return r, dispatch.sort_by_expert(r.expert_idx, 64, r.token_mask)

  x, mask = jnp.zeros((16, 64), jnp.bfloat16), jnp.ones(16, bool)
  traced = jax.jit(routes).trace(x, jnp.zeros(64), mask)
  text = traced.lower(lowering_platforms=(platform,)).as_text()
  # Of the permutation and its inverse.
  assert text.count("stablehlo.sort") == 2


@pytest.mark.cpu("a kernel's cutoff costs a store, whether used or not")
def test_an_unused_cutoff_costs_nothing():
  x, config = jnp.zeros((64, 64)), _config(64, 4)

  def size(*fields):
    def chosen(x):
      r = jaxroute.route(x, None, config)
      return [getattr(r, f) for f in fields]

    compiled = jax.jit(chosen).lower(x).compile()
    return compiled.as_text().count(" reduce(")

  assert size("expert_idx") < size("expert_idx", "cutoff")


@hypothesis.given(st.integers(0, 2**31), st.sampled_from(cases.KINDS))
@hypothesis.settings(max_examples=25)
def test_load_is_k_per_valid_token(seed, kind):
  rng = np.random.default_rng(seed)
  logits, mask = cases.logits(kind, 33, 64, seed), rng.random(33) < 0.7
  r = _route(logits, _bias(64, seed), _config(64, 6), mask)
  assert r.load.sum() == 6 * r.token_mask.sum()
  assert not np.any(r.token_mask & ~mask)
  assert all(len(set(row)) == 6 for row in np.asarray(r.expert_idx).tolist())


_GOOD = dict(
  logits=np.zeros((3, 8), np.float32),
  expert_bias=np.zeros(8, np.float32),
  config=_config(),
  token_mask=np.ones(3, bool),
)


@pytest.mark.parametrize(
  ("change", "words"),
  (
    (dict(logits=np.zeros((3, 7), np.float32)), ("logits", "(3, 7)", "Flat")),
    (dict(logits=np.zeros((1, 3, 8), np.float32)), ("logits", "Flatten")),
    (dict(logits=np.zeros((3, 8), np.int32)), ("logits", "int32", "Pass")),
    (dict(expert_bias=np.zeros(7, np.float32)), ("expert_bias", "(7,)", "Pas")),
    (dict(expert_bias=np.zeros((1, 8), np.float32)), ("expert_bias", "one la")),
    (dict(expert_bias=np.zeros(8, np.float16)), ("expert_bias", "float16")),
    (dict(token_mask=np.ones(4, bool)), ("token_mask", "(4,)", "True")),
    (dict(token_mask=np.ones(3, np.int32)), ("token_mask", "int32", "True")),
    (dict(implementation="triton"), ("implementation", "triton", "'xla'")),
  ),
)
def test_route_errors_name_argument_value_and_fix(change, words):
  with pytest.raises(ValueError) as error:
    jaxroute.route(**{**_GOOD, **change})
  for word in words:
    assert word in str(error.value)


def test_xla_has_nothing_to_interpret():
  kwargs = dict(implementation="xla", interpret=True)
  words = "no kernel to interpret.*True"
  with pytest.raises(NotImplementedError, match=words):
    jaxroute.route(jnp.zeros((4, 8)), None, _config(), **kwargs)
  with pytest.raises(NotImplementedError, match=words):
    jaxroute.routing.project_and_route(
      jnp.zeros((4, 16)), jnp.zeros((16, 8)), None, _config(), **kwargs
    )
