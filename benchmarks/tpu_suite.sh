#!/usr/bin/env bash
# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
#
# All that a TPU has to be there for: values of the kernels on the device, and the time
# they take beside the cycles that the compiler estimates. On a TPU VM of one host
# (v5litepod-1 to -8, v6e-1 to -8), from a checkout, with no network:
#
#   benchmarks/tpu_suite.sh                     writes tpu_suite.json
#   benchmarks/tpu_suite.sh results.json        or where you say
#   PYTHON=python3.12 benchmarks/tpu_suite.sh   another interpreter
#
# It needs jax 0.10.2 or newer with libtpu, flax, optax, chex, absl-py, scipy,
# hypothesis, pytest and pytest-xdist, and takes at most ten minutes.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$root/benchmarks/tpu_suite.py" "${1:-tpu_suite.json}"
