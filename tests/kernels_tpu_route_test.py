# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The TPU routing kernel, interpreted: oracle, XLA bit for bit, gradients."""

import dataclasses
import functools

import cases
import conformance
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tpu_mesh
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType

import jaxroute
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.route import call

_route = functools.partial(
  jaxroute.route, implementation="pallas_tpu", interpret=True
)

_interpreted = conformance.jit_interpreted(_route, static_argnames="config")
_with_selection = conformance.jit_interpreted(
  conformance.with_selection(_route), static_argnames="config"
)

_xla = jax.jit(
  functools.partial(jaxroute.route, implementation="xla"),
  static_argnames="config",
)


def _config(num_experts=8, top_k=2, **kwargs):
  return jaxroute.RouterConfig(num_experts=num_experts, top_k=top_k, **kwargs)


def _assert_conforms(t, config, masked=False):
  """Held to the oracle, as the XLA version is on the same numbers."""
  e = config.num_experts
  mask = np.random.default_rng(0).random(t) < 0.7 if masked else None
  # The sum of a softmax is taken in another order than by XLA.
  rtol = 1e-6 if config.needs_row_softmax else 0
  for kind in cases.KINDS:
    x, bias = cases.logits(kind, t, e), conformance.bias(e)
    conformance.assert_is_oracle(_with_selection, x, bias, config, mask, rtol)


# XLA takes half a minute to compile the last of these.
@pytest.mark.parametrize(
  "shape",
  conformance.rows(
    cases.SHAPES, long=[(33, 64, 6), (130, 96, 8), (21, 512, 10)]
  ),
)
def test_every_shape(shape):
  t, e, k = shape
  _assert_conforms(t, _config(e, k))


@pytest.mark.parametrize("name", conformance.rows(cases.FAMILIES))
def test_every_family(name):
  _assert_conforms(23, cases.family(name))


@pytest.mark.parametrize(
  ("num_experts", "groups"),
  (
    (64, 2),
    pytest.param(96, 24, marks=pytest.mark.any_jax),
    # Of two and four experts each; 24 of 96 are of four.
    pytest.param(64, 32, marks=pytest.mark.long),
    pytest.param(64, 16, marks=pytest.mark.long),
  ),
)
def test_groups_larger_and_smaller_than_a_sublane(num_experts, groups):
  config = _config(num_experts, 4, num_groups=groups, group_top_k=2)
  _assert_conforms(23, config)


@pytest.mark.parametrize(
  ("t", "e"),
  (
    (2500, 16),
    # The tokens of one neighbour and the experts of the other.
    pytest.param(3500, 16, marks=pytest.mark.long),
    pytest.param(3500, 128, marks=pytest.mark.long),
  ),
)
def test_blocks_of_tokens_and_padding_add_up(t, e):
  _assert_conforms(t, _config(e, 2), masked=True)


@pytest.mark.any_jax
def test_without_a_bias():
  x, config = cases.logits("ties", 30, 16), _config(16, 3)
  ours, xla = (f(x, None, config) for f in (_interpreted, _xla))
  np.testing.assert_array_equal(ours.expert_idx, xla.expert_idx)


@pytest.mark.any_jax
def test_a_nan_bias_selects_nothing():
  x, config = cases.logits("random", 30, 16), _config(16, 3)
  bias = conformance.bias(16)
  bias[[2, 5]] = np.nan
  ours, xla = (f(x, bias, config) for f in (_interpreted, _xla))
  np.testing.assert_array_equal(ours.expert_idx, xla.expert_idx)
  np.testing.assert_array_equal(ours.load[jnp.array([2, 5])], 0)


@pytest.mark.any_jax
@pytest.mark.parametrize(
  ("score_fn", "space"),
  (
    ("sigmoid", "scores"),
    ("softmax", "logits"),
    ("sqrtsoftplus", "scores"),
    # Which scores there are, and where the bias goes, are two steps.
    pytest.param("sigmoid", "logits", marks=pytest.mark.long),
    pytest.param("softmax", "scores", marks=pytest.mark.long),
    pytest.param("sqrtsoftplus", "logits", marks=pytest.mark.long),
  ),
)
def test_infinite_logits_and_biases(score_fn, space):
  x, bias = cases.logits("random", 30, 16), conformance.bias(16)
  x[::3, 4], x[::2, 7], bias[4], bias[9] = np.inf, -np.inf, -np.inf, np.inf
  config = _config(16, 3, score_fn=score_fn, bias_space=space)
  ours, xla = (f(x, bias, config) for f in (_interpreted, _xla))
  np.testing.assert_array_equal(ours.expert_idx, xla.expert_idx)
  np.testing.assert_array_equal(ours.load, xla.load)
  np.testing.assert_allclose(ours.weights, xla.weights, rtol=1e-6)


