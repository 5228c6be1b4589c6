# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a layer costs on a mesh of chips that are not here."""

import collections
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxroute import experts, types
from jaxroute import layer as layer_lib
from jaxroute import presets as presets_lib
from jaxroute.aot import chips, network, tpu
from jaxroute.aot import collectives as collectives_lib


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What is known of a layer, for one device; of one that does not fit, less.

  Attributes:
    needed: bytes of memory; `arguments`, `results` and `temporaries` if it fits.
    hbm_bytes: that there are.
    fits: whether they suffice: for a TPU as its compiler says.
    needed_flops: of the products that the routed tokens need.
    compiled_flops: as XLA counts them: rows that may be empty are in it, kernels
      as they declare them, a loop once.
    arguments: bytes of tokens, parameters and, for gradients, a cotangent.
    results: bytes of outputs and gradients.
    temporaries: bytes beside them.
    peak: bytes in use at once, at most, as XLA counts them.
    collectives: of the program. Those in a loop are of each round of an exchange
      after the first, of which there is none if the load is balanced.
    seconds: the least time of each resource, in which it does what it must; an
      estimate. "matrix units" is of `needed_flops`. "HBM" moves arguments and
      results once and temporaries twice. "ICI" or "NVLink" and the axes are of the
      collectives that are in no loop.
  """

  needed: float
  hbm_bytes: float
  fits: bool
  needed_flops: float
  compiled_flops: float | None = None
  arguments: int | None = None
  results: int | None = None
  temporaries: int | None = None
  peak: int | None = None
  collectives: tuple[collectives_lib.Collective, ...] = ()
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)

  @property
  def binds(self) -> str | None:
    """The resource that takes the longest."""
    return max(self.seconds, key=self.seconds.__getitem__, default=None)


def partition(mesh: jax.sharding.Mesh, **fields: Any) -> types.Partition:
  """Tokens over all axes of a mesh, experts over the axis of that name, if any.

  Args:
    mesh: see there.
    **fields: others of `Partition`.

  Returns:
    The partition.

  Raises:
    ValueError: as `Partition`.
  """
  axes = tuple(mesh.axis_names)
  axis = "expert" if "expert" in axes else None
  return types.Partition(token_axes=axes, expert_axis=axis, **fields)


def check(preset: presets_lib.Preset, mesh: dict[str, int]) -> None:
  """Raises ValueError unless a mesh can hold the layer.

  Args:
    preset: of the layer.
    mesh: sizes of its axes.
  """
  number, total = mesh.get("expert", 1), preset.config.num_experts
  if total % number:
    devices = math.prod(mesh.values())
    good = math.gcd(total, devices)
    raise ValueError(
      f"the axis 'expert' of the mesh must divide {total} experts, got {number}."
      f" Take --mesh=data={devices // good},expert={good}."
    )


def report(
  preset: presets_lib.Preset,
  tokens: int,
  mesh: jax.sharding.Mesh,
  chip: chips.Chip,
  partition: types.Partition,
  grad: bool = False,
  experts_implementation: Any = None,
) -> Report:
  """Compiles a layer of bfloat16, and reads what the compiler says.

  Args:
    preset: of the layer.
    tokens: of each device.
    mesh: of devices of `chip`.
    chip: of which devices.
    partition: of the layer.
    grad: whether to compile the gradients of tokens, router and experts, too.
    experts_implementation: as in `jaxroute.layer.moe`.

  Returns:
    What is known.

  Raises:
    ValueError, NotImplementedError: if the layer refuses them.
  """
  traced = _trace(preset, tokens, mesh, partition, grad, experts_implementation)
  needed_flops = _needed_flops(preset, tokens) * (3 if grad else 1)
  known: Any = dict(needed_flops=needed_flops, hbm_bytes=chip.hbm_bytes)
  platform = "tpu" if chip.platform == "tpu" else "cuda"
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    lowered = traced.lower(lowering_platforms=(platform,))
    try:
      compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
      lacking = tpu.lacking(error)
      if lacking is None:
        raise
      return Report(needed=lacking[0], fits=False, **known)
  memory, text = compiled.memory_analysis(), compiled.as_text()
  assert memory is not None and text is not None
  found = collectives_lib.read(text, dict(mesh.shape))
  moved = memory.argument_size_in_bytes + memory.output_size_in_bytes
  seconds: dict[str, float] = collections.defaultdict(float)
  seconds["matrix units"] = needed_flops / chip.flops
  seconds["HBM"] = (moved + 2 * memory.temp_size_in_bytes) / chip.hbm_bandwidth
  for c in (c for c in found if not c.in_loop):
    name = f"{chip.link} {'+'.join(c.axes)}"
    seconds[name] += network.seconds(c, mesh, chip)
  needed = moved - memory.alias_size_in_bytes + memory.temp_size_in_bytes
  return Report(
    needed=needed,
    fits=chip.platform == "tpu" or needed <= chip.hbm_bytes,
    arguments=memory.argument_size_in_bytes,
    results=memory.output_size_in_bytes,
    temporaries=memory.temp_size_in_bytes,
    peak=memory.peak_memory_in_bytes,
    compiled_flops=(compiled.cost_analysis() or {}).get("flops"),
    collectives=tuple(found),
    seconds=dict(seconds),
    **known,
  )


def _needed_flops(preset: presets_lib.Preset, tokens: int) -> float:
  """Of the forward pass on a device, if the load is balanced."""
  hidden = preset.config.top_k * preset.hidden_size + preset.shared_hidden_size
  products = 3 * hidden + preset.config.num_experts
  return 2 * tokens * preset.model_size * products


def _trace(
  preset: presets_lib.Preset,
  tokens: int,
  mesh: jax.sharding.Mesh,
  partition: types.Partition,
  grad: bool,
  experts_implementation: Any,
) -> jax.stages.Traced:
  """The layer, or its value and gradients, of abstract arrays."""
  config, d = preset.config, preset.model_size

  def like(
    shape: tuple[int, ...], dtype: Any, *spec: Any
  ) -> jax.ShapeDtypeStruct:
    sharding = jax.NamedSharding(mesh, jax.P(*spec))
    return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

  def params(f: int, *leading: int) -> experts.ExpertParams:
    """Of one expert, or with a leading axis of as many."""
    axes = (partition.expert_axis,) if leading else ()
    into: Any = like((*leading, d, f), jnp.bfloat16, *axes)
    out: Any = like((*leading, f, d), jnp.bfloat16, *axes)
    return experts.ExpertParams(w_gate=into, w_up=into, w_down=out)

  def forward(*args: Any) -> tuple[jax.Array, Any]:
    x, router_weight, routed, shared, expert_bias = args
    routing, _ = layer_lib.router(
      x, router_weight, expert_bias, config, partition=partition
    )
    out, *sizes = layer_lib.moe(
      x,
      routing,
      routed,
      shared,
      config=config,
      partition=partition,
      experts_implementation=experts_implementation,
    )
    return out, (routing.load, *sizes)

  def with_gradients(cotangent: jax.Array, *args: Any) -> Any:
    *operands, expert_bias = args
    out, pull, counts = jax.vjp(
      lambda *operands: forward(*operands, expert_bias), *operands, has_aux=True
    )
    return out, counts, pull(cotangent)

  x = like((tokens * mesh.size, d), jnp.bfloat16, partition.token_axes)
  shared = preset.shared_hidden_size
  args = (
    x,
    like((d, config.num_experts), jnp.float32),
    params(preset.hidden_size, config.num_experts),
    params(shared) if shared else None,
    like((config.num_experts,), jnp.float32),
  )
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
    if grad:
      return jax.jit(with_gradients).trace(x, *args)
    return jax.jit(forward).trace(*args)
