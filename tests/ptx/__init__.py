# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Kernels for NVIDIA GPUs run by their PTX, on a CPU: `emulate.kernels`.

Pallas's interpreter runs what a kernel says; this runs what the compiler made of it, so
that layouts, swizzles, inline PTX and barriers count. It finds wrong values, races,
barriers that not all reach, reads of what was not waited for, and accesses outside of
memory. It does not know ptxas and the machine below it, time, or the last bits of
approximate instructions.

  program.py       text -> instructions
  host.py          the host's code -> parameters, tensor maps, blocks
  machine.py       clusters, blocks and warps
  instructions.py  what each does; arithmetic.py, to numbers
  barriers.py      of a cluster, of a block, of a warp, and in shared memory
  memory.py        global and shared, and who touched it
  transfers.py     copies of boxes; tensor_cores.py, products
"""
