# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Times of the routing kernel on an H100 by a model of its core: no GPU is needed.

`pip install '.[aot-gpu]'` brings the compilers (Python 3.12 or newer, Linux). The
kernel is compiled for an H100, and its machine code is run by `gpu_core` on the core
that has most blocks. These are estimates, whose worth is in docs/performance.md.

  python benchmarks/gpu_model.py
  python benchmarks/gpu_model.py --router=V3 --tokens=4096,65536
  python benchmarks/gpu_model.py --ties   # among the scores, in every warp

Up to 32 MB of logits are taken to lie in the L2 cache.
"""

import math
from typing import Any, NamedTuple

import gpu_core
from absl import app, flags

from jaxroute.aot import gpu, process

_ROUTER = flags.DEFINE_string(
  "router", "", "Routers whose names begin like this."
)
_TOKENS = flags.DEFINE_list(
  "tokens", ["16", "4096", "8192", "16384", "65536"], "Numbers of tokens."
)
_TIES = flags.DEFINE_bool(
  "ties", False, "Whether each warp has a token with a tie at the threshold."
)

_CORES = gpu.TARGETS["h100"]["core_count"]
_WARP = 32
# What of the logits the L2 cache still has when they are read again.
_CACHED_BYTES = 32e6

# Experts, K, and other fields of the `RouterConfig`.
ROUTERS = {
  "64/K6": (64, 6, {}),
  "128": (128, 8, {}),
  "256": (256, 8, {}),
  "V3": (256, 8, dict(num_groups=8, group_top_k=4)),
  "V3, histogram": (256, 8, dict(num_groups=8, group_top_k=4, histogram=True)),
  "384": (384, 8, {}),
  "512/K10": (512, 10, {}),
}


class Compiled(NamedTuple):
  """What the estimates are made of.

  Attributes:
    lanes: L, threads for a token.
    tokens: of a block.
    steps: the path of a warp.
    at_once: blocks that a core has room for.
    copy_bytes: of each copy of a block.
  """

  lanes: int
  tokens: int
  steps: list[gpu_core.Step]
  at_once: int
  copy_bytes: list[float]


def config_of(name: str) -> Any:
  """The `RouterConfig` of a key of `ROUTERS`.

  Args:
    name: the key.

  Returns:
    It.
  """
  import jaxroute

  e, k, fields = ROUTERS[name]
  return jaxroute.RouterConfig(num_experts=e, top_k=k, **fields)


def compile_router(name: str, lanes: int, has_ties: bool = False) -> Compiled:
  """Compiles the kernel for an H100; once in a process.

  Args:
    name: a key of `ROUTERS`.
    lanes: threads for a token.
    has_ties: whether each warp has a token with a tie at the threshold.

  Returns:
    What `estimate` takes.

  Raises:
    RuntimeError: if warps do not take another path for ties.
  """
  import jax
  import jax.numpy as jnp

  from jaxroute.kernels.gpu import route as kernel

  config = config_of(name)
  e = config.num_experts

  def route(logits: jax.Array, bias: jax.Array) -> kernel.Outputs:
    return kernel.route(logits, bias, None, config=config, lanes=lanes)

  shapes = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((65_536, e), (e,))]
  (found,) = (
    kernel
    for kernel in gpu.report("h100", route, *shapes).kernels
    if kernel.name == "jaxroute_route"
  )
  paths = [gpu_core.path(found.sass, votes) for votes in (0, 1)]
  if len(paths[0]) >= len(paths[1]):
    raise RuntimeError("expected a vote of warps on ties, found none")
  copies = sum(step.base == "UTMALDG" for step in paths[0])
  tile = found.threads * e // lanes * 4
  return Compiled(
    lanes=lanes,
    tokens=found.threads // lanes,
    steps=paths[has_ties],
    at_once=found.blocks_per_core,
    copy_bytes=[tile / copies] * copies,
  )


def estimate(name: str, compiled: Compiled, tokens: int) -> float:
  """Microseconds of the kernel, without the launch that clears the load.

  Args:
    name: a key of `ROUTERS`.
    compiled: from `compile_router`.
    tokens: T.

  Returns:
    The estimate.
  """
  is_cached = tokens * ROUTERS[name][0] * 4 <= _CACHED_BYTES
  core = gpu_core.FROM_L2 if is_cached else gpu_core.FROM_HBM
  blocks = math.ceil(tokens / compiled.tokens / _CORES)
  return core.microseconds(
    gpu_core.cycles(
      compiled.steps, blocks, compiled.at_once, compiled.copy_bytes, core
    )
  )


def possible_lanes(name: str) -> list[int]:
  """Numbers of threads that can share a token.

  Args:
    name: a key of `ROUTERS`.

  Returns:
    Some of 1, 2, 4 and 8.
  """
  import jax.numpy as jnp

  from jaxroute.kernels.gpu.route import lanes

  return lanes.possible(config_of(name), jnp.float32)


def main(argv: list[str]) -> None:
  del argv
  if why := gpu.missing():
    raise app.UsageError(why)
  tokens = [int(t) for t in _TOKENS.value]
  columns = [f"T = {t:,}" for t in tokens]
  print("Estimated microseconds, H100\n")
  head = "router", "L", "blocks per SM", "instructions per token", *columns
  print("| " + " | ".join(head) + " |")
  print("| --- " * len(head) + "|")
  for name in (n for n in ROUTERS if n.startswith(_ROUTER.value)):
    for lanes in process.apart(possible_lanes, name):
      compiled = process.apart(compile_router, name, lanes, _TIES.value)
      executed = sum(step.base != "NOP" for step in compiled.steps)
      cells = (
        *(name, lanes, compiled.at_once),
        f"{executed * lanes / _WARP:.0f}",
        *(f"{estimate(name, compiled, t):.1f}" for t in tokens),
      )
      print("| " + " | ".join(map(str, cells)) + " |", flush=True)
  print(f"\n{gpu.versions()}")


if __name__ == "__main__":
  app.run(main)
