# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Compiles for an NVIDIA GPU that is not here, and reads what the compilers say.

XLA and Mosaic GPU, Pallas' compiler for Hopper and newer, need no GPU and no
CUDA toolkit: `pip install '.[aot-gpu]'` brings them, with the assembler
and disassembler they call. The same versions give the same figures every time;
they are no measurements.

  program = gpu.report("h100", function, *shapes)

compiles and reads in this process: once for each kernel, and for one target, as
the compilers keep what they compiled. `process.apart` runs a function in a process
of its own.
"""

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from typing import Any

import jax
from jax.experimental import topologies

from jaxroute.aot import gpu_sass

# These fields of `GpuTargetConfigProto` differ between the GPUs. They are copied from
# XLA's xla/backends/gpu/target_config/specs: h100_sxm, b200 and a100_sxm_80.
TARGETS: dict[str, dict[str, Any]] = {
  "h100": dict(
    name="NVIDIA H100 80GB HBM3",
    capability="major: 9 feature_extension: ACCELERATED_FEATURES",
    core_count=132,
    fpus_per_core=128,
    clock_rate_ghz=1.98,
    memory_bandwidth=3352320000000,
    device_memory_size=84942979072,
    l2_cache_size=52428800,
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
  ),
  "b200": dict(
    name="NVIDIA B200",
    capability="major: 10 feature_extension: ACCELERATED_FEATURES",
    core_count=148,
    fpus_per_core=128,
    clock_rate_ghz=1.965,
    memory_bandwidth=7672320000000,
    device_memory_size=191514411008,
    l2_cache_size=132644864,
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
  ),
  # Older than the kernels: only XLA compiles for it.
  "a100": dict(
    name="NVIDIA A100-SXM4-80GB",
    capability="major: 8 feature_extension: NONE",
    core_count=108,
    fpus_per_core=64,
    clock_rate_ghz=1.41,
    memory_bandwidth=2039040000000,
    device_memory_size=85100068864,
    l2_cache_size=41943040,
    shared_memory_per_core=167936,
    shared_memory_per_block_optin=166912,
  ),
}
"""GPU by name: fields of its description."""

_REGISTERS_PER_CORE = 65536
_THREADS_PER_CORE = 2048
_BLOCKS_PER_CORE = 32
# The driver takes so much of the shared memory for every block.
_RESERVED_PER_BLOCK = 1024

# Thunks that only hold others.
_CONTAINERS = ("kSequential", "kCommandBuffer", "kWhile", "kConditional")


@dataclasses.dataclass(frozen=True)
class Kernel:
  """What the compilers say of one Mosaic GPU kernel.

  Attributes:
    name: of its body.
    threads: of a block.
    registers: of a thread.
    spills: bytes that a thread spills, stores and loads.
    shared_memory: bytes of a block.
    blocks_per_core: that registers and shared memory leave room for.
    barriers: `bar.sync` in the PTX.
    instructions: machine instructions that a warp executes, counted by
      `gpu_sass.executed`; None if that depends on data.
    sass: its machine code, with what the assembler tells the core.
  """

  name: str
  threads: int
  registers: int
  spills: int
  shared_memory: int
  blocks_per_core: int
  barriers: int
  instructions: int | None
  sass: str = dataclasses.field(repr=False)


@dataclasses.dataclass(frozen=True)
class Program:
  """What the compilers say of one program.

  Attributes:
    launches: kernels, copies and fills of one call, by XLA's list of thunks. A
      loop counts once, a conditional by all its branches.
    moved: bytes of arguments and results.
    temporaries: bytes.
    kernels: of Mosaic GPU, in the order in which they were compiled.
  """

  launches: int
  moved: int
  temporaries: int
  kernels: tuple[Kernel, ...]


def missing() -> str:
  """Why nothing can be compiled for a GPU here, and how to mend it; or ""."""
  if jax.__version_info__ < (0, 11):
    return (
      f"compiling for a GPU that is not here needs jax 0.11, found"
      f" {jax.__version__}; it needs Python 3.12"
    )
  mend = "pip install jaxroute[aot-gpu]"
  try:
    found = importlib.metadata.version("jax-cuda13-plugin")
  except importlib.metadata.PackageNotFoundError:
    return f"jax-cuda13-plugin, XLA for NVIDIA GPUs, is not installed: {mend}"
  if found != jax.__version__:
    return (
      f"jax-cuda13-plugin {found} is not that of jax {jax.__version__}:"
      f" pip install jax-cuda13-plugin=={jax.__version__}"
    )
  for name in ("ptxas", "nvdisasm"):
    if _tool(name) is None:
      return f"{name} is not found: {mend}"
  return ""


def versions() -> str:
  """The versions of jax and of the assembler, which decide what is compiled."""
  ptxas = _tool("ptxas")
  assert ptxas is not None
  said = subprocess.check_output([ptxas, "--version"], text=True)
  found = re.search(r"\bV([\d.]+)", said)
  assert found is not None, said
  return f"jax {jax.__version__}, ptxas {found[1]}"


def devices(target: str, number: int = 1) -> list[jax.Device]:
  """GPUs that are not here.

  Args:
    target: a key of `TARGETS`.
    number: how many.

  Returns:
    Devices to compile for.

  Raises:
    RuntimeError: with the words of `missing`.
  """
  if why := missing():
    raise RuntimeError(why)
  # XLA looks for the CUDA libraries unless told not to.
  os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
  # The assembler on PATH is taken first: let it be that of the wheel.
  if wheel := _wheel_folder():
    os.environ["PATH"] = os.pathsep.join((str(wheel), os.environ["PATH"]))
  return topologies.get_topology_desc(
    platform="cuda",
    topology_name="",
    topology=f"1x1x{number}",
    target_config=_description(**TARGETS[target]),
  ).devices


def compile_for(
  target: str,
  function: Callable[..., Any],
  *shapes: jax.ShapeDtypeStruct,
  dump_to: str = "",
) -> jax.stages.Compiled:
  """Compiles a function for a GPU that is not here.

  Args:
    target: a key of `TARGETS`.
    function: of arrays.
    *shapes: of its arguments.
    dump_to: a folder for what the compilers write.

  Returns:
    The compiled program, which cannot be run.

  Raises:
    RuntimeError: with the words of `missing`.
  """
  sharding = jax.sharding.SingleDeviceSharding(devices(target)[0])
  placed = [
    jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding) for s in shapes
  ]
  traced = jax.jit(function).trace(*placed)
  return traced.lower(lowering_platforms=("cuda",)).compile(
    compiler_options={"xla_dump_to": dump_to} if dump_to else {}
  )


def report(
  target: str, function: Callable[..., Any], *shapes: jax.ShapeDtypeStruct
) -> Program:
  """Compiles a function for a GPU that is not here, and reads the compilers.

  A process has to do so once for a kernel, and for one target: see `process.apart`.

  Args:
    target: a key of `TARGETS`.
    function: of arrays.
    *shapes: of its arguments.

  Returns:
    `Program`.

  Raises:
    RuntimeError: with the words of `missing`.
  """
  # Only the compiler is asked. Tests switch optimizations off, and what is in
  # the cache is not compiled.
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_disable_most_optimizations", False)
  jax.config.update("jax_enable_compilation_cache", False)
  with tempfile.TemporaryDirectory() as folder:
    os.environ["MOSAIC_GPU_DUMP_TO"] = folder
    try:
      compiled = compile_for(target, function, *shapes, dump_to=folder)
    finally:
      del os.environ["MOSAIC_GPU_DUMP_TO"]
    memory = compiled.memory_analysis()
    assert memory is not None
    return Program(
      launches=_launches(pathlib.Path(folder)),
      moved=memory.argument_size_in_bytes + memory.output_size_in_bytes,
      temporaries=memory.temp_size_in_bytes,
      kernels=_kernels(pathlib.Path(folder), TARGETS[target]),
    )


def _wheel_folder() -> pathlib.Path | None:
  """Where the wheels put the programs of CUDA, if they are installed."""
  try:
    spec = importlib.util.find_spec("nvidia.cu13")
  except ModuleNotFoundError:
    return None
  for folder in (spec.submodule_search_locations if spec else None) or ():
    if (pathlib.Path(folder) / "bin" / "ptxas").exists():
      return pathlib.Path(folder) / "bin"
  return None


def _tool(name: str) -> str | None:
  """The path of a program of CUDA: of the wheel if that is installed."""
  wheel = _wheel_folder()
  return shutil.which(name, path=str(wheel)) if wheel else shutil.which(name)


def _description(capability: str, name: str, **sizes: Any) -> str:
  """A `GpuTargetConfigProto` as text."""
  fields = "\n".join(f"  {key}: {value}" for key, value in sizes.items())
  return f"""
