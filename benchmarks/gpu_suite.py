# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs tests and measurements on a GPU, each for so long; see gpu_suite.sh."""

import contextlib
import os
import pathlib
import subprocess
import sys

import device_suite

_CORES = os.cpu_count() or 1
# What a layer and a step are made of; but experts as no GPU takes them.
NOT_OWN = "tiled or ragged_dot"
OWN = tuple(
  f"tests/{name}_test.py"
  for name in (
    "routing_api",
    "routing_weights",
    "routing_bias_histogram",
    "routing_float_keys",
    "scores",
    "dispatch_api",
    "dispatch_permute",
    "experts_api",
    "experts_batched",
    "experts_transforms",
    "layer",
    "layer_local_moe",
    "losses",
    "step",
    "dual_rules",
  )
)


def _driver() -> dict[str, str]:
  """The driver, the highest clock and the power limit, if nvidia-smi is there."""
  with contextlib.suppress(OSError):
    query = [
      "nvidia-smi",
      "--query-gpu=driver_version,clocks.max.sm,power.limit",
    ]
    answer = subprocess.run(
      [*query, "--format=csv,noheader"], capture_output=True, text=True
    )
    return {"driver, clock, power": answer.stdout.strip()}
  return {}


SUITE = device_suite.Suite(
  name="gpu_suite",
  platform="gpu",
  environment={
    "JAX_PLATFORMS": "cuda",
    # No process takes all memory.
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
  },
  # Tuning takes longer than the small products of a test.
  tests_environment={"XLA_FLAGS": "--xla_gpu_autotune_level=0"},
  packages=("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax"),
  needs="Run it where `nvidia-smi` shows one, in a Python with JAX's CUDA plugin:"
  " pip install 'jax[cuda13]'.",
  tests={
    "kernels": device_suite.Tests(
      choice=["-m", "gpu", *device_suite.marked_files("gpu")],
      workers=max(_CORES // 3, 1),
    ),
    "own_tests": device_suite.Tests(
      choice=["-m", "not gpu", "-k", f"not ({NOT_OWN})", *OWN],
      workers=max(2 * _CORES // 3, 1),
      left_out=NOT_OWN,
    ),
  },
  tests_limit=150,
  times="benchmarks/gpu.py",
  times_limit=150,
  describe=_driver,
)

if __name__ == "__main__":
  device_suite.run(SUITE, pathlib.Path(sys.argv[1]).absolute())
