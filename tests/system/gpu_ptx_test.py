# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Kernels as they are compiled, run by their PTX: values, races, hangs."""

import dataclasses
import functools

import conformance
import device_cases
import gpu_mesh
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from ptx import emulate, memory

import jaxroute
from jaxroute.aot import gpu, process
from jaxroute.kernels.gpu import device, grouped, order
from jaxroute.kernels.gpu import route as kernel
from jaxroute.kernels.gpu.route import lanes

pytestmark = [
  gpu_mesh.needs_kernels,
  pytest.mark.skipif(bool(gpu.missing()), reason=gpu.missing()),
]

# Numbers of threads for a token, dtypes, families; the others are for `--all`.
_FIRST = (
  "V3, T=1",
  "V3, T=17003",
  "sigmoid, 6 of 60",
  "softmax + bias in logits, float16",
)


def _first(names, first):
  return [
    name if name in first else pytest.param(name, marks=pytest.mark.long)
    for name in names
  ]


def _assert_routes_as_xla_does(name, tokens, seeds, target="h100"):
  case = device_cases.CASES[name]
  config = case.config
  threads = lanes.choose(config, case.t, jnp.dtype(case.dtype))
  # Of many tokens the first are enough, on as many threads each.
  case = dataclasses.replace(case, t=min(case.t, tokens))

  @jax.jit
  def by_xla(*args):
    logits, bias, mask = args
    route = functools.partial(jaxroute.route, implementation="xla")
    return conformance.with_selection(route)(logits, bias, config, mask)

  for seed in range(seeds):
    args = case.inputs(seed)
    with emulate.kernels(target, seed=seed):
      out = kernel.route(*args, config=config, lanes=threads, with_rank=True)
    ours = conformance.routing_of(out)
    # The last bits of its exponentials are not a GPU's.
    device_cases.assert_routed_alike(ours, *by_xla(*args), config, exact=False)
    np.testing.assert_array_equal(
      out.rank, oracle.ranks(*map(np.asarray, (out.expert_idx, out.token_mask)))
    )


@pytest.mark.parametrize("name", _first(device_cases.CASES, _FIRST))
def test_the_compiled_kernel_routes_as_xla_does(name):
  _assert_routes_as_xla_does(name, tokens=40, seeds=2)


@pytest.mark.parametrize(
  "threads", (8, pytest.param(1, marks=pytest.mark.long))
)
@pytest.mark.parametrize(
  "name",
  _first(
    ("V3, T=15", "sigmoid, 8 of 384", "megatron, 4 groups of 16"), ("V3, T=15",)
  ),
)
def test_the_compiled_histogram_is_that_of_xla(name, threads):
  case = device_cases.CASES[name]
  config = dataclasses.replace(case.config, histogram=True)
  # Of several tiles.
  case = dataclasses.replace(case, t=40 if threads == 8 else 200)
  logits, bias, mask = case.inputs(seed=0)
  theirs = jaxroute.route(logits, bias, config, mask, implementation="xla")
  with emulate.kernels():
    ours = kernel.route(logits, bias, mask, config=config, lanes=threads)
  np.testing.assert_array_equal(ours.histogram, theirs.counts.histogram)
  np.testing.assert_array_equal(ours.load, theirs.load)


@pytest.mark.parametrize(
  "name", _first(("V3, bfloat16", "sqrtsoftplus, 8 of 256"), ("V3, bfloat16",))
)
def test_on_blackwell_too(name):
  # A process compiles for one target only.
  process.apart(_assert_routes_as_xla_does, name, 40, 1, "b200")


_BARRIERS = "bar.sync", "bar.warp.sync", "mbarrier.try_wait", "mbarrier.init"


def test_zeros_of_both_signs_tie():
  logits, config = device_cases.zeros_of_both_signs(), device_cases.ZEROS
  theirs = jaxroute.route(logits, None, config, implementation="xla")
  for threads in (1, 8):
    with emulate.kernels():
      ours = kernel.route(logits, None, None, config=config, lanes=threads)
    np.testing.assert_array_equal(ours.expert_idx, theirs.expert_idx)
    np.testing.assert_array_equal(ours.load, theirs.load)
    np.testing.assert_array_equal(ours.cutoff, theirs.cutoff)


