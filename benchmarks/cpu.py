# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Time on the CPU, as ratios to the plain JAX code that does the same.

Everything runs in one process, the candidates of a table in turn, so that a
busy machine slows all of them. Only the ratios mean anything.

  python benchmarks/cpu.py --section=routing
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import plain
import timing
from absl import app, flags

import jaxroute
from jaxroute import dispatch, experts, layer

_SECTION = flags.DEFINE_enum(
  "section",
  "all",
  ("routing", "histogram", "matmul", "layer", "all"),
  "Which table to print.",
)
_REPEATS = flags.DEFINE_integer("repeats", 40, "Timed calls per candidate.")


def our_route(logits, expert_bias, config):
  """The same five arrays, from this package."""
  routing = jaxroute.route(logits, expert_bias, config)
  order = dispatch.sort_by_expert(routing.expert_idx, config.num_experts)
  return (
    routing.expert_idx,
    routing.weights,
    routing.load,
    order.permutation,
    order.inverse_permutation,
  )


def routing_section(repeats: int) -> None:
  """Routing and expert order of 8,192 tokens against the plain graph."""
  cases = {
    "DeepSeek-V3, top-8 of 256 in 4 of 8 groups": jaxroute.RouterConfig(
      num_experts=256,
      top_k=8,
      num_groups=8,
      group_top_k=4,
      scaling_factor=2.5,
    ),
    "softmax, top-6 of 64": jaxroute.RouterConfig(
      num_experts=64, top_k=6, score_fn="softmax"
    ),
  }
  rng = np.random.default_rng(0)
  for title, config in cases.items():
    e = config.num_experts
    logits = jnp.asarray(rng.normal(size=(8192, e)), jnp.float32)
    bias = jnp.asarray(rng.normal(size=e) * 0.01, jnp.float32)
    theirs = jax.jit(plain.route, static_argnums=2)
    ours = jax.jit(our_route, static_argnums=2)
    check_same_routes(theirs(logits, bias, config), ours(logits, bias, config))
    calls = {
      "plain": lambda f=theirs, a=(logits, bias, config): f(*a),
      "jaxroute": lambda f=ours, a=(logits, bias, config): f(*a),
    }
    medians = timing.interleaved_medians(calls, repeats)
    timing.print_table(f"Routing, T=8192, {title}", medians, "plain")


def histogram_section(repeats: int) -> None:
  """What `dual.quantile` adds to the routing of 8,192 tokens."""
  for title, config in {
    "sigmoid": jaxroute.RouterConfig(num_experts=256, top_k=8),
    "softmax": jaxroute.RouterConfig(
      num_experts=256, top_k=8, score_fn="softmax"
    ),
  }.items():
    counted = dataclasses.replace(config, histogram=True)
    logits = 16 * normal(0, 8192, config.num_experts)
    rule = jaxroute.dual.quantile()
    state = jaxroute.init_router_state(rule, config.num_experts, histogram=True)
    route = jax.jit(jaxroute.route, static_argnums=2)

    @jax.jit
    def balance(logits, state, rule=rule, config=counted):
      routing = jaxroute.route(logits, state.expert_bias[0], config)
      state = jaxroute.accumulate(state, routing)
      return routing, jaxroute.update(state, rule)

    bias = state.expert_bias[0]
    calls = {
      "route": lambda f=route, a=(logits, bias, config): f(*a),
      "route, histogram": lambda f=route, a=(logits, bias, counted): f(*a),
      "route, histogram, dual.quantile": lambda f=balance, a=(logits, state): f(
        *a
      ),
    }
    medians = timing.interleaved_medians(calls, repeats)
    timing.print_table(
      f"Histograms, T=8192, E=256, K=8, {title}", medians, "route"
    )


def check_same_routes(expected, actual) -> None:
  """Raises unless ids, load and order are equal and the weights close."""
  for name, a, b in zip(
    ("expert_idx", "weights", "load", "permutation", "inverse_permutation"),
    expected,
    actual,
    strict=True,
  ):
    a, b = np.asarray(a), np.asarray(b)
    tolerance = 1e-6 if name == "weights" else 0
    np.testing.assert_allclose(b, a, rtol=tolerance, err_msg=name)


def skewed_group_sizes(n: int, num_experts: int) -> jax.Array:
  """[E] int32 in sum N, the largest some three times the smallest."""
  rng = np.random.default_rng(0)
  share = np.exp(rng.uniform(-0.5, 0.5, size=num_experts))
  sizes = rng.multinomial(n, share / share.sum())
  return jnp.asarray(sizes, jnp.int32)


