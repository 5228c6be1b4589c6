# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""One table of public functions and small arguments of theirs, for tests."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxroute
import jaxroute.linen
import jaxroute.nnx
from jaxroute import dispatch, dual, experts, layer, losses, metrics

T, E, K, D, F = 6, 4, 2, 4, 3
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K, histogram=True)
RULE = dual.sign(0.1)


# Of no two are the arrays compared; each is itself.
@dataclasses.dataclass(frozen=True, eq=False)
class Function:
  """A public function.

  Attributes:
    call: of arrays.
    args: its arguments; the first `tokens` of them have T tokens in front.
    tokens: see there.
    smooth: the part of the result that has a derivative; None if none has.
    twice: whether it has forward-mode and second derivatives.
  """

  call: Callable[..., Any]
  args: tuple[Any, ...]
  tokens: int = 1
  smooth: Callable[[Any], Any] | None = lambda out: out
  twice: bool = True


def _normal(seed, *shape):
  rng = np.random.default_rng(seed)
  return jnp.asarray(rng.normal(size=shape), jnp.float32)


# No token is near a tie: a derivative there is one of two.
X, LOGITS, KERNEL = _normal(113, T, D), _normal(1, T, E), _normal(2, D, E)
ROWS, BIAS = _normal(3, T, K, D), _normal(4, E) * 0.1
WEIGHTS = jax.nn.softmax(_normal(5, T, K))
PARAMS = experts.ExpertParams(
  w_gate=_normal(6, E, D, F),
  w_up=_normal(7, E, D, F),
  w_down=_normal(8, E, F, D),
)
CHOSEN = jnp.argsort(_normal(9, T, E), axis=1)[:, :K].astype(jnp.int32)
SIZES = jnp.asarray([2, 0, 1, 2], jnp.int32)


def _moe(implementation=None, **options):
  def moe(x, kernel, params):
    routing, _ = layer.router(x, kernel, BIAS, CONFIG)
    return layer.moe(
      x,
      routing,
      params,
      config=CONFIG,
      experts_implementation=implementation,
      **options,
    )

  return moe


def _losses(logits):
  routing = jaxroute.route(logits, None, CONFIG)
  return (
    losses.switch(logits, routing, CONFIG),
    losses.sequence_wise(logits, CONFIG, 1),
    losses.z_loss(logits),
  )


def _metrics(logits):
  load = jaxroute.route(logits, None, CONFIG).load
  return (
    metrics.max_vio(load),
    metrics.violation(load),
    metrics.load_entropy(load),
  )


LINEN = jaxroute.linen.MoE(CONFIG, hidden_size=F)
LINEN_VARIABLES = LINEN.init(jax.random.key(0), X)


def _linen(x, params):
  variables = LINEN_VARIABLES | {"params": params}
  (out, _), counted = LINEN.apply(variables, x, mutable=jaxroute.linen.COUNTED)
  return out, counted


NNX_GRAPH, NNX_PARAMS, NNX_REST = nnx.split(
  jaxroute.nnx.MoE(CONFIG, in_features=D, hidden_size=F, rngs=nnx.Rngs(0)),
  nnx.Param,
  ...,
)


def _nnx(x, params):
  model = nnx.merge(NNX_GRAPH, nnx.as_pure(params), nnx.as_pure(NNX_REST))
  out, _ = model(x)
  return out, model.router.load[...]


def _update(state):
  routing = jaxroute.route(LOGITS, state.expert_bias[0], CONFIG)
  return jaxroute.update(jaxroute.accumulate(state, routing), RULE)


def _train_step(state):
  def loss_fn(params, bias, x):
    out, _ = _moe()(x, *params)
    routing, _ = layer.router(x, params[0], bias[0], CONFIG)
    counts = jax.tree.map(lambda c: c[None], routing.counts)
    return jnp.mean(out**2), (counts, {})

  tx = optax.sgd(0.1)
  return jaxroute.train_step(
    state, X, loss_fn=loss_fn, optimizer=tx, rule=RULE, micro_batches=2
  )[0]


ROUTER_STATE = jaxroute.init_router_state(RULE, E, 1, histogram=True)
TRAIN_STATE = jaxroute.init_train_state(
  (KERNEL, PARAMS), ROUTER_STATE, optax.sgd(0.1)
)


def _sort(expert_idx):
  return dispatch.sort_by_expert(expert_idx, E)


def _first(out):
  return out[0]


FUNCTIONS = {
  "route": Function(
    lambda logits: jaxroute.route(logits, BIAS, CONFIG),
    (LOGITS,),
    smooth=lambda routing: routing.weights,
  ),
  "sort_by_expert": Function(_sort, (CHOSEN,), smooth=None),
  "dispatch": Function(
    lambda x, chosen: dispatch.dispatch(x, _sort(chosen)), (X, CHOSEN), 2
  ),
  "combine": Function(
    lambda rows, weights, chosen: dispatch.combine(
      rows.reshape(-1, D), weights, _sort(chosen)
    ),
    (ROWS, WEIGHTS, CHOSEN),
    3,
  ),
  "grouped_matmul": Function(
    lambda lhs, rhs: experts.grouped_matmul(lhs, rhs, SIZES),
    (X, PARAMS.w_up),
    twice=False,
  ),
  "grouped_matmul ragged_dot": Function(
    lambda lhs, rhs: experts.grouped_matmul(
      lhs, rhs, SIZES, implementation="ragged_dot"
    ),
    (X, PARAMS.w_up),
  ),
  "swiglu": Function(
    lambda x, params: experts.swiglu(x, params, SIZES), (X, PARAMS), twice=False
  ),
  "layer.router": Function(
    lambda x, kernel: layer.router(x, kernel, BIAS, CONFIG),
    (X, KERNEL),
    smooth=lambda out: (out[0].weights, out[1]),
  ),
  "layer.moe": Function(
    _moe(), (X, KERNEL, PARAMS), smooth=_first, twice=False
  ),
  "layer.moe batched": Function(
    _moe("batched", capacity_factor=1.0),
    (X, KERNEL, PARAMS),
    smooth=_first,
    twice=False,
  ),
  "layer.moe ragged_dot": Function(
    _moe("ragged_dot"), (X, KERNEL, PARAMS), smooth=_first
  ),
  "linen.MoE": Function(
    _linen, (X, LINEN_VARIABLES["params"]), smooth=_first, twice=False
  ),
  "nnx.MoE": Function(
    _nnx, (X, nnx.to_pure_dict(NNX_PARAMS)), smooth=_first, twice=False
  ),
  "losses": Function(_losses, (LOGITS,)),
  "metrics": Function(_metrics, (LOGITS,), smooth=None),
  "update": Function(_update, (ROUTER_STATE,), 0, smooth=None),
  "train_step": Function(_train_step, (TRAIN_STATE,), 0, smooth=None),
  "dual.solve": Function(
    lambda scores: dual.solve(scores, K).expert_bias, (LOGITS,), smooth=None
  ),
}
