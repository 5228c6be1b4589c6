# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A SwiGLU layer's experts on an NVIDIA GPU: work, memory, and what is timed.

Against `jax.lax.ragged_dot`, and against dense products of the layer's FLOPs.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import gpu_profile
import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import experts
from jaxroute.experts import batched

DENSE, BY_DEFAULT = "dense products", "swiglu, by default"
# One expert that gets all the rows is dense.
IMPLEMENTATIONS = {
  "dense": "ragged_dot",
  "jaxroute": "batched",
  "ragged_dot": "ragged_dot",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
  """N rows of top-K routing, E experts, D and F; no expert has more than N / K."""

  n: int = 49_152
  e: int = 64
  k: int = 6
  d: int = 512
  f: int = 256

  def __str__(self):
    return f"N={self.n:,}, E={self.e}, D={self.d:,}, F={self.f:,}"

  @property
  def flops(self) -> int:
    """Of the forward pass: three products. The gradients take twice as many."""
    return 6 * self.n * self.d * self.f


def loads(sizes: Sizes) -> dict[str, np.ndarray]:
  """Name to group sizes, from even ones to the most uneven there are."""
  n, e = sizes.n, sizes.e
  shares = {
    "even": np.ones(e),
    "MaxVio 0.25": np.where(np.arange(e) < e // 2, 1.25, 0.75),
    "MaxVio 1": np.linspace(0.0, 2.0, e),
    "MaxVio 4": np.maximum(0.0, 5 - np.arange(e) * 12.5 / e),
    "K experts": np.arange(e) < sizes.k,
  }
  group_sizes = {}
  for name, share in shares.items():
    ends = np.round(np.cumsum(share) / share.sum() * n)
    group_sizes[name] = np.diff(ends, prepend=0).astype(np.int32)
  return group_sizes


def step(swiglu: Callable[..., jax.Array]) -> Callable[..., Any]:
  """Output and all gradients, from what gives the output."""

  def both(x, params, group_sizes, d_out):
    out, pull = jax.vjp(
      lambda x, params: swiglu(x, params, group_sizes), x, params
    )
    return out, pull(d_out)

  return both


def candidates(
  sizes: Sizes, implementations: list[str | None], *, with_gradients: bool
) -> gpu_profile.Candidates:
  """Name to function and arguments in bfloat16, of loads with MaxVio 1; dense first.

  Args:
    sizes: of the layer.
    implementations: of `experts.swiglu`; None is its default here.
    with_gradients: whether to pull back, too.

  Returns:
    What `gpu_profile.measure` takes.
  """

  def dense(x, params, group_sizes):
    del group_sizes
    one = jax.tree.map(lambda w: w[0], params)
    return experts.dense_swiglu(x, one)

  calls: dict[str, Callable[..., Any]] = {DENSE: dense} | {
    f"swiglu, {name}" if name else BY_DEFAULT: functools.partial(
      experts.swiglu, implementation=name
    )
    for name in implementations
  }
  key, dtype = jax.random.key(0), jnp.bfloat16
  x = jax.random.normal(key, (sizes.n, sizes.d), dtype)
  params = experts.init_expert_params(key, sizes.e, sizes.d, sizes.f, dtype)
  args = x, params, jnp.asarray(loads(sizes)["MaxVio 1"])
  if with_gradients:
    calls = {name: step(call) for name, call in calls.items()}
    args += (x,)
  return {name: (call, args) for name, call in calls.items()}


def arguments(sizes: Sizes, num_experts: int, dtype: Any) -> tuple[Any, ...]:
  """Shapes of the arguments of `step`."""
  rows = jax.ShapeDtypeStruct((sizes.n, sizes.d), dtype)
  params = jax.eval_shape(
    lambda: experts.init_expert_params(
      jax.random.key(0), num_experts, sizes.d, sizes.f, dtype
    )
  )
  return rows, params, jax.ShapeDtypeStruct((num_experts,), jnp.int32), rows


def temporaries(sizes: Sizes, device: jax.Device) -> dict[str, list[float]]:
  """Implementation to GB of temporaries of a step in bfloat16 and in float32.

  Args:
    sizes: of the layer.
    device: what it is compiled for; it need not be here.

  Returns:
    Two figures each.
  """
  sharding = jax.sharding.SingleDeviceSharding(device)
  found = {}
  for name, implementation in IMPLEMENTATIONS.items():
    found[name] = []
    for dtype in (jnp.bfloat16, jnp.float32):
      args = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding),
        arguments(sizes, 1 if name == "dense" else sizes.e, dtype),
      )
      swiglu = functools.partial(experts.swiglu, implementation=implementation)
      call = jax.jit(step(swiglu))
      memory = call.lower(*args).compile().memory_analysis()
      found[name].append(memory.temp_size_in_bytes / 1e9)
  return found


def rows_multiplied(sizes: Sizes) -> dict[str, float]:
  """Name of a load to rows in the products of "batched", padding too, per row."""

  @jax.jit
  def count(group_sizes):
    row = jnp.ones(sizes.n, jnp.int32)
    return batched.for_each_batch(
      lambda block, total: total + block.read(row).size,
      jnp.int32(0),
      group_sizes,
      sizes.n,
    )

  return {
    name: int(count(group_sizes)) / sizes.n
    for name, group_sizes in loads(sizes).items()
  }
