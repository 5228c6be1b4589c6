# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Pallas kernels for Mosaic GPU, compiled for a GPU that is not here, and run."""

import contextlib
import dataclasses
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import mosaic_gpu as plgpu

from jaxroute.aot import gpu
from ptx import host, machine, memory, program
from ptx.transfers import TensorMap

# Tensor maps lie where no buffer is.
_MAPS = 1 << 30
# Mosaic GPU writes what it compiles, and compiles a kernel once in a process.
_COMPILED: dict[str, "Compiled"] = {}


@dataclasses.dataclass(frozen=True)
class Compiled:
  """What the compiler wrote of a kernel.

  Attributes:
    program: its PTX.
    log: of the passes, from the last on.
  """

  program: program.Program
  log: str


@contextlib.contextmanager
def kernels(
  target: str = "h100",
  change: Callable[[program.Program], program.Program] = lambda code: code,
  seed: int = 0,
) -> Iterator[None]:
  """Within it, kernels run by their PTX, and nothing is jitted.

  Args:
    target: a GPU of `jaxroute.aot.gpu`, the same for all of a process.
    change: of a program, before it runs.
    seed: of the order in which blocks and warps run.
  """
  real = plgpu.kernel

  def kernel(body: Any, out_type: Any, **kwargs: Any) -> Callable[..., Any]:
    compiled_later = real(body, out_type=out_type, **kwargs)
    is_one = not isinstance(out_type, Sequence)

    def call(*operands: Any) -> Any:
      types = [out_type] if is_one else out_type
      compiled = functools.partial(_compile, target, compiled_later)
      results = _call(compiled, types, operands, change, seed)
      return results[0] if is_one else tuple(results)

    return call

  with mock.patch.object(plgpu, "kernel", kernel), jax.disable_jit():
    yield


def _call(
  compile_for: Callable[..., Compiled],
  out_type: Sequence[jax.ShapeDtypeStruct],
  operands: Sequence[Any],
  change: Callable[[program.Program], program.Program],
  seed: int,
) -> list[jax.Array]:
  """Its results; operands that are references are written."""
  is_ref = [isinstance(x, jax.Ref) for x in operands]
  values = [
    np.asarray(x[...] if r else x)
    for x, r in zip(operands, is_ref, strict=True)
  ]
  compiled = compile_for(values, is_ref)
  ram = memory.Global()
  inputs = [ram.add(value) for value in values]
  outputs = [
    ram.add_garbage(int(np.prod(t.shape)) * t.dtype.itemsize) for t in out_type
  ]
  _launch(compiled, change, inputs + outputs, ram, seed)

  def read(address: int, like: Any) -> jax.Array:
    found = ram.read(address).view(like.dtype)
    return jnp.asarray(found.reshape(like.shape))

  for x, address in zip(operands, inputs, strict=True):
    if isinstance(x, jax.Ref):
      x[...] = read(address, x)
  return [read(*pair) for pair in zip(outputs, out_type, strict=True)]


def _compile(
  target: str,
  kernel: Callable[..., Any],
  values: list[np.ndarray],
  is_ref: list[bool],
) -> Compiled:
  """Compiles a kernel for operands like these."""

  def function(*arrays: jax.Array) -> Any:
    operands = [
      jax.new_ref(x) if r else x for x, r in zip(arrays, is_ref, strict=True)
    ]
    results = kernel(*operands)
    return results, [x[...] for x, r in zip(operands, is_ref, strict=True) if r]

  shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in values]
  with tempfile.TemporaryDirectory() as folder, jax.disable_jit(False):
    lowered = (
      jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))
    )
    found = re.search(r"backend_config = .*", lowered.as_text())
    assert found is not None
    if found[0] not in _COMPILED:
      with mock.patch.dict(os.environ, MOSAIC_GPU_DUMP_TO=folder):
        gpu.compile_for(target, function, *shapes)
      (path,) = pathlib.Path(folder).glob("*.ptx")
      log = path.with_suffix(".mlir-passes.log").read_text()
      _COMPILED[found[0]] = Compiled(
        program.parse(path.read_text()), log[log.rindex("// -----// IR Dump") :]
      )
    return _COMPILED[found[0]]


def _launch(
  compiled: Compiled,
  change: Callable[[program.Program], program.Program],
  buffers: list[int],
  ram: memory.Global,
  seed: int,
) -> None:
  """Runs a kernel on buffers, as the host's code launches it."""
  code = change(compiled.program)
  launch = host.launch(compiled.log, code.name, buffers)
  maps: dict[int, TensorMap] = {}
  params: dict[str, int] = {}
  for name, param in zip(code.params, launch.params, strict=True):
    next_map = _MAPS + host.TMA_BYTES * len(maps)
    if isinstance(param, int):
      params[name] = param
    else:
      params[name] = next_map
      for i, tensor in enumerate(param):
        maps[next_map + host.TMA_BYTES * i] = tensor
  machine.Launch(
    program=code,
    grid=launch.grid,
    cluster=max(launch.cluster[0], 1),
    shared_bytes=launch.shared_bytes,
    params=params,
    maps=maps,
    memory=ram,
    seed=seed,
  ).run()
