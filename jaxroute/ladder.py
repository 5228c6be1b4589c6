# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How an operation chooses among its implementations; the same for all operations.

An implementation that cannot do what it is asked for raises a `Refusal` with the
reason, before it traces anything; another may be able to. A `ValueError` means
that none can, and any other error is a defect: no slower one hides it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu
from jax.extend import core
from jax.interpreters import ad, batching, mlir

from jaxroute import checks
from jaxroute.parallel import mesh

T = TypeVar("T")


class Refusal(NotImplementedError):
  """An implementation cannot do what it is asked for, or not here."""


def climb(
  operation: str,
  implementations: Mapping[Any, Callable[[], T]],
  implementation: str | None,
) -> T:
  """Calls the implementation that is asked for, or the first that can.

  Args:
    operation: the public name, for error messages.
    implementations: name to call, the best one first. The entry under None is
      tried only if no name was given: it leaves the choice to the lowering.
    implementation: a name, or None for the first that does not refuse.

  Returns:
    What the implementation returns.

  Raises:
    ValueError: if there is no implementation of that name.
    Refusal: if the implementation asked for cannot do this, or none can; with the
      reason of each.
  """
  check_names(
    operation, [name for name in implementations if name], implementation
  )
  reasons = []
  for name, call in implementations.items():
    if implementation in (None, name):
      try:
        return call()
      except Refusal as error:
        reasons.append(f"{name!r} cannot: {error}.")
  others = [x for x in implementations if x not in (None, implementation)]
  fix = f" Use None, or one of {others}." if implementation and others else ""
  raise Refusal(f"`{operation}`: {' '.join(reasons)}{fix}")


def check_names(
  operation: str,
  names: Sequence[str],
  implementation: str | None,
  interpret: Any = False,
  *,
  argument: str = "implementation",
) -> None:
  """Raises ValueError unless there is an implementation of a name.

  Args:
    operation: the public name, for the message.
    names: of the implementations there are.
    implementation: a name, or None.
    interpret: what the user passed for it: a bool, or Pallas's parameters.
    argument: what the operation calls the name.
  """
  is_name = isinstance(implementation, str) and implementation in names
  if implementation is not None and not is_name:
    raise ValueError(
      f"`{argument}` of `{operation}` must be None or one of"
      f" {', '.join(map(repr, names))}, got {checks.describe(implementation)}. None"
      " selects the best one that can run here."
    )
  if not isinstance(interpret, bool | pltpu.InterpretParams):
    raise ValueError(
      f"`interpret` of `{operation}` must be a bool or a `pltpu.InterpretParams`,"
      f" got {checks.describe(interpret)}. True interprets a kernel on any device."
    )


def check_can_run(
  unsupported: str | None,
  *,
  unavailable: Callable[[], str | None],
  by_name: bool,
  interpret: Any,
  over_shards: bool = False,
) -> None:
  """Raises `Refusal` unless a kernel can do this, and here.

  Args:
    unsupported: why the kernel cannot do it anywhere, or None.
    unavailable: returns why the device of the program has no such kernel, or
      None; asked unless the kernel was asked for by name, or is interpreted.
    by_name: whether the user asked for the kernel.
    interpret: whether it is interpreted, which any device can under any mesh.
    over_shards: as in `mesh.kernel_refusal`.
  """
  reason = unsupported
  if not interpret:
    reason = reason or mesh.kernel_refusal(by_name, over_shards)
    reason = reason or (None if by_name else unavailable())
  if reason:
    raise Refusal(reason)


def symbolic_size(x: jax.Array) -> str | None:
  """Why no kernel can take an array of symbolic size, as `jax.export` has them.

  Args:
    x: `[T, ...]`.

  Returns:
    The reason, for `check_can_run`; None if T is a number.
  """
  t = x.shape[0]
  return (
    None if isinstance(t, int) else f"kernels need a number of tokens, got {t}"
  )


def refuse_to_interpret(interpret: Any) -> None:
  """Raises `Refusal` if what is no kernel is asked to be interpreted.

  Args:
    interpret: what the user passed.
  """
  if interpret:
    raise Refusal(
      f"there is no kernel to interpret, and `interpret` is {interpret!r}"
    )


