# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Kernels for TPU, in Pallas and Mosaic.

`route` is the routing kernel, `sort` counts and ranks the assignments of
experts, `scatter` makes gradients of logits, `grouped` multiplies the rows of
experts, `rows` moves them; `registers` and `device` are what they share.
"""
