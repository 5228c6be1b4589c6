# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""With frozen parameters the bias takes one way, however a step is carried out.

A table of sixteen runs, in which every two settings of different columns meet.
All logits are sums of few bits, which no order of summation rounds.
"""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen as nn
from jax.sharding import AxisType
from ragged import emulated_ragged  # noqa: F401

import jaxroute
from jaxroute import dual, linen

LAYERS, STEPS, B, S, D, F, E = 2, 4, 32, 2, 16, 8, 8
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=2)
RULE = dual.sign(2.0**-7)
AXES = ("data", "expert")
MESHES = {1: (1, 1), 2: (1, 2), 4: (2, 2), 8: (4, 2)}
# How tokens get to the experts of other devices.
EXCHANGES = (None, "all_gather", "equal", "ragged")
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Devices, exchange, micro-batches, padding, rematerialisation, kind of axes.
RUNS = [
  (1, None, 1, False, False, AUTO),
  (1, "all_gather", 2, False, True, EXPLICIT),
  (1, "equal", 4, True, True, EXPLICIT),
  (1, "ragged", 1, True, False, AUTO),
  (2, None, 2, True, False, EXPLICIT),
  (2, "all_gather", 1, True, True, AUTO),
  (2, "equal", 1, False, True, AUTO),
  (2, "ragged", 4, False, False, EXPLICIT),
  (4, None, 4, False, True, AUTO),
  (4, "all_gather", 1, False, False, EXPLICIT),
  (4, "equal", 1, True, False, EXPLICIT),
  (4, "ragged", 2, True, True, AUTO),
  (8, None, 1, True, True, EXPLICIT),
  (8, "all_gather", 4, True, False, AUTO),
  (8, "equal", 2, False, False, AUTO),
  (8, "ragged", 1, False, True, EXPLICIT),
]


class _Layer(nn.Module):
  """One of the layers, which all see the same tokens."""

  partition: jaxroute.Partition

  @nn.compact
  def __call__(self, total, x, token_mask):
    moe = linen.MoE(CONFIG, hidden_size=F, partition=self.partition, name="moe")
    return total + moe(x, token_mask)[0], None


def _partition(exchange):
  """Where there is no exchange, the devices of "expert" have the same tokens."""
  token_axes = AXES if exchange else AXES[:1]
  return jaxroute.Partition(
    token_axes=token_axes, expert_axis="expert", exchange=exchange
  )


def _model(partition, remat):
  """`LAYERS` layers under a scan: `(0, x, token_mask) -> (sum, None)`."""
  layer = nn.remat(_Layer, policy=jaxroute.save_routing) if remat else _Layer
  return nn.scan(
    layer,
    variable_axes={"params": 0, "expert_bias": 0}
    | dict.fromkeys(linen.COUNTED, 0),
    split_rngs={"params": True},
    in_axes=(nn.broadcast, nn.broadcast),
    length=LAYERS,
  )(partition)


def _of_few_bits(rng, *shape):
  return rng.integers(-64, 65, shape).astype(np.float32) / 64


@functools.cache
def _given():
  """Tokens of all steps `[STEPS, B, S, D]`, and parameters."""
  rng = np.random.default_rng(0)
  # A common offset makes the loads skewed.
  x = _of_few_bits(rng, STEPS, B, S, D) + 0.5
  draw = functools.partial(_of_few_bits, rng, LAYERS)
  params = {"router": {"kernel": draw(D, E)}, "w_gate": draw(E, D, F)}
  params |= {"w_up": draw(E, D, F), "w_down": draw(E, F, D)}
  return x, {"moe": params}


def _padded(x):
  """`[..., S + 1, D]`, padding at another place in every sequence; and its mask."""
  mask = np.arange(S + 1) != np.arange(B)[:, None] % (S + 1)
  padded = np.full((len(x), B, S + 1, D), 9.0, np.float32)
  padded[:, mask] = x.reshape(len(x), B * S, D)
  return padded, mask


def _trajectory(partition, micro_batches, padding, remat):
  """Loads and biases after every step, `[STEPS, LAYERS, E]` each."""
  x, params = _given()
  x, mask = _padded(x) if padding else (x, np.ones((B, S), bool))
  model = _model(partition, remat)
  optimizer = optax.set_to_zero()

  def loss_fn(params, expert_bias, batch):
    x, mask = batch
    variables = {"params": params, "expert_bias": expert_bias}
    (y, _), counted = model.apply(
      variables, jnp.zeros_like(x), x, mask, mutable=linen.COUNTED
    )
    return jnp.mean(y**2), (linen.counts(counted), {})

  bias = {"moe": {"router": {"expert_bias": jnp.zeros((LAYERS, E))}}}
  load = {"moe": {"router": {"load": jnp.zeros((LAYERS, E), jnp.int32)}}}
  router = jaxroute.RouterState(
    expert_bias=bias,
    counts=jaxroute.Counts(load=load),
    rule_state=RULE.init(bias),
  )
  state = jaxroute.init_train_state(params, router, optimizer)

  def step(state, x):
    state, report = jaxroute.train_step(
      state,
      (x, mask),
      loss_fn=loss_fn,
      optimizer=optimizer,
      rule=RULE,
      micro_batches=micro_batches,
    )
    (load,) = jax.tree.leaves(report["load"])
    (bias,) = jax.tree.leaves(state.router.expert_bias)
    return state, (load, bias, report["grad_norm"])

  x = jax.device_put(x, jax.P(None, partition.token_axes))
  loads, biases, norms = jax.jit(lambda x: jax.lax.scan(step, state, x)[1])(x)
  assert np.all(norms > 0)
  return loads, biases


@functools.cache
def _expected():
  """The same, of the loads of the oracle."""
  x, params = _given()
  state = jaxroute.init_router_state(RULE, E, LAYERS)
  loads, biases = [], []
  for batch in x:
    logits = batch.reshape(-1, D) @ params["moe"]["router"]["kernel"]
    load = np.stack(
      [
        oracle.route(z, np.asarray(b), CONFIG)[2]
        for z, b in zip(logits, state.expert_bias, strict=True)
      ]
    )
    counts = jaxroute.Counts(load=jnp.asarray(load, jnp.int32))
    state = jaxroute.update(dataclasses.replace(state, counts=counts), RULE)
    loads.append(load)
    biases.append(state.expert_bias)
  return np.stack(loads), np.stack(biases)


def test_every_two_settings_meet_in_a_run():
  assert len(RUNS) <= 16
  columns = [set(column) for column in zip(*RUNS, strict=True)]
  assert columns[0] == set(MESHES) and columns[1] == set(EXCHANGES)
  for i, j in itertools.combinations(range(len(columns)), 2):
    wanted = set(itertools.product(columns[i], columns[j]))
    assert {(run[i], run[j]) for run in RUNS} == wanted


@pytest.mark.devices(8)
@pytest.mark.usefixtures("emulated_ragged")
@pytest.mark.parametrize(
  "devices, exchange, micro_batches, padding, remat, kind",
  [
    # All exchanges, micro-batches and axes are in the runs of eight devices.
    pytest.param(*run, marks=[pytest.mark.any_jax] if run[0] < 8 else [])
    for run in RUNS
  ],
)
def test_the_bias_takes_one_way(
  devices, exchange, micro_batches, padding, remat, kind
):
  mesh = jax.make_mesh(
    MESHES[devices], AXES, (kind, kind), devices=jax.devices()[:devices]
  )
  with jax.set_mesh(mesh):
    found = _trajectory(_partition(exchange), micro_batches, padding, remat)
  for array, expected in zip(found, _expected(), strict=True):
    np.testing.assert_array_equal(array, expected)
  assert len(np.unique(expected)) > 4
