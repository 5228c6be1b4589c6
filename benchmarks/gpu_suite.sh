#!/usr/bin/env bash
# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
#
# All that a GPU has to be there for: values on the device, the project's own tests
# there, and times. From a checkout, with no network and nothing to install:
#
#   benchmarks/gpu_suite.sh                     writes gpu_suite.json
#   benchmarks/gpu_suite.sh results.json        or where you say
#   PYTHON=python3.12 benchmarks/gpu_suite.sh   another interpreter
#
# It needs jax 0.11 or newer with its CUDA plugin, flax, optax, chex, absl-py, scipy,
# hypothesis, pytest and pytest-xdist, and takes at most six minutes.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
exec "${PYTHON:-python3}" "$root/benchmarks/gpu_suite.py" "${1:-gpu_suite.json}"
