# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a program costs on chips that are not here, by their own compilers.

  python -m jaxroute.aot route --preset=deepseek_v3 --tokens=8192 --topology=v6e:2x2
  python -m jaxroute.aot layer --preset=deepseek_v3 --tokens_per_chip=4096 \\
    --topology=v6e:16x16 --mesh=data=16,expert=16 --grad
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
from absl import app, flags

from jaxroute import presets
from jaxroute.aot import chips, gpu, layer, route, tpu

_PRESET = flags.DEFINE_string(
  "preset", "deepseek_v3", f"A model: {', '.join(presets.PRESETS)}."
)
_TOPOLOGY = flags.DEFINE_string(
  "topology", "v6e:2x2", "Chips, such as v6e:16x16, v5p:8x16x16, h100:8, b200."
)
_TOKENS = flags.DEFINE_integer("tokens", 8192, "Of `route`: T, on one device.")
_TOKENS_PER_CHIP = flags.DEFINE_integer(
  "tokens_per_chip", 4096, "Of `layer`: of each device."
)
_MESH = flags.DEFINE_string(
  "mesh",
  "",
  "Of `layer`: sizes of its axes, such as data=16,expert=16. Tokens are sharded"
  " over both, experts over the second. By default all devices are on that.",
)
_GRAD = flags.DEFINE_bool("grad", False, "Of `layer`: with its gradients.")
_EXCHANGE = flags.DEFINE_string(
  "exchange", None, "Of `layer`: as in `jaxroute.Partition`."
)
_BUFFER_FACTOR = flags.DEFINE_float(
  "buffer_factor", None, "Of `layer`: as in `jaxroute.Partition`."
)
_DROP = flags.DEFINE_bool(
  "drop", False, "Of `layer`: as in `jaxroute.Partition`."
)
_EXPERTS = flags.DEFINE_string(
  "experts_implementation", None, "Of `layer`: as in `jaxroute.layer.moe`."
)
_JSON = flags.DEFINE_bool("json", False, "Print one JSON object.")

# Flags that only one command has.
_OF = {
  "route": (_TOKENS,),
  "layer": (
    _TOKENS_PER_CHIP,
    _MESH,
    _GRAD,
    _EXCHANGE,
    _BUFFER_FACTOR,
    _DROP,
    _EXPERTS,
  ),
}


def main(argv: list[str]) -> None:
  jax.config.update("jax_platforms", "cpu")
  commands = {"route": _route, "layer": _layer}
  try:
    if len(argv) != 2 or argv[1] not in commands:
      raise ValueError(
        f"expected one command, of {', '.join(commands)}, got {argv[1:]}."
      )
    _check_flags(argv[1])
    preset = presets.get(_PRESET.value)
    devices = chips.devices(_TOPOLOGY.value)
    commands[argv[1]](preset, devices)
  except (ValueError, NotImplementedError, RuntimeError) as error:
    if isinstance(error, jax.errors.JaxRuntimeError):
      # A layer that does not fit ends in a report, and not here.
      lacking = tpu.lacking(error)
      if lacking is None:
        raise
      needed, there = (f"{size / 1e9:.1f} GB" for size in lacking)
      error = (
        f"the program needs {needed} of the chip's {there}: take fewer tokens."
      )
    print(f"jaxroute.aot: {error}", file=sys.stderr)
    sys.exit(2)


def _check_flags(command: str) -> None:
  """Raises ValueError if a flag was given that only the other command has."""
  for other in _OF.keys() - {command}:
    given = [f"--{flag.name}" for flag in _OF[other] if flag.present]
    if given:
      raise ValueError(
        f"{', '.join(given)} is of `{other}`, got the command {command!r}. Leave it"
        " out, or take the other command."
      )


def _check_tokens(flag: flags.FlagHolder, preset: presets.Preset) -> None:
  """Raises ValueError unless the rows of a device can be counted in int32."""
  most = (2**31 - 1) // preset.config.top_k
  if not 1 <= flag.value <= most:
    at_least = "at least 1" if flag.value < 1 else f"at most {most}"
    raise ValueError(f"`{flag.name}` must be {at_least}, got {flag.value}.")