def test_no_barrier_of_the_routing_kernel_is_idle():
  case = device_cases.CASES["V3, T=15"]
  found = []

  def without(number, code):
    """The program without one of its barriers."""
    if "_route_" not in code.name:
      return code
    found[:] = [
      at
      for at, instruction in enumerate(code.instructions)
      if instruction.name.startswith(_BARRIERS)
    ]
    if number is None:
      return code
    instructions = list(code.instructions)
    idle = dataclasses.replace(
      instructions[found[number]], name="prefetch", operands=(), guard=None
    )
    if idle.text.startswith("mbarrier.try_wait"):
      target = instructions[found[number]].operands[0]
      idle = dataclasses.replace(
        idle, name="setp.eq.u32", operands=(target, "0", "0")
      )
    instructions[found[number]] = idle
    return dataclasses.replace(code, instructions=tuple(instructions))

  def run(number):
    with emulate.kernels(change=functools.partial(without, number)):
      kernel.route(*case.inputs(0), config=case.config, with_rank=True)

  run(None)
  assert len(found) >= 6
  for number in range(len(found)):
    with pytest.raises(memory.Fault):
      run(number)


@pytest.mark.parametrize("capacity", (None, 5))
def test_the_compiled_order_is_that_of_a_sort(capacity):
  t, e, k = 300, 130, 4
  rng = np.random.default_rng(0)
  keys = rng.random((t, e)) + np.arange(e) / e
  expert_idx = np.argsort(keys)[:, :k].astype(np.int32)
  mask = rng.random(t) < 0.8
  load = np.bincount(expert_idx[mask].ravel(), minlength=e).astype(np.int32)
  ranks = oracle.ranks(expert_idx, mask).reshape(-1)
  with emulate.kernels():
    sizes, permutation, inverse = order.order(
      *(expert_idx.reshape(-1), ranks, load, mask),
      top_k=k,
      capacity=capacity,
      interpret=False,
    )
  expected, _, group_sizes = oracle.sort_by_expert(
    expert_idx, e, mask, capacity
  )
  rows = group_sizes.sum()
  np.testing.assert_array_equal(sizes, group_sizes)
  np.testing.assert_array_equal(permutation[:rows], expected[:rows])
  np.testing.assert_array_equal(permutation[inverse], np.arange(t * k))


# Group sizes and N. There are two cores, or pairs, and each makes several tiles.
_LAYOUTS = {
  "ragged": ((0, 131, 0, 1, 2, 60, 0, 70), 304),
  "full": ((128, 64, 136), 328),
  "small": ((3,) * 20, 128),
  "empty": ((0, 0), 136),
}
_PRODUCTS = {
  "ragged": (128, 320, None),
  "full": (320, 192, None),
  "small": (128, 128, None),
  "empty": (128, 128, None),
  "ragged, tiles of 128 x 128": (192, 320, grouped.Tiling(128, 128, 3, 1)),
  "ragged, two stages": (320, 192, grouped.Tiling(128, 256, 2)),
  # Of a pair the second may be past the end.
  "ragged, in pairs": (320, 320, grouped.Tiling(128, 128, 3, None, 2)),
  "full, in pairs": (192, 512, grouped.Tiling(128, 256, 4, None, 2)),
  "empty, in pairs": (128, 128, grouped.Tiling(128, 128, 4, None, 2)),
}


def _integers(seed, *shape):
  """Small ones: their sums are exact."""
  rng = np.random.default_rng(seed)
  return rng.integers(-3, 4, size=shape).astype(np.float32)


@pytest.mark.parametrize("name", _first(_PRODUCTS, ("ragged",)))
@pytest.mark.parametrize("product", ("matmul", "transposed", "outer"))
def test_the_compiled_products_are_exact(name, product, monkeypatch):
  d, f, tiling = _PRODUCTS[name]
  cores = 2 * tiling.cluster if tiling else 2
  monkeypatch.setattr(device, "num_cores", lambda: cores)
  sizes, n = _LAYOUTS[name.partition(",")[0]]
  sizes, dtype = np.array(sizes, np.int32), jnp.bfloat16
  lhs = _integers(0, n, d)
  static = dict(dtype=jnp.float32, tiling=tiling)
  if product == "outer":
    rhs, ends = _integers(1, n, f), np.cumsum(sizes)
    parts = zip(ends - sizes, ends, strict=True)
    expected = np.stack([lhs[a:b].T @ rhs[a:b] for a, b in parts])
    rhs[sum(sizes) :] = np.nan
    function = grouped.outer
  else:
    rhs = _integers(1, len(sizes), d, f)
    expected = oracle.grouped_matmul(lhs, rhs, sizes)
    rhs = rhs.mT if product == "transposed" else rhs
    static |= dict(transpose_rhs=product == "transposed")
    function = grouped.matmul
  lhs[sum(sizes) :] = np.nan
  operands = jnp.asarray(lhs, dtype), jnp.asarray(rhs, dtype)
  with emulate.kernels():
    actual = function(*operands, jnp.asarray(sizes), **static)
  np.testing.assert_array_equal(actual, expected)