@pytest.mark.any_jax
def test_the_inverse_of_older_generations(monkeypatch):
  # The interpreter rounds an approximate inverse to bfloat16: one Newton step
  # from there leaves 2^-16.
  monkeypatch.setattr(call, "_divides_in_software", lambda interpret: True)
  config, x = _config(24, 3), cases.logits("nan", 40, 24)
  x[0, :4] = np.inf, -np.inf, 200.0, -200.0
  actual = _interpreted(x, None, config)
  expected = _xla(x, None, config)
  np.testing.assert_allclose(
    actual.weights, expected.weights, rtol=1e-4, atol=1e-30
  )
  np.testing.assert_array_equal(actual.token_mask, expected.token_mask)


@pytest.mark.any_jax
def test_bfloat16_logits_are_compared_in_float32():
  x = jnp.asarray(cases.logits("random", 30, 16), jnp.bfloat16)
  a = _interpreted(x, conformance.bias(16), _config(16, 3))
  b = _interpreted(x.astype(jnp.float32), conformance.bias(16), _config(16, 3))
  jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize(
  "name", conformance.rows(["deepseek_v3", "olmoe"], long=["olmoe"])
)
def test_the_simulator_finds_no_race_and_no_uninitialised_read(name):
  config = dataclasses.replace(cases.family(name), histogram=True)
  bias = conformance.bias(64)
  simulator = pltpu.InterpretParams(
    detect_races=True, uninitialized_memory="nan"
  )
  for kind in cases.KINDS:
    x = cases.logits(kind, 140, 64)
    actual = jaxroute.route(
      jnp.asarray(x),
      jnp.asarray(bias),
      config,
      implementation="pallas_tpu",
      interpret=simulator,
    )
    expected = _xla(x, bias, config)
    assert not interpret_pallas_call.races.races_found
    np.testing.assert_array_equal(actual.expert_idx, expected.expert_idx)
    np.testing.assert_array_equal(actual.load, expected.load)
    if name == "deepseek_v3":  # Its scores are the same bits in both.
      np.testing.assert_array_equal(
        actual.counts.histogram, expected.counts.histogram
      )


@pytest.mark.parametrize(
  "name",
  conformance.rows(
    ["deepseek_v3", "olmoe", "mixtral", "soft_cap"], ["olmoe"], ["mixtral"]
  ),
)
def test_gradients_are_those_of_xla(name):
  config, bias = cases.family(name), conformance.bias(64)
  x, mask = cases.logits("random", 23, 64), np.arange(23) < 20
  x[20:] = np.nan
  out = cases.logits("random", 23, 8, seed=2)

  def grad(route, jit):
    def loss(x, bias):
      return jnp.sum(out * route(x, bias, config, mask).weights)

    return jit(jax.grad(loss, argnums=(0, 1)))(x, bias)

  ours, ours_bias = grad(_route, conformance.jit_interpreted)
  expected, _ = grad(_xla, jax.jit)
  np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)
  np.testing.assert_array_equal(ours_bias, 0)


@pytest.mark.any_jax
def test_rematerialisation_changes_nothing():
  config, x = _config(16, 3), cases.logits("ties", 16, 16)

  def loss(x):
    r = _route(x, conformance.bias(16), config)
    return jnp.sum(r.weights**2), r

  jit = conformance.jit_interpreted
  grad = jit(jax.grad(loss, has_aux=True))
  remat = jit(jax.grad(jax.checkpoint(loss), has_aux=True))
  (a, r), (b, s) = grad(x), remat(x)
  jax.tree.map(np.testing.assert_array_equal, r, s)
  np.testing.assert_array_equal(a, b)


def test_vmap_is_a_loop():
  config, x = _config(16, 3), cases.logits("ties", 24, 16).reshape(3, 8, 16)
  batched = conformance.jit_interpreted(
    jax.vmap(lambda x: _route(x, None, config))
  )(x)
  for i in range(3):
    one = _interpreted(x[i], None, config)
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_array_equal(a[i], b), batched, one
    )


def test_explicit_sharding_changes_nothing():
  config = cases.family("deepseek_v3")
  mesh = jax.make_mesh((8,), ("data",))
  x, mask = cases.logits("ties", 64, 64), np.arange(64) % 5 > 0
  expected = _xla(x, conformance.bias(64), config, mask)
  tokens = jax.NamedSharding(mesh, jax.P("data"))
  with jax.set_mesh(mesh):
    actual = _interpreted(
      *(jax.device_put(x, tokens), conformance.bias(64)),
      *(config, jax.device_put(mask, tokens)),
    )
  np.testing.assert_array_equal(actual.expert_idx, expected.expert_idx)
  np.testing.assert_array_equal(actual.load, expected.load)
  assert jax.typeof(actual.expert_idx).sharding.spec == jax.P("data", None)
  assert actual.load.is_fully_replicated


def _trace(config=None, implementation=None):
  """What `route` traces to, as text."""
  config = config or _config(16, 3)
  sharding = None
  mesh = jax.sharding.get_abstract_mesh()
  if AxisType.Explicit in mesh.axis_types:
    sharding = jax.NamedSharding(mesh, jax.P("data"))
  shape = 16, config.num_experts
  x = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

  # A function of its own, so that nothing is cached.
  def call(x):
    return jaxroute.route(x, None, config, implementation=implementation)

  return str(jax.make_jaxpr(call)(x))