gpu_device_info {{
  name: "{name}"
  cuda_compute_capability {{ {capability} }}
{fields}
  threads_per_block_limit: 1024
  threads_per_warp: 32
  threads_per_core_limit: {_THREADS_PER_CORE}
  registers_per_core_limit: {_REGISTERS_PER_CORE}
  registers_per_block_limit: {_REGISTERS_PER_CORE}
  shared_memory_per_block: 49152
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
  cub_version: "3.1.2"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 12 }}
device_description_str: "{name}"
"""


def _launches(folder: pathlib.Path) -> int:
  """How much XLA launches in one call, by the list that it wrote."""
  (path,) = folder.glob("*.thunk_sequence.txt")
  kinds = re.findall(r"^\s*\d+: (k\w+)", path.read_text(), re.MULTILINE)
  return sum(kind not in _CONTAINERS for kind in kinds)


def _kernels(folder: pathlib.Path, gpu: dict[str, Any]) -> tuple[Kernel, ...]:
  """What Mosaic GPU wrote of its kernels."""
  kernels = []
  for path in sorted(folder.glob("*.ptx"), key=lambda p: p.stat().st_mtime_ns):
    ptx, said, log, sass = (
      path.with_suffix(suffix).read_text()
      for suffix in (".ptx", ".ptxas", ".mlir-passes.log", ".sass_ctrl")
    )
    threads = int(_find(r"\.maxntid (\d+)", ptx))
    registers = int(_find(r"Used (\d+) registers", said))
    dynamic = int(_find(r"dynamic_shared_memory_size %c(\d+)_i32", log))
    static = re.search(r"(\d+) bytes smem", said)
    shared = dynamic + int(static[1] if static else 0)
    # Registers are given out to warps, by 256.
    of_block = threads // 32 * (-(-registers * 32 // 256) * 256)
    room = (
      _REGISTERS_PER_CORE // of_block,
      gpu["shared_memory_per_core"] // (shared + _RESERVED_PER_BLOCK),
      _THREADS_PER_CORE // threads,
      _BLOCKS_PER_CORE,
    )
    kernels.append(
      Kernel(
        name=_find(r"\.entry (\w+)\(", ptx).removesuffix("_mosaic_gpu_kernel"),
        threads=threads,
        registers=registers,
        spills=sum(map(int, re.findall(r"(\d+) bytes spill", said))),
        shared_memory=shared,
        blocks_per_core=min(room),
        barriers=len(re.findall(r"\bbar\.sync\b", ptx)),
        instructions=_instructions(sass),
        sass=sass,
      )
    )
  return tuple(kernels)


def _instructions(sass: str) -> int | None:
  try:
    return gpu_sass.executed(sass)
  except ValueError:
    return None


def _find(pattern: str, text: str) -> str:
  """The group of the first match."""
  found = re.search(pattern, text)
  if found is None:
    raise RuntimeError(
      f"expected {pattern} in what the compiler wrote, got {text[:200]!r}"
    )
  return found[1]