def call_kernel(
  operation: str,
  platform: str,
  kernel: Callable[..., Any],
  interpret: Any,
  *operands: Any,
) -> Any:
  """Calls a kernel of one platform; lowering it for another raises a clear error.

  What a program is lowered for is not known while it is traced: a kernel that
  is asked for by name on a CPU may be on its way to a TPU by `jax.export`.

  Args:
    operation: the public name, for the error.
    platform: "tpu" or "cuda".
    kernel: a function that calls the kernel.
    interpret: whether `kernel` interprets it, which any platform can.
    *operands: pytrees of arrays.

  Returns:
    What `kernel` returns.

  Raises:
    NotImplementedError: when the program is lowered for another platform, or for
      several devices over which XLA would have to partition the kernel.
  """

  def call(*operands):
    # Kernels are written in words of 32 bits, and a sum or an index of theirs
    # must not have 64 where the program around them does.
    with jax.enable_x64(False):
      outputs = kernel(*operands)
    # Mosaic GPU does not say over which mesh axes its results vary.
    outputs, _ = mesh.vary_alike((outputs, operands))
    return outputs

  if interpret:
    return call(*operands)
  outputs = jax.eval_shape(call, *operands)
  names = dict(operation=operation, platform=platform)

  def run(*operands):
    return call(
      *jax.tree.map(lambda x: _partition_refused.bind(x, **names), operands)
    )

  def refuse(*operands):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    zeros, _ = mesh.vary_alike((zeros, operands))
    return jax.tree.map(lambda x: _refuse.bind(x, **names), zeros)

  return lax.platform_dependent(*operands, **{platform: run}, default=refuse)


def _raise_refusal(*args: Any, operation: str, platform: str) -> Any:
  del args
  raise NotImplementedError(
    f"the {platform.upper()} kernel of `{operation}` was traced, and the program is"
    " compiled for another platform. Leave the implementation out (None), trace for"
    " that platform, or interpret the kernel: functions take `interpret=True`"
  )


def _lower_on_one_device(
  ctx: Any, x: Any, *, operation: str, platform: str
) -> Any:
  # Inside `jax.shard_map` the context is of another kind, and has no number.
  devices = getattr(ctx.module_context.axis_context, "num_devices", 1)
  if devices > 1:
    raise NotImplementedError(
      f"the {platform.upper()} kernel of `{operation}` was traced where no mesh is in"
      f" force, and its program is for {devices} devices, over which XLA does not"
      " partition a kernel; put the call under `jax.set_mesh` and give the layer a"
      " `partition`, or call it inside `jax.shard_map`"
    )
  return [x]


def _identity(name: str, impl: Callable[..., Any], lowering: Any) -> Any:
  """A primitive whose lowering may raise; it marks a branch of one platform."""
  primitive = core.Primitive(name)
  primitive.def_impl(impl)
  primitive.def_abstract_eval(lambda x, **_: x)
  batching.defvectorized(primitive)
  mlir.register_lowering(primitive, lowering)
  return primitive


def _jvp(primals: Any, tangents: Any, *, operation: str, platform: str) -> Any:
  """The derivative of integers, which is zero; of all else it is refused.

  JAX asks for it where a custom derivative ends.
  """
  del tangents
  (x,), names = primals, dict(operation=operation, platform=platform)
  if jnp.issubdtype(x.dtype, jnp.inexact):
    raise NotImplementedError(
      f"the {platform.upper()} kernel of `{operation}` has no such derivative; use"
      " `implementation='xla'`"
    )
  x = _partition_refused.bind(x, **names)
  return x, ad.Zero(jax.typeof(x).to_tangent_aval())


_refuse = _identity("jaxroute_refuse", _raise_refusal, _raise_refusal)
_partition_refused = _identity(
  "jaxroute_partition_refused", lambda x, **_: x, _lower_on_one_device
)
ad.primitive_jvps[_partition_refused] = _jvp
