# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A training step on eight CPU devices, as ratios to the step on one of them.

The devices share the cores of this machine: what is above 1 is what a mesh costs; below
1, smaller arrays stay in caches. All steps are of the same batch.

  python benchmarks/mesh.py
"""

import functools
import os

os.environ["XLA_FLAGS"] = (
  f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
)
os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import jax.numpy as jnp
import optax
import timing
from absl import app, flags

import jaxroute
import jaxroute.linen

_REPEATS = flags.DEFINE_integer("repeats", 20, "Timed steps per candidate.")
_TOKENS = flags.DEFINE_integer("tokens", 16384, "T, of all devices.")
_WIDTH = flags.DEFINE_integer("width", 256, "D.")
_HIDDEN = flags.DEFINE_integer("hidden", 256, "F.")

_CONFIG = jaxroute.RouterConfig(num_experts=32, top_k=4)


def _step(mesh: jax.sharding.Mesh | None, exchange: str | None):
  """A function of no arguments that takes one step."""
  partition = None
  if mesh is not None:
    partition = jaxroute.Partition(
      token_axes=("data", "expert"), expert_axis="expert", exchange=exchange
    )
  layer = jaxroute.linen.MoE(
    _CONFIG, hidden_size=_HIDDEN.value, partition=partition
  )
  rule, optimizer = jaxroute.dual.sign(1e-3), optax.sgd(1e-2)

  def loss_fn(params, expert_bias, x):
    variables = {"params": params, "expert_bias": expert_bias}
    (y, _), counted = layer.apply(variables, x, mutable=jaxroute.linen.COUNTED)
    return jnp.mean((y - x) ** 2), (jaxroute.linen.counts(counted), {})

  x = jax.random.normal(jax.random.key(0), (_TOKENS.value, _WIDTH.value))

  def init():
    variables = layer.init(jax.random.key(1), x)
    router = jaxroute.linen.init_router_state(variables, rule)
    return jaxroute.init_train_state(variables["params"], router, optimizer)

  placed = None
  if mesh is not None:
    shapes = jax.eval_shape(init)
    placed = jaxroute.parallel.shardings(shapes, partition, mesh)
    spec = jax.P(partition.token_axes)
    x = jax.device_put(x, jax.NamedSharding(mesh, spec))
  state = jax.jit(init, out_shardings=placed)()
  step = jax.jit(
    functools.partial(
      jaxroute.train_step, loss_fn=loss_fn, optimizer=optimizer, rule=rule
    ),
    out_shardings=None if placed is None else (placed, None),
  )
  return lambda: step(state, x)


def main(argv):
  del argv
  candidates = {"one device": _step(None, None)}
  for shape in ((8, 1), (2, 4), (1, 8)):
    # Where every device has all experts, there is nothing to exchange.
    for exchange in ("equal", "all_gather") if shape[1] > 1 else (None,):
      mesh = jax.make_mesh(
        shape,
        ("data", "expert"),
        axis_types=(jax.sharding.AxisType.Auto,) * 2,
      )
      with jax.set_mesh(mesh):
        step = _step(mesh, exchange)

      def call(step=step, mesh=mesh):
        with jax.set_mesh(mesh):
          return step()

      name = f"data={shape[0]}, expert={shape[1]}"
      candidates[f"{name}, {exchange}" if exchange else name] = call
  medians = timing.interleaved_medians(candidates, _REPEATS.value)
  title = (
    f"A training step of an MoE layer: T={_TOKENS.value}, D={_WIDTH.value},"
    f" F={_HIDDEN.value}, E=32, K=4, float32"
  )
  timing.print_table(title, medians, "one device")


if __name__ == "__main__":
  app.run(main)
