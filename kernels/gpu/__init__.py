# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Kernels for NVIDIA GPUs from Hopper on, in Pallas and Mosaic GPU.

`route` is the routing kernel, `order` makes the order of experts from what that
counted; `threads`, `twins` and `device` are what they share. They need jax 0.11.
"""
