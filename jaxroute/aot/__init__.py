# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a program costs on chips that are not here, by their own compilers.

  python -m jaxroute.aot route --preset=deepseek_v3 --tokens=8192 --topology=v6e:2x2
  python -m jaxroute.aot layer --preset=deepseek_v3 --tokens_per_chip=4096 \\
    --topology=v6e:16x16 --mesh=data=16,expert=16 --grad

The compilers of TPUs and of NVIDIA GPUs run on a CPU: `pip install libtpu`,
`pip install '.[aot-gpu]'`. What they say is exact and the same every time,
but nothing of it is a measurement.

  chips.py        the chips, and meshes of them
  tpu.py          libtpu: where it is, cycles, memory that does not suffice
  gpu.py          XLA and Mosaic GPU: kernels, launches
  collectives.py  the collectives of a compiled program, by mesh axis
  network.py      how long they take at the rates of the links
  route.py        the report on one call of `jaxroute.route`
  layer.py        the report on one layer on a mesh
"""