def _takes_kernel(config=None, implementation=None):
  return "jaxroute_route" in _trace(config, implementation)


@pytest.mark.parametrize(
  ("size", "axis_type", "kind", "takes"),
  (
    (1, AxisType.Auto, "TPU v6 lite", True),
    (1, AxisType.Explicit, "TPU v5 lite", True),
    (8, AxisType.Manual, "TPU v6 lite", True),
    (8, AxisType.Explicit, "TPU v6 lite", True),
    (8, AxisType.Auto, "TPU v6 lite", False),
    (1, AxisType.Auto, "TPU v4", False),
  ),
)
def test_none_takes_it_on_new_tpus_and_what_it_can_map(
  size, axis_type, kind, takes
):
  with jax.sharding.use_abstract_mesh(tpu_mesh.abstract(size, axis_type, kind)):
    assert _takes_kernel() == takes
    is_mapped = axis_type == AxisType.Explicit
    assert ("shard_map" in _trace()) == is_mapped
    assert not _takes_kernel(implementation="xla")
    # What it cannot do is left to XLA.
    assert not _takes_kernel(_config(12, 3, num_groups=3, group_top_k=2))


def test_none_takes_it_without_a_mesh_on_one_tpu_only(monkeypatch):
  assert not _takes_kernel()  # A CPU.
  monkeypatch.setattr(device, "generation", lambda: 6)
  assert not _takes_kernel()  # Of eight devices, none says which it is for.
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  assert _takes_kernel()
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  with jax.set_mesh(mesh):
    assert not _takes_kernel()
  sharded = jax.shard_map(
    lambda x: jaxroute.route(x, None, _config(16, 3)).expert_idx,
    mesh=mesh,
    in_specs=jax.P("data"),
    out_specs=jax.P("data"),
  )
  x = jax.ShapeDtypeStruct((16, 16), jnp.float32)
  assert "jaxroute_route" in str(jax.make_jaxpr(sharded)(x))


def test_asked_for_by_name_it_is_traced_anywhere_and_refused_by_a_cpu():
  assert _takes_kernel(implementation="pallas_tpu")
  route = jax.jit(
    lambda x: jaxroute.route(
      x, None, _config(16, 3), implementation="pallas_tpu"
    )
  )
  with pytest.raises(NotImplementedError) as error:
    route(jnp.zeros((16, 16)))
  for words in (
    "the TPU kernel of `route`",
    "another platform",
    "interpret=True",
  ):
    assert words in str(error.value)


@pytest.mark.parametrize(
  ("fields", "words"),
  (
    (dict(num_experts=64, top_k=17), ("top_k", "17", "'xla'")),
    (dict(num_experts=2048), ("num_experts", "2048", "'xla'")),
    (dict(num_experts=96, num_groups=3, group_top_k=2), ("groups", "3")),
    (dict(num_experts=36, num_groups=4, group_top_k=2), ("groups", "36")),
  ),
)
def test_what_it_cannot_do_is_named(fields, words):
  config = _config(**fields)
  x = jnp.zeros((2, config.num_experts))
  with pytest.raises(NotImplementedError) as error:
    jaxroute.route(x, None, config, implementation="pallas_tpu")
  for word in words:
    assert word in str(error.value)
  other = jax.jit(jaxroute.route, static_argnames="config")
  assert other(x, None, config).load.sum() == 2 * config.top_k


@pytest.mark.any_jax
@pytest.mark.parametrize(
  ("score_fn", "norm_eps"),
  (
    ("sigmoid", None),
    ("sigmoid", 1e-20),
    ("softmax", 0.0),
    ("sqrtsoftplus", None),
    # What is added to the sum does not depend on what is summed.
    *(
      pytest.param(*pair, marks=pytest.mark.long)
      for pair in (
        ("sigmoid", 0.0),
        ("softmax", None),
        ("softmax", 1e-20),
        ("sqrtsoftplus", 0.0),
        ("sqrtsoftplus", 1e-20),
      )
    ),
  ),
)
def test_weights_of_logits_of_every_size(score_fn, norm_eps):
  config = _config(
    num_experts=8,
    top_k=3,
    score_fn=score_fn,
    normalize_weights=norm_eps is not None,
    norm_eps=norm_eps or 0.0,
  )
  # The bias makes three experts the best, however improbable.
  bias = np.float32([0, 0, 9, 0, 9, 9, 0, 0])

  def weigh(x):
    routing = _route(x, bias, config)
    return routing.weights, routing.expert_idx

  # The gradient is taken from log scores, which are rounded.
  conformance.assert_weights_are_exact(
    weigh,
    cases.extreme_logits(8),
    config,
    jit=conformance.jit_interpreted,
    rtol=2e-5,
  )
