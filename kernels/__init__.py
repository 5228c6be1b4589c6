# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Kernels for accelerators, importable as `jaxroute.kernels`.

One folder for each kind of accelerator, and `networks`, which they share. A kernel
knows jax and
`jaxroute.types`: it takes and returns arrays, and what it means is the XLA
function that it replaces.
"""
