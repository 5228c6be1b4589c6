# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A call of every public function, for tests that hold all of them to something.

A function of `CASES` takes what `arguments` makes, by the names of its
arguments.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxroute
import jaxroute.linen
import jaxroute.nnx
from jaxroute import (
  assignment,
  dispatch,
  dual,
  experts,
  layer,
  losses,
  metrics,
  routing,
)
from jaxroute import scores as scores_lib
from jaxroute.dual import solvers

T, E, K, D, F, LAYERS = 10, 8, 2, 8, 8, 2
CONFIG = jaxroute.RouterConfig(num_experts=E, top_k=K, histogram=True)
GROUPS = jaxroute.RouterConfig(
  num_experts=E,
  top_k=K,
  score_fn="softmax",
  num_groups=4,
  group_top_k=2,
  logit_soft_cap=30.0,
)
RULE = dual.sign(dual.inverse_sqrt(0.01))
SGD = optax.sgd(0.1, momentum=0.9)
LINEN = jaxroute.linen.MoE(CONFIG, hidden_size=F, shared_hidden_size=F)


def arguments(seed, special=False):
  """What the functions of `CASES` take, by the names of their arguments."""
  rng = np.random.default_rng(seed)

  def normal(*shape):
    return rng.normal(size=shape).astype(np.float32)

  logits, scores = normal(T, E), normal(T, E)
  logits[0, 3] = -np.inf
  if special:
    logits[rng.random((T, E)) < 0.1] = rng.choice([0, 100, np.nan, -np.inf])
    scores = np.round(scores)
  expert_idx = np.argsort(rng.random((T, E)))[:, :K].astype(np.int32)
  x = jax.tree.map(
    jnp.asarray,
    dict(
      logits=logits,
      scores=scores,
      expert_bias=normal(E) / 10,
      biases=normal(LAYERS, E) / 10,
      token_mask=rng.random(T) < 0.8,
      expert_idx=expert_idx,
      weights=np.abs(normal(T, K)),
      load=rng.integers(0, 9, (LAYERS, E), np.int32),
      histogram=rng.integers(0, 3, (LAYERS, E, 16), np.int32),
      group_sizes=np.bincount(expert_idx.ravel(), minlength=E).astype(np.int32),
      kernel=normal(D, E),
      tokens=normal(T, D),
      rows=normal(T * K, D),
      matrices=normal(E, D, F),
      gates=experts.ExpertParams(
        w_gate=normal(E, D, F), w_up=normal(E, D, F), w_down=normal(E, F, D)
      ),
      shared=experts.ExpertParams(
        w_gate=normal(D, F), w_up=normal(D, F), w_down=normal(F, D)
      ),
    ),
  )
  routed = {k: v.copy() for k, v in vars(x["gates"]).items()}
  shared = {
    k.replace("w_", "shared_"): v.copy() for k, v in vars(x["shared"]).items()
  }
  x["params"] = routed | shared | {"router": {"kernel": x["kernel"].copy()}}
  return x


def _with_gradients(function):
  """A function's value, and the gradients of its square to its first two arguments."""

  @functools.wraps(function)
  def both(*args):
    def loss(*args):
      out = function(*args)
      return jnp.sum(out.astype(jnp.float32) ** 2), out

    (_, out), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(*args)
    return out, grads

  return both


def _updates(rule):
  """A function that takes two steps of a rule, from its initial state."""

  def steps(biases, load, histogram):
    state = jaxroute.init_router_state(rule, E, LAYERS, histogram=True)
    for _ in range(2):
      state = jaxroute.RouterState(
        expert_bias=state.expert_bias + biases,
        counts=jaxroute.Counts(load=load, histogram=histogram),
        rule_state=state.rule_state,
      )
      state = jaxroute.update(state, rule)
    return state

  return steps


def _solve(solver):
  return lambda scores, token_mask: dual.solve(
    scores, K, solver, token_mask=token_mask, max_iterations=2
  )


def _loss_fn(params, expert_bias, batch):
  (y, _), counted = LINEN.apply(
    {"params": params, "expert_bias": expert_bias},
    batch,
    mutable=jaxroute.linen.COUNTED,
  )
  # The small factor keeps gradients within float16.
  loss = 1e-4 * jnp.mean(y.astype(jnp.float32) ** 2)
  return loss, (jaxroute.linen.counts(counted), {"twice": 2 * loss})


def _train_state(params, expert_bias):
  collections = {
    "expert_bias": {"router": {"expert_bias": expert_bias}},
    "load": {"router": {"load": jnp.zeros(E, jnp.int32)}},
    "histogram": {"router": {"histogram": jnp.zeros((E, 16), jnp.int32)}},
  }
  router = jaxroute.linen.init_router_state(collections, RULE)
  return jaxroute.init_train_state(params, router, SGD)


