# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Expert order: the permutation that groups the N = T * K assignments by expert.

Those that no expert receives (padding, tokens with NaN weights, drops) come
last, after the first `sum(group_sizes)` rows. So every shape is static, and
drops stay visible as `load - group_sizes`.
"""

import dataclasses
import fractions
import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from jaxroute import checks, ladder, remat, types
from jaxroute.dispatch import pallas_gpu, pallas_tpu, xla
from jaxroute.parallel import mesh

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Permutation:
  """Assignments in expert order; assignment n is choice n % K of token n // K.

  Attributes:
    permutation: `[N]` int32. Row i of the expert order is assignment
      `permutation[i]`. Assignments of one expert keep the order of the tokens.
    inverse_permutation: `[N]` int32. Assignment n is in row
      `inverse_permutation[n]`.
    group_sizes: `[E]` int32. Rows per expert; the rows after their sum belong
      to no expert.
  """

  permutation: jax.Array
  inverse_permutation: jax.Array
  group_sizes: jax.Array


def expert_capacity(
  config: types.RouterConfig,
  num_tokens: int,
  capacity_factor: float,
  partition: types.Partition | None = None,
) -> int:
  """Rows that each expert accepts: `ceil(capacity_factor * T * K / E)`.

  Args:
    config: static router description.
    num_tokens: T, of all devices.
    capacity_factor: 1.0 leaves no slack over perfect balance. It is taken for
      the number that it is written as: 1.1 for eleven tenths, 1 / 3 for a third.
    partition: how the tokens lie on the mesh in force; None for one device.
      Every token shard has a capacity of its own, for its part of T.

  Returns:
    C, at least 1, and at most 2^31 - 1, which drops nothing.

  Raises:
    ValueError: if `capacity_factor` is not positive and finite, or another
      argument is of the wrong type.
  """
  fix = "Write jaxroute.RouterConfig(num_experts=..., top_k=...)."
  checks.check_instance("config", config, types.RouterConfig, fix)
  fix = "Pass the number of tokens, of all devices."
  num_tokens = checks.as_int("num_tokens", num_tokens, fix, low=0)
  fix = "Leave the capacity out (None) to drop nothing."
  capacity_factor = checks.as_float(
    "capacity_factor", capacity_factor, "(0, inf)", fix
  )
  if partition is not None:
    fix = "None is for one device."
    checks.check_instance("partition", partition, types.Partition, fix)
  shard_tokens = num_tokens // mesh.token_shards(partition)
  factor = _as_written(capacity_factor)
  wanted = factor.numerator * shard_tokens * config.top_k
  return _in_int32(
    max(-(-wanted // (factor.denominator * config.num_experts)), 1)
  )


def _in_int32(capacity: Any) -> Any:
  """A capacity that rows can be compared with; a symbolic one stays as it is."""
  return min(capacity, 2**31 - 1) if isinstance(capacity, int) else capacity


def _as_written(x: float) -> fractions.Fraction:
  """The number that a float stands for: 11 / 10, or 1 / 3; a float32's if it is one.

  A float of 1.1 is a little more than 1.1, one of 32 bits even by 2e-8.
  """
  kind = np.float32 if np.float32(x) == x else np.float64
  decimal = fractions.Fraction(str(kind(x)))
  simple = decimal.limit_denominator(10**5)
  return simple if kind(float(simple)) == kind(x) else decimal


def sort_by_expert(
  expert_idx: jax.Array,
  num_experts: int,
  token_mask: jax.Array | None = None,
  capacity: int | None = None,
  implementation: Implementation | None = None,
  interpret: Any = False,
  rank: jax.Array | None = None,
  load: jax.Array | None = None,
) -> Permutation:
  """Puts the assignments in expert order, stably.

  Args:
    expert_idx: `[T, K]` int32. The chosen experts, distinct within a token. An
      index outside `[0, E)` is of an expert that is not here: its assignment
      comes last and is in no group, as if it were dropped.
    num_experts: E.
    token_mask: `[T]` bool. Assignments of False tokens come last and are in no
      group. `Routing.token_mask` also leaves out tokens with NaN weights.
    capacity: C. An expert keeps its first C assignments in token order; the
      others are dropped. None drops nothing.
    implementation: "pallas_tpu", a kernel that counts ranks on the MXU;
      "pallas_gpu", one that takes `rank` and does not sort; "xla"; or None for the
      first of them that can do this here. As in `jaxroute.route`, but the kernels
      are for one device or for the inside of `jax.shard_map`.
    interpret: as in `jaxroute.route`.
    rank: `[T, K]` int32. `Routing.rank` of these assignments, if there is one: how
      many of the same expert come before; of those that no expert receives, how
      many of these. It is not checked, and only "pallas_gpu" reads it.
    load: `[E]` int32 or int64. `Routing.load` of these assignments, which
      "pallas_gpu" needs beside `rank`.

  Returns:
    A `Permutation`, with `group_sizes = min(load, C)`. The order of the rows that
    belong to no expert differs between implementations.

  Raises:
    ValueError: if a shape, dtype or `capacity` does not fit.
    NotImplementedError: if `implementation` cannot do this; "xla" always can.
  """
  fix = "Pass `Routing.expert_idx`."
  checks.check_array("expert_idx", expert_idx, "[T, K]", "integer", fix)
  fix = "Pass the E of the router."
  num_experts = checks.as_int("num_experts", num_experts, fix)
  checks.check_mask(token_mask, expert_idx.shape[0])
  if capacity is not None:
    fix = "It is rows per expert. Use None to drop nothing."
    capacity = _in_int32(checks.as_int("capacity", capacity, fix))
  fix = "Pass `Routing.rank` of these `expert_idx`, or leave it out."
  sizes = dict(zip("TK", expert_idx.shape, strict=True))
  if rank is not None:
    checks.check_array("rank", rank, "[T, K]", "int32", fix, **sizes)
  if load is not None:
    fix = "Pass `Routing.load` of these `expert_idx`, or leave it out."
    checks.check_array(
      "load", load, "[E]", "int32 or int64", fix, E=num_experts
    )
    load = load.astype(jnp.int32)
  names = get_args(Implementation)
  ladder.check_names("sort_by_expert", names, implementation, interpret)
  return _sort_by_expert(
    checks.as_expert_idx(expert_idx, num_experts),
    token_mask,
    rank,
    load,
    num_experts=num_experts,
    capacity=capacity,
    implementation=implementation,
    interpret=interpret,
  )


@functools.partial(
  jax.jit,
  static_argnames=("num_experts", "capacity", "implementation", "interpret"),
)
def _sort_by_expert(
  expert_idx: jax.Array,
  token_mask: jax.Array | None,
  rank: jax.Array | None,
  load: jax.Array | None,
  *,
  num_experts: int,
  capacity: int | None,
  implementation: Implementation | None,
  interpret: Any,
) -> Permutation:
  """See `sort_by_expert`, which checks the arguments."""

  def key() -> jax.Array:
    """`[T, K]` int32: the expert that receives an assignment; E for none."""
    is_here = (expert_idx >= 0) & (expert_idx < num_experts)
    if token_mask is not None:
      is_here &= token_mask[:, None]
    return jnp.where(is_here, expert_idx, num_experts)

  def of_load(load: jax.Array, *order: jax.Array) -> tuple[jax.Array, ...]:
    """Group sizes in place of a load of E experts and of none."""
    sizes = load[:num_experts]
    if capacity is not None:
      sizes = jnp.minimum(sizes, capacity)
    return sizes, *order

  def by_xla():
    ladder.refuse_to_interpret(interpret)
    return of_load(*xla.sort(key(), num_experts, capacity))

  by_name = implementation is not None
  how = dict(by_name=by_name, interpret=interpret)

  def by_pallas_tpu():
    return of_load(*pallas_tpu.sort(key(), num_experts, capacity, **how))

  def by_pallas_gpu():
    return pallas_gpu.sort(
      expert_idx, num_experts, token_mask, capacity, rank, load, **how
    )

  implementations = {
    "pallas_tpu": by_pallas_tpu,
    "pallas_gpu": by_pallas_gpu,
    "xla": by_xla,
  }
  group_sizes, permutation, inverse = ladder.climb(
    "sort_by_expert", implementations, implementation
  )
  return Permutation(
    permutation=remat.checkpoint_name("permutation", permutation),
    inverse_permutation=remat.checkpoint_name("inverse_permutation", inverse),
    group_sizes=remat.checkpoint_name("group_sizes", group_sizes),
  )
