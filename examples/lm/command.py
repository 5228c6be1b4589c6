# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The command line of `train.py`: the flags, and the runs that they stand for."""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import hosts
import sizes
from absl import flags
from config import Config, SetupError
from etils import epath


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flag of every field of `Config`, and those beside them.

  Args:
    flag_values: where they are defined.
  """
  define: dict[type, Any] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
  flags.DEFINE_enum(
    "size",
    "tiny",
    list(sizes.SIZES),
    "Defaults of the sizes: tiny, for two CPU cores; lfb_1b and lfb_3b, the"
    " models of the loss-free balancing paper; deepseek_v3_layer, a dense and an"
    " MoE layer of DeepSeek-V3. An explicit flag overrides --size.",
    flag_values=flag_values,
  )
  hosts.define_flags(flag_values)
  for field in dataclasses.fields(Config):
    default: Any = field.default
    define[type(default)](
      field.name, default, field.metadata["help"], flag_values=flag_values
    )


def parse_flags(argv: Sequence[str]) -> list[str]:
  """What of the command line is no flag; exits with 2 if a flag is wrong."""
  try:
    return flags.FLAGS(argv)
  except flags.Error as error:
    program = pathlib.Path(argv[0]).name
    print(f"{program}: {error} See --help.", file=sys.stderr)
    sys.exit(2)


def from_flags(
  flag_values: flags.FlagValues = flags.FLAGS,
) -> tuple[Config, ...]:
  """The runs of the command line: one for every rule that --rule lists.

  Args:
    flag_values: the flags of `define_flags`, parsed.

  Returns:
    A `Config` for each. Each run has a folder named by its rule, in --out; one
    rule with an --out is in that folder itself.

  Raises:
    SetupError: if a setting is impossible.
  """
  names = [field.name for field in dataclasses.fields(Config)]
  values: dict[str, Any] = {name: flag_values[name].value for name in names}
  size = str(flag_values["size"].value)
  values |= {
    name: value
    for name, value in sizes.SIZES[size].items()
    if not flag_values[name].present
  }
  rules = values["rule"].split(",")
  if len(set(rules)) < len(rules):
    raise SetupError(f"--rule={values['rule']} lists a rule twice.")
  configs = tuple(Config(**values | {"rule": rule}) for rule in rules)
  folder = epath.Path(values["out"])
  if not flag_values["out"].present:
    folder = folder.with_name(folder.name + _differences(configs[0], size))
  elif len(rules) == 1:
    return configs
  return tuple(
    dataclasses.replace(c, out=str(folder / c.rule)) for c in configs
  )


def _differences(config: Config, size: str) -> str:
  """Names the settings, other than the rule, that differ from the defaults."""
  parts = [] if size == "tiny" else [f",size={size}"]
  for field in dataclasses.fields(Config):
    value = getattr(config, field.name)
    fixed = not field.metadata["free"] and field.name != "rule"
    if fixed and value != sizes.SIZES[size].get(field.name, field.default):
      # A path has slashes, and may be too long for a name.
      text = re.sub(r"[^\w.-]", "_", str(value))[-40:]
      parts.append(f",{field.name}={text}")
  return "".join(parts)
