# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Two processes that talk over gloo move the bias as one process does."""

import functools
import json
import os
import socket
import subprocess
import sys

import numpy as np

T, E, K, STEPS = 64, 8, 2, 5


def _bias_after(place, placed):
  """The biases after a few steps, tokens laid out by `place`."""
  import jax

  import jaxroute
  from jaxroute import dual

  config = jaxroute.RouterConfig(num_experts=E, top_k=K)
  rule = dual.sign(dual.inverse_sqrt(1e-2))

  @functools.partial(jax.jit, out_shardings=placed)
  def step(state, logits):
    routing = jaxroute.route(logits, state.expert_bias[0], config)
    return jaxroute.update(jaxroute.accumulate(state, routing), rule)

  state = jaxroute.init_router_state(rule, E)
  rng = np.random.default_rng(0)
  skew = np.linspace(-1, 1, E)
  for _ in range(STEPS):
    logits = (rng.normal(size=(T, E)) + skew).astype(np.float32)
    state = step(state, place(logits))
  return np.asarray(state.expert_bias).tolist()


def _worker(process: int, port: int) -> None:
  import jax

  jax.distributed.initialize(f"localhost:{port}", 2, process)
  mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
  rows = jax.NamedSharding(mesh, jax.P("data"))

  def place(logits):
    mine = np.split(logits, 2)[process]
    return jax.make_array_from_process_local_data(rows, mine, logits.shape)

  print(json.dumps(_bias_after(place, jax.NamedSharding(mesh, jax.P()))))


def test_two_processes_equal_one():
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
  }
  workers = [
    subprocess.Popen(
      [sys.executable, __file__, str(process), str(port)],
      env=env,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for process in range(2)
  ]
  results = []
  for worker in workers:
    out, err = worker.communicate(timeout=120)
    assert worker.returncode == 0, err
    results.append(json.loads(out.splitlines()[-1]))
  expected = _bias_after(lambda logits: logits, None)
  assert results == [expected, expected]
  assert np.any(expected)


if __name__ == "__main__":
  _worker(int(sys.argv[1]), int(sys.argv[2]))
