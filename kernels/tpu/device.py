# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The TPU that a program is for: its generation, and the shape of its registers."""

import jax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
"""Columns of a vector register, and of a tile of memory."""

SUBLANES = 8
"""Rows of a vector register of 32-bit numbers."""


def generation() -> int | None:
  """The generation of the TPU that the program being traced is for.

  Returns:
    5 for v5e and v5p, 6 for v6e, 7 for v7x; None if it is for no TPU. That is
    told by the abstract device of the mesh in force
    (`jax.sharding.use_abstract_mesh`) or, if there is none, by the default
    device of the process.
  """
  return pltpu.get_tpu_info().generation if pltpu.is_tpu_device() else None


def num_cores() -> int:
  """How many cores share a program's grid: 2 for v5p, else 1."""
  return pltpu.get_tpu_info().num_cores if pltpu.is_tpu_device() else 1


def gathers_apart() -> bool:
  """Whether XLA gathers rows beside the program, on a SparseCore.

  v5p and newer have one, and libtpu 0.0.50 uses it; 0.0.42 does not.
  """
  if not pltpu.is_tpu_device() or pltpu.get_tpu_info().sparse_core is None:
    return False
  return _has_new_compiler()


def multiplies_groups() -> bool:
  """Whether XLA multiplies rows by their own group alone, also in gradients.

  libtpu 0.0.42 makes of the gradient to the matrices of `jax.lax.ragged_dot` a
  product of every row with every group; 0.0.50 does not.
  """
  return _has_new_compiler()


def _has_new_compiler() -> bool:
  """Whether the compiler is libtpu 0.0.50 or newer.

  jax 0.12 takes such a one. Without a TPU there is no other way to know the
  compiler that a program is for.
  """
  return jax.__version_info__ >= (0, 12)


def unavailable() -> str | None:
  """Why the kernels do not run on the device that the program is for.

  Returns:
    The reason, for an error message; None on v5e, v5p and newer.
  """
  found = generation()
  if found is None:
    return "the program is for no TPU"
  # v4 has no gather along sublanes, and Mosaic does not compile the kernel.
  return (
    None if found >= 5 else f"TPU v5e, v5p or newer is needed, got v{found}"
  )
