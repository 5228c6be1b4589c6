# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Kernels for accelerators, importable as `jaxroute.kernels`.

One file per kernel, written in Pallas. A kernel knows only jax: it takes and
returns arrays, and what it means is the plain XLA function that it replaces.
"""
