# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The smallest complete run: a model of two MoE layers, balanced and not.

  python examples/minimal.py

It takes less than a minute on a CPU. The arrays lie on a mesh of all devices, each of
which holds a part of the batch and all parameters; loads are those of the whole batch.
On a pod, start the program on every host and call `jax.distributed.initialize()` first
in `main`. examples/lm also shards the experts and saves checkpoints.
"""

import functools
import sys

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

import jaxroute
import jaxroute.linen
from jaxroute import dual

BATCH, WIDTH, EXPERTS = 512, 32, 16


class Model(nn.Module):
  """Two residual MoE layers and a linear one."""

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    config = jaxroute.RouterConfig(num_experts=EXPERTS, top_k=2)
    for _ in range(2):
      # The layer routes each row of x to 2 of 16 experts and counts the loads.
      y, _ = jaxroute.linen.MoE(
        config,
        hidden_size=32,
        partition=jaxroute.Partition(token_axes=("data",)),
      )(nn.RMSNorm()(x))
      x = x + y
    return nn.Dense(WIDTH)(x)


def loss_fn(params, expert_bias, batch):
  """The mean squared error, and what the routers counted."""
  x, target = batch
  variables = {"params": params, "expert_bias": expert_bias}
  y, counted = Model().apply(variables, x, mutable=jaxroute.linen.COUNTED)
  return jnp.mean((y - target) ** 2), (jaxroute.linen.counts(counted), {})


def make_batch(step):
  """Rows that share a direction, which routers left alone all follow."""
  key, teacher_key = jax.random.split(jax.random.key(0))
  x = jax.random.normal(jax.random.fold_in(key, step), (BATCH, WIDTH))
  x = x.at[:, 0].add(2.0)
  teacher = jax.random.normal(teacher_key, (WIDTH, WIDTH)) / WIDTH**0.5
  return x, jnp.sin(2 * x @ teacher)


def train(
  name: str, rule: optax.GradientTransformation, steps: int
) -> list[float]:
  """Trains and prints; returns the MaxVio of the steps that it prints."""
  print(f"{name}:")
  optimizer = optax.adam(3e-3)
  mesh = jax.make_mesh((jax.device_count(),), ("data",))
  with jax.set_mesh(mesh):
    # Every process makes its part of the batch, as it would read files.
    sharded = jax.NamedSharding(mesh, jax.P("data"))
    batch_of = jax.jit(make_batch, out_shardings=sharded)
    variables = jax.jit(Model().init)(jax.random.key(1), batch_of(0)[0])
    # The router state: biases, the loads so far, the state of the rule.
    router = jaxroute.linen.init_router_state(variables, rule)
    state = jaxroute.init_train_state(variables["params"], router, optimizer)
    # A step moves parameters by their gradient and biases by the rule.
    step_fn = functools.partial(
      jaxroute.train_step, loss_fn=loss_fn, optimizer=optimizer, rule=rule
    )
    step_fn = jax.jit(step_fn, donate_argnums=0)
    history = []
    for step in range(steps + 1):
      state, report = step_fn(state, batch_of(step))
      # This waits for the step; examples/lm reads what the one before reported.
      loss, max_vio = float(report["loss"]), float(report["max_vio"])
      if step % max(1, steps // 4) == 0:
        history.append(max_vio)
        print(f"  step {step:3d}: loss {loss:.3f}, MaxVio {max_vio:.2f}")
  return history


def main(steps: int = 200) -> dict[str, list[float]]:
  """Trains with and without balancing; returns the MaxVio of both."""
  # A rule is any optax transformation; `set_to_zero` leaves the biases at 0.
  rules = {"balanced": dual.sign(3e-3), "unbalanced": optax.set_to_zero()}
  return {name: train(name, rule, steps) for name, rule in rules.items()}


if __name__ == "__main__":
  main() if len(sys.argv) == 1 else sys.exit(__doc__)
