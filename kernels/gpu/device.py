# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The GPU that a program is for: its compute capability."""

import jax

# What an abstract device tells of a GPU is its name.
_CAPABILITIES = {
  "H100": (9, 0),
  "H200": (9, 0),
  "H800": (9, 0),
  "H20": (9, 0),
  "GH200": (9, 0),
  "B100": (10, 0),
  "B200": (10, 0),
  "GB200": (10, 0),
  "B300": (10, 3),
  "GB300": (10, 3),
}


def capability() -> tuple[int, int] | None:
  """The compute capability of the GPU that the program being traced is for.

  Returns:
    `(9, 0)` for an H100; None if the program is for no GPU, or for one that is not
    known by its name. That is told by the abstract device of the mesh in force
    (`jax.sharding.use_abstract_mesh`) or, if there is none, by the default device of
    the process.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None:
    words = abstract.device_kind.replace("-", " ").split()
    found = [_CAPABILITIES[word] for word in words if word in _CAPABILITIES]
    return found[0] if found and "NVIDIA" in words else None
  device = jax.devices()[0]
  if device.platform != "gpu":
    return None
  major, _, minor = str(device.compute_capability).partition(".")
  if not major.isdigit():  # one of AMD's
    return None
  return int(major), int(minor or 0)


def unavailable() -> str | None:
  """Why the kernels do not run on the device that the program is for.

  Returns:
    The reason, for an error message; None on Hopper and on Blackwell for data
    centres.
  """
  found = capability()
  if found is None:
    return "the program is for no NVIDIA GPU"
  # For others the compiler does not say no: it ends the process.
  if found[0] not in (9, 10):
    number = ".".join(map(str, found))
    return f"compute capability 9.x or 10.x is needed, got {number}"
  return too_old()


def too_old() -> str | None:
  """Why this version of JAX has no such kernels, or None."""
  version = jax.__version_info__
  if version >= (0, 11):
    return None
  return f"jax 0.11 or newer is needed, got {jax.__version__}"


def num_cores() -> int:
  """Streaming multiprocessors of the GPU that the program is for.

  Returns:
    Those of the abstract device of the mesh in force or, if there is none, of the
    default device; of a full H100 or H200 where that is no GPU.
  """
  abstract = jax.sharding.get_abstract_mesh().abstract_device
  if abstract is not None and abstract.num_cores:
    return abstract.num_cores
  return getattr(jax.devices()[0], "core_count", None) or 132
