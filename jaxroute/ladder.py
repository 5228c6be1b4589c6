# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""How an operation chooses among its implementations; the same for all operations.

An implementation that cannot do what it is asked for raises `NotImplementedError`
with the reason, before it traces anything; another may be able to. A `ValueError`
means that none can.
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core
from jax.interpreters import batching, mlir

from jaxroute.parallel import mesh

T = TypeVar("T")


def climb(
  operation: str,
  implementations: Mapping[str | None, Callable[[], T]],
  implementation: str | None,
) -> T:
  """Calls the implementation that is asked for, or the first that can.

  Args:
    operation: the public name, for error messages.
    implementations: name to call, the best one first. An entry under None is for
      None alone: it leaves the choice to the lowering.
    implementation: a name, or None for the first that does not raise
      `NotImplementedError`.

  Returns:
    What the implementation returns.

  Raises:
    ValueError: if there is no implementation of that name.
    NotImplementedError: if the implementation asked for cannot do this, or none can;
      with the reason of each.
  """
  if implementation not in (None, *implementations):
    names = ", ".join(repr(name) for name in implementations if name)
    raise ValueError(
      f"`implementation` of `{operation}` must be None or one of {names}, got"
      f" {implementation!r}. None takes the best one that can run here."
    )
  reasons = []
  for name, call in implementations.items():
    if implementation in (None, name):
      try:
        return call()
      except NotImplementedError as error:
        reasons.append(f"{name!r} cannot: {error}.")
  others = [x for x in implementations if x not in (None, implementation)]
  fix = f" Use None, or one of {others}." if implementation and others else ""
  raise NotImplementedError(f"`{operation}`: {' '.join(reasons)}{fix}")


def lower_only_for(
  platform: str, kernel: Callable[..., Any], *operands: Any
) -> Any:
  """`kernel(*operands)`, which raises in our words where it is lowered for others.

  What a program is lowered for is not known while it is traced: a kernel that is
  asked for by name on a CPU may be on its way to a TPU by `jax.export`.

  Args:
    platform: "tpu" or "cuda".
    kernel: a function that calls a kernel of that platform.
    *operands: pytrees of arrays.

  Returns:
    What `kernel` returns; lowered for another platform, `NotImplementedError`.
  """
  outputs = jax.eval_shape(kernel, *operands)

  def refuse(*operands):
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), outputs)
    zeros, _ = mesh.vary_alike((zeros, operands))
    return jax.tree.map(lambda x: _refuse.bind(x, platform=platform), zeros)

  return lax.platform_dependent(*operands, **{platform: kernel}, default=refuse)


def _raise_refusal(*args: Any, platform: str) -> Any:
  del args
  raise NotImplementedError(
    f"it is a kernel for {platform.upper()}, and the program is compiled for another"
    " platform; use `implementation=None`, which takes it where it can run, or"
    " `interpret=True`, which tries it anywhere"
  )


# The identity; whoever lowers or runs it is told so.
_refuse = core.Primitive("jaxroute_refuse")
_refuse.def_impl(_raise_refusal)
_refuse.def_abstract_eval(lambda x, *, platform: x)
batching.defvectorized(_refuse)
mlir.register_lowering(_refuse, _raise_refusal)
