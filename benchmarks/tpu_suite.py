# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Runs tests and measurements on a TPU, each for so long; see tpu_suite.sh."""

import pathlib
import sys

import device_suite

SUITE = device_suite.Suite(
  name="tpu_suite",
  platform="tpu",
  environment={"JAX_PLATFORMS": "tpu"},
  packages=("jax", "jaxlib", "libtpu", "flax"),
  needs="Run it on a TPU VM of one host, where no other process uses the TPU, in a"
  " Python with libtpu: pip install 'jax[tpu]'.",
  tests={
    # A TPU belongs to one process.
    "kernels": device_suite.Tests(
      choice=["-m", "tpu", *device_suite.marked_files("tpu")], workers=1
    ),
  },
  tests_limit=300,
  times="benchmarks/tpu.py",
  times_limit=270,
)

if __name__ == "__main__":
  device_suite.run(SUITE, pathlib.Path(sys.argv[1]).absolute())
