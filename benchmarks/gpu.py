# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Routing, expert order and experts on an NVIDIA GPU: time on the device.

The profiler says how long every kernel of a call takes; what a table compares
runs in one process. The first row is what the others are to be seen against.

  python benchmarks/gpu.py --json=gpu.json
  python benchmarks/gpu.py --tables=lanes,threshold

Without a GPU it compiles the experts for one that is not here, given what
`pip install '.[aot-gpu]'` brings (Python 3.12 or newer, Linux), and prints memory and
work.

  python benchmarks/gpu.py --target=h100
"""

import dataclasses
import functools
import json
import pathlib
import time
from unittest import mock

import gpu_experts
import gpu_profile
import gpu_report
import jax
import jax.numpy as jnp
import plain
from absl import app, flags

import jaxroute
from jaxroute import dispatch
from jaxroute.aot import gpu
from jaxroute.routing import xla

_TARGET = flags.DEFINE_string(
  "target", "", "A GPU to compile for: h100, b200, a100."
)
_JSON = flags.DEFINE_string("json", "", "Where to write the tables, too.")
_TABLES = flags.DEFINE_list(
  "tables", "routing,experts,lanes,threshold,others", "Which to measure."
)
_SECONDS = flags.DEFINE_integer(
  "seconds", 0, "Begin no measurement after so many; 0 measures all."
)

DENSE, BY_DEFAULT = gpu_experts.DENSE, gpu_experts.BY_DEFAULT
COPY, PLAIN = "copy (x + 1)", "plain JAX"
ROUTE, ORDER = "route, pallas_gpu", "route and order"
SOME = COPY, PLAIN, "route, xla", ROUTE
MOST = *SOME, ORDER
ALL = *MOST, "route and gradient", "plain JAX, with order"

V3 = jaxroute.RouterConfig(
  num_experts=256, top_k=8, num_groups=8, group_top_k=4, scaling_factor=2.5
)
OTHERS = {
  "DeepSeek-V3 with a histogram": dataclasses.replace(V3, histogram=True),
  "softmax, top-6 of 64": jaxroute.RouterConfig(
    num_experts=64, top_k=6, score_fn="softmax"
  ),
  "softmax, top-10 of 512": jaxroute.RouterConfig(
    num_experts=512, top_k=10, score_fn="softmax"
  ),
}
SIZES = gpu_experts.Sizes(d=2048, f=1408)


def inputs(t: int, config: jaxroute.RouterConfig) -> tuple[jax.Array, ...]:
  """Random logits and bias."""
  e = config.num_experts
  logits = jax.random.normal(jax.random.key(0), (t, e))
  return logits, jax.random.normal(jax.random.key(1), (e,)) / 100


def routing(
  t: int, config: jaxroute.RouterConfig, names: tuple[str, ...]
) -> gpu_profile.Candidates:
  """A copy of the logits, plain JAX, and ours in its parts.

  Args:
    t: T.
    config: the router.
    names: of the candidates, in order.

  Returns:
    What `gpu_profile.measure` takes.
  """
  ours = functools.partial(jaxroute.route, implementation="pallas_gpu")

  def order(logits, bias):
    r = ours(logits, bias, config, with_rank=True)
    permutation = dispatch.sort_by_expert(
      r.expert_idx,
      config.num_experts,
      r.token_mask,
      implementation="pallas_gpu",
      rank=r.rank,
      load=r.load,
    )
    return r, permutation

  def gradient(logits, bias):
    weights, pull = jax.vjp(lambda x: ours(x, bias, config).weights, logits)
    return weights, pull(weights)

  functions = {
    COPY: lambda logits, bias: logits + 1,
    PLAIN: lambda *args: plain.route(*args, config)[:3],
    "plain JAX, with order": lambda *args: plain.route(*args, config),
    "route, xla": lambda *args: xla.route(*args, config, None),
    ROUTE: lambda *args: ours(*args, config),
    ORDER: order,
    "route and gradient": gradient,
  }
  args = inputs(t, config)
  return {name: (functions[name], args) for name in names}


def lanes(t: int, counts: tuple[int, ...]) -> gpu_profile.Candidates:
  """The kernel alone, with so many threads a token."""
  from jaxroute.kernels.gpu import route

  args = *inputs(t, V3), jnp.ones(t, jnp.bool_)
  found: gpu_profile.Candidates = {COPY: (lambda logits, *_: logits + 1, args)}
  for count in counts:
    call = functools.partial(route.route, config=V3, lanes=count)
    found[f"{count} threads a token"] = (call, args)
  return found


def xla_forms(t: int) -> gpu_profile.Candidates:
  """The two ways in which the XLA path finds the largest of many and of few keys."""

  def by(few_keys, logits, bias):
    with mock.patch.object(xla, "_FEW_KEYS", few_keys):
      return xla.route(logits, bias, V3, None)

  args = inputs(t, V3)
  return {
    "sorts, as for few": (functools.partial(by, 2**62), args),
    "rounds, as for many": (functools.partial(by, 0), args),
  }


def _v3_title(t: int) -> str:
  return f"DeepSeek-V3, T={t:,}"


def _experts_title(what: str) -> str:
  return f"Experts, {what}, bfloat16, {SIZES}, MaxVio 1"


def _routing_table(
  title: str, t: int, config: jaxroute.RouterConfig, names: tuple[str, ...]
) -> gpu_profile.Table:
  return gpu_profile.Table(title, functools.partial(routing, t, config, names))


def all_tables() -> dict[str, list[gpu_profile.Table]]:
  """A name for --tables to what is measured, in that order."""
  ways: list[str | None] = [None, "pallas_gpu", "batched"]
  experts = functools.partial(gpu_experts.candidates, SIZES, ways)
  return {
    "routing": [
      _routing_table(_v3_title(t), t, V3, names)
      for t, names in ((65_536, ALL), (4_096, ALL), (16, MOST), (128, MOST))
    ],
    "experts": [
      gpu_profile.Table(
        _experts_title("forward"),
        functools.partial(experts, with_gradients=False),
        SIZES.flops,
      ),
      gpu_profile.Table(
        _experts_title("with gradients"),
        functools.partial(experts, with_gradients=True),
        3 * SIZES.flops,
      ),
    ],
    "lanes": [
      gpu_profile.Table(
        f"{_v3_title(t)}, the kernel alone", functools.partial(lanes, t, counts)
      )
      for t, counts in (
        (65_536, (1, 2, 4, 8)),
        (4_096, (2, 4, 8)),
        (16, (4, 8)),
      )
    ],
    "threshold": [
      gpu_profile.Table(
        f"{_v3_title(t)}, XLA path", functools.partial(xla_forms, t)
      )
      for t in (16, 256, 1_024, 4_096, 16_384, 65_536)
    ],
    "others": [
      _routing_table(f"{name}, T={t:,}", t, config, SOME)
      for name, config in OTHERS.items()
      for t in (65_536, 4_096)
    ],
  }


def bars(device: jax.Device) -> list[gpu_report.Bar]:
  """What the kernels are to reach; beside a copy, which is bound by memory, on H100."""
  large, middle, small = map(_v3_title, (65_536, 4_096, 16))
  bar = gpu_report.Bar
  beside_copy = [
    bar(large, ROUTE, COPY, 0.85),
    bar(middle, ROUTE, COPY, 2.6),
    bar(large, ORDER, COPY, 1.2),
    bar(middle, ORDER, COPY, 5),
  ]
  return [
    *(beside_copy if "H100" in device.device_kind else []),
    bar(small, ROUTE, None, 4.5),
    bar(small, ORDER, None, 10),
    bar(large, ROUTE, PLAIN, 35, faster=True),
    bar(middle, ROUTE, PLAIN, 15, faster=True),
    bar(small, ROUTE, PLAIN, 3.5, faster=True),
    *(
      bar(_experts_title(what), BY_DEFAULT, DENSE, 0.45, faster=True)
      for what in ("forward", "with gradients")
    ),
  ]


def measure_all(device: jax.Device) -> None:
  """Measures the tables of --tables; whatever happens, what was measured is kept.

  Args:
    device: the GPU.

  Raises:
    SystemExit: at the end, if something could not be measured.
  """
  deadline = time.monotonic() + (_SECONDS.value or float("inf"))
  report = dict(
    jax=jax.__version__, device=device.device_kind, tables={}, bars=[]
  )

  def save(title, rows):
    report["tables"][title] = rows
    report["bars"] = gpu_report.held(bars(device), report["tables"])
    if _JSON.value:
      # Whoever ends this process finds a whole file.
      whole = pathlib.Path(f"{_JSON.value}.tmp")
      whole.write_text(json.dumps(report, indent=1))
      whole.replace(_JSON.value)

  tables = all_tables()
  for name in _TABLES.value:
    for table in tables[name]:
      gpu_profile.measure(table, deadline, save)
  print(gpu_report.bars_table(report["bars"]), flush=True)
  gpu_profile.check_all_measured(report["tables"], may_refuse=False)


def print_work() -> None:
  """Rows multiplied for each that there is, one column per load."""
  sizes = gpu_experts.Sizes()
  work = gpu_experts.rows_multiplied(sizes)
  columns = ["rows multiplied per row", *work]
  rows = [
    ["batched", *(f"{ratio:.2f}" for ratio in work.values())],
    ["ragged_dot", *(str(sizes.e) for _ in work)],
  ]
  print(gpu_report.markdown(columns, rows), flush=True)


def print_memory() -> None:
  """GB of temporaries on the GPU of the name --target."""
  (device,) = gpu.devices(_TARGET.value)
  sizes = gpu_experts.Sizes()
  print(f"jax {jax.__version__}, {device.device_kind}: SwiGLU, {sizes}\n")
  rows = [
    [name, *(f"{gb:.2f}" for gb in found)]
    for name, found in gpu_experts.temporaries(sizes, device).items()
  ]
  columns = ["temporaries, GB", "bfloat16", "float32"]
  print(gpu_report.markdown(columns, rows), flush=True)


def main(argv: list[str]) -> None:
  del argv
  if _TARGET.value:
    print_memory()
    print_work()
    return
  device = jax.devices()[0]
  if device.platform != "gpu":
    raise app.UsageError(
      f"expected a GPU, found {device.platform}. Give --target to compile for"
      " one that is not here."
    )
  print(f"jax {jax.__version__}, {device.device_kind}\n")
  print_work()
  measure_all(device)


if __name__ == "__main__":
  app.run(main)
