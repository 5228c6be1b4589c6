# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Pallas's Mosaic GPU: what changes between versions of JAX is named here only."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.experimental.pallas import mosaic_gpu

# Names and arguments are others in every version, so a type checker knows none.
plgpu: Any = mosaic_gpu


def call(
  body: Callable[..., None],
  out_type: Sequence[jax.ShapeDtypeStruct],
  *,
  name: str,
  blocks: int,
  scratch_types: Mapping[str, Any],
  interpret: bool,
) -> Callable[..., tuple[jax.Array, ...]]:
  """A kernel of blocks of 128 threads that has the barriers it needs.

  Args:
    body: what a block does; of references to operands and results, and, by name, to
      buffers. Its number is `lax.axis_index("block")`.
    out_type: of the results.
    name: of the kernel, in programs and profiles.
    blocks: how many.
    scratch_types: of the buffers in shared memory.
    interpret: whether Pallas interprets it.

  Returns:
    A function of operands: arrays, or what `jax.new_ref` returns.
  """
  return plgpu.kernel(
    body,
    out_type=tuple(out_type),
    grid=(blocks,),
    grid_names=("block",),
    scratch_types=scratch_types,
    compiler_params=plgpu.CompilerParams(
      # The default is another one, which has no operations of single threads.
      lowering_semantics=plgpu.LoweringSemantics.Lane,
      unsafe_no_auto_barriers=True,
    ),
    kernel_name=f"jaxroute_{name}",
    interpret=interpreter(interpret),
  )


def interpreter(interpret: Any) -> Any:
  """What `plgpu.kernel` takes for `interpret`.

  Args:
    interpret: what the user passed.

  Returns:
    The interpreter's parameters; None to compile.
  """
  return plgpu.InterpretGPUParams() if interpret else None