def _train_step(params, expert_bias, tokens):
  state = _train_state(params, expert_bias)
  kwargs = dict(loss_fn=_loss_fn, optimizer=SGD, rule=RULE, micro_batches=2)
  return jaxroute.train_step(state, tokens, **kwargs)


def _nnx_model(kernel, gates):
  model = jaxroute.nnx.MoE(
    CONFIG, in_features=D, hidden_size=F, rngs=nnx.Rngs(0)
  )
  model.router.kernel[...] = kernel
  for name, w in vars(gates).items():
    getattr(model, name)[...] = w.astype(jnp.float32)
  return model


def _nnx_step(kernel, gates, tokens):
  model = _nnx_model(kernel, gates)
  state = jaxroute.nnx.init_rule_state(model, RULE)
  y, out = model(tokens)
  state = jaxroute.nnx.update(model, RULE, state)
  return y, out, jaxroute.nnx.router_state(model, state)


def _nnx_train_step(kernel, gates, tokens):
  def loss_fn(model, tokens):
    return jnp.mean(jnp.square(model(tokens)[0].astype(jnp.float32))), {}

  model = _nnx_model(kernel, gates)
  optimizer = nnx.Optimizer(model, SGD, wrt=nnx.Param)
  state = jaxroute.nnx.init_rule_state(model, RULE)
  kwargs = dict(loss_fn=loss_fn, rule=RULE, micro_batches=2)
  return jaxroute.nnx.train_step(model, optimizer, state, tokens, **kwargs)


def _terms(logits, config):
  logits = scores_lib.prepare_logits(logits, config)
  return scores_lib.terms(logits, config.score_fn)


def _layer(tokens, kernel, expert_bias, gates, shared, token_mask):
  routes, logits = layer.router(tokens, kernel, expert_bias, CONFIG, token_mask)
  out = layer.moe(
    tokens, routes, gates, shared, config=CONFIG, capacity_factor=1.1
  )
  return out, routes, logits


def _matmul(how):
  def product(rows, matrices, group_sizes):
    return experts.grouped_matmul(
      rows, matrices, group_sizes, implementation=how
    )

  return _with_gradients(product)