def normal(seed: int, *shape: int) -> jax.Array:
  """Random float32 of variance 1 / 256, small enough for any product here."""
  return jax.random.normal(jax.random.key(seed), shape) / 16


def matmul_section(repeats: int) -> None:
  """A grouped product of 16,384 rows against one dense product of them all."""
  n, d, f, e = 16384, 256, 512, 32
  lhs, rhs, sizes = (
    normal(0, n, d),
    normal(1, e, d, f),
    skewed_group_sizes(n, e),
  )
  d_out = normal(2, n, f)

  def dense(lhs, rhs, sizes):
    del sizes
    return lhs @ rhs[0]

  functions = {
    "dense": dense,
    "jaxroute": experts.grouped_matmul,
    "ragged_dot": jax.lax.ragged_dot,
  }

  def with_gradients(f, lhs, rhs, sizes, d_out):
    out, pull = jax.vjp(lambda lhs, rhs: f(lhs, rhs, sizes), lhs, rhs)
    return out, pull(d_out)

  forward, both = {}, {}
  for name, function in functions.items():
    first = rhs[:1] if name == "dense" else rhs
    call = jax.jit(function)
    forward[name] = lambda f=call, w=first: f(lhs, w, sizes)
    call = jax.jit(functools.partial(with_gradients, function))
    # Every row by every expert, each way: once is enough to see.
    if name != "ragged_dot":
      both[name] = lambda f=call, w=first: f(lhs, w, sizes, d_out)
  title = f"Grouped matmul, N={n}, D={d}, F={f}, E={e}, skewed groups"
  timing.print_table(
    title, timing.interleaved_medians(forward, repeats), "dense"
  )
  timing.print_table(
    f"{title}, with gradients",
    timing.interleaved_medians(both, repeats),
    "dense",
  )


def sparse_layer(x, router_weight, params, config):
  """A sparse SwiGLU layer on `[T, D]`, its router included."""
  routing = jaxroute.route(x @ router_weight, None, config)
  return layer.local_moe(x, routing, params)[0]


def dense_pair(x, w_in, hidden, w_out):
  """Two dense products with the FLOPs of the layer's experts, nothing else.

  The second does not wait for the first, nor is anything between them.
  """
  return x @ w_in, hidden @ w_out


def layer_section(repeats: int) -> None:
  """A whole layer against the two dense products that its experts cost."""
  t, d, f, e, k = 4096, 256, 512, 32, 4
  n = t * k
  config = jaxroute.RouterConfig(num_experts=e, top_k=k)
  params = experts.init_expert_params(jax.random.key(0), e, d, f)
  inputs = {
    "dense pair": (
      normal(1, n, d),
      normal(2, d, 2 * f),
      normal(3, n, f),
      normal(4, f, d),
    ),
    "jaxroute": (16 * normal(5, t, d), normal(6, d, e), params),
  }
  functions = {
    "dense pair": dense_pair,
    "jaxroute": functools.partial(sparse_layer, config=config),
  }

  def with_gradients(f, d_out, *args):
    out, pull = jax.vjp(f, *args)
    return out, pull(d_out)

  forward, both = {}, {}
  for name, function in functions.items():
    args = inputs[name]
    call = jax.jit(function)
    forward[name] = lambda f=call, a=args: f(*a)
    d_out = jax.tree.map(jnp.ones_like, call(*args))
    call = jax.jit(functools.partial(with_gradients, function))
    both[name] = lambda f=call, a=args, g=d_out: f(g, *a)
  title = f"MoE layer, T={t}, D={d}, F={f}, E={e}, K={k}"
  timing.print_table(
    f"{title}, forward",
    timing.interleaved_medians(forward, repeats),
    "dense pair",
  )
  timing.print_table(
    f"{title}, with gradients",
    timing.interleaved_medians(both, repeats),
    "dense pair",
  )


SECTIONS = {
  "routing": routing_section,
  "histogram": histogram_section,
  "matmul": matmul_section,
  "layer": layer_section,
}


def main(argv: list[str]) -> None:
  del argv
  print(f"jax {jax.__version__}, {jax.devices()[0].platform}")
  for name, section in SECTIONS.items():
    if _SECTION.value in (name, "all"):
      section(_REPEATS.value)


if __name__ == "__main__":
  app.run(main)