def _versions() -> str:
  """Of what compiles, which decide the figures."""
  if chips.chip(_TOPOLOGY.value).platform == "tpu":
    return f"jax {jax.__version__}, libtpu {tpu.version()}"
  return gpu.versions()


def _route(preset: presets.Preset, devices: list[jax.Device]) -> None:
  _check_tokens(_TOKENS, preset)
  found = {
    name: route.report(preset, _TOKENS.value, _TOPOLOGY.value, name)
    for name in route.implementations(_TOPOLOGY.value)
  }
  if _JSON.value:
    _print_json(found, _OF["route"])
    return
  print(
    f"{_PRESET.value}, {_TOKENS.value} tokens, one {devices[0].device_kind};"
    f" {_versions()}\n"
  )
  kernel, xla = found.values()
  print(_row("", *found))
  for name in kernel:
    print(_row(name, *(_number(x.get(name)) for x in (kernel, xla))))


def _layer(preset: presets.Preset, devices: list[jax.Device]) -> None:
  sizes = chips.parse_mesh(_MESH.value, len(devices))
  layer.check(preset, sizes)
  _check_tokens(_TOKENS_PER_CHIP, preset)
  mesh = chips.make_mesh(devices, sizes)
  partition = layer.partition(
    mesh,
    exchange=_EXCHANGE.value,
    buffer_factor=_BUFFER_FACTOR.value,
    drop=_DROP.value,
  )
  chip = chips.chip(_TOPOLOGY.value)
  report = layer.report(
    preset,
    _TOKENS_PER_CHIP.value,
    mesh,
    chip,
    partition,
    grad=_GRAD.value,
    experts_implementation=_EXPERTS.value,
  )
  if _JSON.value:
    found = dataclasses.asdict(report) | {"binds": report.binds, "mesh": sizes}
    _print_json(found, _OF["layer"])
    return
  of = " with gradients" if _GRAD.value else ""
  print(
    f"{_PRESET.value}{of}, {_TOKENS_PER_CHIP.value} tokens a device,"
    f" {len(devices)} x {devices[0].device_kind}, {sizes}; {_versions()}\n"
  )
  _print_layer(report)


def _print_json(found: dict[str, Any], of: Sequence[flags.FlagHolder]) -> None:
  """What was found, below the flags that it is of and what compiled it."""
  given = {flag.name: flag.value for flag in (_PRESET, _TOPOLOGY, *of)}
  text = {"flags": given, "versions": _versions()} | found
  print(json.dumps(text, indent=1))


def _print_layer(report: layer.Report) -> None:
  """The tables, in units that people read."""
  fits = "fits" if report.fits else "does not fit"
  print(_row("GB of a device, exact", "GB"))
  for name in (
    *("arguments", "results", "temporaries"),
    *("needed", "hbm_bytes", "peak"),
  ):
    value = getattr(report, name)
    words = {"hbm_bytes": f"there are ({fits})"}.get(name, name)
    print(_row(f"  {words}", _number(value and value / 1e9)))
  print(_row("FLOPs of a device", "1e12"))
  for name in ("needed_flops", "compiled_flops"):
    value = getattr(report, name)
    print(_row(f"  {name.split('_')[0]}", _number(value and value / 1e12)))
  if not report.seconds:
    return
  print(
    "\ncollectives of a device, exact; in a loop: of each round after the first"
  )
  for c in report.collectives:
    where = "+".join(c.axes) + (", in a loop" if c.in_loop else "")
    name = f"  {c.count} {c.op}, {where}"
    print(f"{name:48s}{c.bytes:15,d} bytes  {c.arrays}")
  print("\nroofline, an estimate: the least ms of each")
  for name, seconds in report.seconds.items():
    mark = "  <- binds" if name == report.binds else ""
    print(_row(f"  {name}", _number(seconds * 1e3)) + mark)


def _row(name: str, *figures: str) -> str:
  return f"{name:30s}" + "".join(f"{x:>16s}" for x in figures)


def _number(x: Any) -> str:
  if x is None:
    return "-"
  return f"{x:,d}" if isinstance(x, int) else f"{x:,.2f}"


if __name__ == "__main__":
  app.run(main)