# The public functions of a line, and what it is about, to a call.
CASES = {
  "jaxroute.route": lambda logits, expert_bias, token_mask: jaxroute.route(
    logits, expert_bias, CONFIG, token_mask
  ),
  "jaxroute.route (groups)": lambda logits, expert_bias: jaxroute.route(
    logits, expert_bias, GROUPS
  ),
  "jaxroute.route (gradient)": _with_gradients(
    lambda logits, expert_bias: (
      jaxroute.route(logits, expert_bias, CONFIG).weights
    )
  ),
  "jaxroute.route (kernel)": _with_gradients(
    lambda logits, expert_bias: (
      jaxroute.route(
        logits, expert_bias, CONFIG, None, "pallas_tpu", interpret=True
      ).weights
    )
  ),
  "routing.project": lambda tokens, kernel: routing.project(tokens, kernel),
  "routing.project_and_route": lambda tokens, kernel, expert_bias: (
    routing.project_and_route(tokens, kernel, expert_bias, CONFIG)
  ),
  "scores.scores + scores.prepare_logits + scores.apply_score_fn": (
    lambda logits: scores_lib.scores(logits, GROUPS)
  ),
  "scores.weights + scores.terms + scores.softmax_terms": lambda logits: (
    scores_lib.weights(_terms(logits, GROUPS), GROUPS),
    scores_lib.weights(_terms(logits, CONFIG), CONFIG),
  ),
  "scores.selection_scores": lambda logits, expert_bias: (
    scores_lib.selection_scores(logits, expert_bias, CONFIG)
  ),
  "jaxroute.accumulate + jaxroute.init_router_state": (
    lambda logits, expert_bias: jaxroute.accumulate(
      jaxroute.init_router_state(RULE, E, 1, histogram=True),
      jaxroute.route(logits, expert_bias, CONFIG),
    )
  ),
  "jaxroute.update (several rules)": _updates(
    optax.chain(dual.quantile(0.5), optax.trace(0.9), optax.scale(0.1))
  ),
  "jaxroute.train_step + jaxroute.init_train_state": _train_step,
  "jaxroute.eval_step + linen.init_router_state + linen.counts": (
    lambda params, expert_bias, tokens: jaxroute.eval_step(
      _train_state(params, expert_bias), tokens, loss_fn=_loss_fn
    )
  ),
  "nnx.update + nnx.init_rule_state + nnx.router_state": _nnx_step,
  "nnx.train_step": _nnx_train_step,
  "assignment.dual_value + assignment.dual_value_of_choice": (
    lambda scores, expert_bias, token_mask: assignment.dual_value(
      scores, expert_bias, K, token_mask
    )
  ),
  "assignment.duality_gap": lambda scores, expert_bias, token_mask: (
    assignment.duality_gap(scores, expert_bias, K, token_mask)
  ),
  "assignment.round_to_balanced": lambda scores, expert_bias: (
    assignment.round_to_balanced(scores, expert_bias, K)
  ),
  "assignment.primal_value": lambda scores, expert_idx, token_mask: (
    assignment.primal_value(scores, expert_idx, token_mask)
  ),
  "assignment.complementary_slackness": lambda biases, load: (
    assignment.complementary_slackness(biases, load)
  ),
  "dispatch.sort_by_expert": lambda expert_idx, token_mask: (
    dispatch.sort_by_expert(expert_idx, E, token_mask, 2)
  ),
  "dispatch.sort_by_expert (kernel)": lambda expert_idx, token_mask: (
    dispatch.sort_by_expert(expert_idx, E, token_mask, 2, "pallas_tpu", True)
  ),
  "dispatch.dispatch": lambda tokens, expert_idx: dispatch.dispatch(
    tokens, dispatch.sort_by_expert(expert_idx, E)
  ),
  "dispatch.combine": _with_gradients(
    lambda rows, weights, expert_idx: dispatch.combine(
      rows, weights, dispatch.sort_by_expert(expert_idx, E)
    )
  ),
  "dual.sign": _updates(dual.sign(0.01)),
  "dual.inverse_sqrt": _updates(dual.sign(dual.inverse_sqrt(0.01))),
  "dual.inverse + dual.proportional": _updates(
    dual.proportional(dual.inverse(0.01))
  ),
  "dual.center": _updates(optax.chain(dual.sign(0.01), dual.center())),
  "dual.smebu": _updates(dual.smebu()),
  "dual.pid": _updates(dual.pid(0.1, 0.1, 0.1)),
  "dual.triple_momentum": _updates(dual.triple_momentum(0.1, 10.0)),
  "dual.quantile": _updates(dual.quantile()),
  "dual.quantile_bias": lambda scores, expert_bias, token_mask: (
    dual.quantile_bias(scores, expert_bias, K, token_mask)
  ),
  "dual.solve + solvers.bundle": _solve(solvers.bundle(4)),
  "solvers.alternating_quantiles": _solve(solvers.alternating_quantiles()),
  "solvers.bip": _solve(solvers.bip()),
  "solvers.subgradient": _solve(solvers.subgradient(dual.sign(0.1))),
  "solvers.sinkhorn": _solve(solvers.sinkhorn(0.5)),
  "solvers.sparse_transport": _solve(
    solvers.sparse_transport(dual.proportional(0.1), 1.0)
  ),
  "experts.init_expert_params": lambda: experts.init_expert_params(
    jax.random.key(0, impl="threefry2x32"), E, D, F
  ),
  "experts.grouped_matmul (ragged_dot)": _matmul("ragged_dot"),
  "experts.grouped_matmul (tiled)": _matmul("tiled"),
  "experts.grouped_matmul (batched)": _matmul("batched"),
  "experts.swiglu": _with_gradients(
    lambda rows, gates, group_sizes: experts.swiglu(rows, gates, group_sizes)
  ),
  "experts.dense_swiglu": _with_gradients(
    lambda rows, shared: experts.dense_swiglu(rows, shared)
  ),
  "layer.router + layer.moe + layer.local_moe": _layer,
  "losses.switch": lambda logits, expert_bias: losses.switch(
    logits, jaxroute.route(logits, expert_bias, CONFIG), CONFIG
  ),
  "losses.global_batch": lambda logits, load, token_mask: losses.global_batch(
    logits, load[0], CONFIG, token_mask
  ),
  "losses.sequence_wise": lambda logits, token_mask: losses.sequence_wise(
    logits, CONFIG, 2, token_mask
  ),
  "losses.z_loss": lambda logits, token_mask: losses.z_loss(logits, token_mask),
  "metrics.violation + metrics.mean_load + metrics.total": lambda load: (
    metrics.violation(load),
    metrics.mean_load(load),
    metrics.total(load),
  ),
  "metrics.drop_fraction": lambda load: metrics.drop_fraction(load, load // 2),
  "metrics.bias_spread": lambda biases: metrics.bias_spread(biases),
  "metrics.summary + jaxroute.max_vio + metrics.coefficient_of_variation + "
  "metrics.load_entropy + metrics.dead_experts": lambda load, biases: (
    metrics.summary(load, biases)
  ),
}
