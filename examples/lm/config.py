# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The settings of `train.py`: one dataclass, from which the flags are made."""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import optax
from absl import flags

import jaxroute
from jaxroute import dual, types

# Name to (default rate, rate to rule). The rates suit scores in [0, 1].
RULES = {
  "none": (0.0, lambda rate: optax.set_to_zero()),
  "sign": (4e-3, dual.sign),
  "sign_sqrt": (6e-2, lambda rate: dual.sign(dual.inverse_sqrt(rate))),
  "sign_inverse": (3e-1, lambda rate: dual.sign(dual.inverse(rate))),
  "proportional": (8e-3, dual.proportional),
  "smebu": (8e-3, dual.smebu),
  "pid": (2e-2, lambda rate: dual.pid(rate, 0.02 * rate)),
  # Its rate is the share of the way to the quantile.
  "quantile": (0.5, lambda rate: dual.quantile(1 - rate)),
}


# Steps, sizes and loads are int32 on the device, and numbers float32.
_HIGHEST = {int: 2**31 - 1, float: float(np.finfo(np.float32).max)}
_HOST_ONLY = {"data_bytes": float("inf"), "seed": 2**32 - 1}


class SetupError(ValueError):
  """Something the user has to change; shown without a traceback."""


def _flag(default: Any, help_text: str, *, free: bool = False) -> Any:
  """A field that is also a flag.

  Args:
    default: value and, by its type, the kind of flag.
    help_text: what --help prints.
    free: True if a run may be resumed with another value of it.
  """
  return dataclasses.field(
    default=default, metadata={"help": help_text, "free": free}
  )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything a run depends on; every field is the flag of its name."""

  data: str = _flag(
    "", "File or folder to train on, as bytes; by default Python's library."
  )
  data_bytes: int = _flag(8_000_000, "Read at most so many bytes of --data.")
  out: str = _flag(
    "runs/lm",
    "Folder of checkpoints, metrics and figures; of a folder for each rule if"
    " --rule lists several. By default it is named by rule and settings.",
    free=True,
  )
  steps: int = _flag(
    600, "Optimizer steps; more of them extend a run.", free=True
  )
  batch_size: int = _flag(16, "Sequences per step.")
  seq_len: int = _flag(128, "Bytes per sequence.")
  model_size: int = _flag(128, "D, width of the residual stream.")
  num_layers: int = _flag(4, "Layers: a dense one, then MoE layers.")
  num_heads: int = _flag(4, "Attention heads.")
  num_experts: int = _flag(16, "E, routed experts per layer.")
  top_k: int = _flag(2, "K, routed experts per token.")
  expert_size: int = _flag(64, "F, hidden width of a routed expert.")
  shared_size: int = _flag(64, "Hidden width of the shared expert; 0: none.")
  score_fn: types.ScoreFn = _flag(
    "sigmoid", "sigmoid, softmax or sqrtsoftplus."
  )
  rule: str = _flag(
    "proportional",
    f"Balancing rule: {', '.join(RULES)}. Several, between commas, are trained"
    " in turn and compared.",
  )
  rate: float = _flag(-1.0, "Rate of the rule; negative: the rule's default.")
  switch_weight: float = _flag(
    0.0, "Weight of the Switch loss, the mean over layers; 0: without it."
  )
  learning_rate: float = _flag(3e-3, "Peak of the cosine schedule.")
  warmup: int = _flag(30, "Steps of linear warm-up before that peak.")
  decay_steps: int = _flag(
    0, "Steps of the cosine schedule; 0: the --steps that the run began with."
  )
  weight_decay: float = _flag(0.05, "Decoupled weight decay.")
  micro_batches: int = _flag(1, "Parts a batch is processed in, in turn.")
  seed: int = _flag(0, "Of the parameters and of the order of the data.")
  mesh: str = _flag(
    "1,1",
    "DATA,EXPERT: devices the batch and the experts are sharded over.",
    free=True,
  )
  eval_every: int = _flag(150, "Steps between validations.", free=True)
  eval_batches: int = _flag(48, "Batches of a validation, at most.", free=True)
  save_every: int = _flag(150, "Steps between checkpoints.", free=True)
  save_scores: bool = _flag(
    False,
    "Write the routers' scores of the validation to scores.npz at the end.",
    free=True,
  )
  resume: bool = _flag(
    True, "Continue the run in --out; false starts it anew.", free=True
  )

  def __post_init__(self):
    self._check_ranges()
    # The array store takes no other names.
    is_text = self.out == self.out.encode(errors="replace").decode()
    if not self.out or "://" in self.out or not is_text:
      raise SetupError(f"--out must be a local folder, got {self.out!r}.")
    if self.model_size % (2 * self.num_heads):
      raise SetupError(
        f"--num_heads={self.num_heads} must divide --model_size="
        f"{self.model_size} into heads of even width."
      )
    if self.rule not in RULES:
      raise SetupError(
        f"--rule must be one of {', '.join(RULES)}, got {self.rule!r}."
      )
    data, expert = self.mesh_shape
    if self.batch_size % (self.micro_batches * data):
      raise SetupError(
        f"--batch_size={self.batch_size} must be divisible by --micro_batches="
        f"{self.micro_batches} times the {data} data devices of --mesh."
      )
    if self.num_experts % expert:
      raise SetupError(
        f"--num_experts={self.num_experts} must be divisible by the {expert}"
        " expert devices of --mesh."
      )
    for make in (lambda: self.router, self.make_rule):
      try:
        make()
      except ValueError as error:
        # The package names its arguments, which are the flags, in backticks.
        raise SetupError(
          str(error).replace("`", "--", 1).replace("`", "", 1)
        ) from error

  def _check_ranges(self):
    least_1 = (
      "data_bytes steps batch_size seq_len model_size num_heads expert_size"
      " micro_batches eval_every eval_batches save_every"
    )
    least_0 = (
      "shared_size switch_weight warmup weight_decay learning_rate seed"
      " decay_steps"
    )
    lowest = dict.fromkeys(least_0.split(), 0) | dict.fromkeys(
      least_1.split(), 1
    )
    # The first layer is dense.
    lowest["num_layers"] = 2
    for name, low in lowest.items():
      value = getattr(self, name)
      if not low <= value:
        raise SetupError(f"--{name} must be at least {low}, got {value}.")
    for field in dataclasses.fields(self):
      kind: Any = type(field.default)
      value = getattr(self, field.name)
      high = _HOST_ONLY.get(field.name, _HIGHEST.get(kind))
      # NaN compares as false.
      if high and not abs(value) <= high:
        raise SetupError(
          f"--{field.name} must be finite and at most {high}, got {value}."
        )
    if self.batch_size * self.seq_len * self.top_k > _HIGHEST[int]:
      raise SetupError(
        f"--batch_size={self.batch_size} times --seq_len={self.seq_len} times"
        f" --top_k={self.top_k} must be at most {_HIGHEST[int]}, since loads are"
        " int32."
      )

  @property
  def mesh_shape(self) -> tuple[int, int]:
    """Devices along "data" and "expert"."""
    if not re.fullmatch("0*[1-9][0-9]{0,8},0*[1-9][0-9]{0,8}", self.mesh):
      raise SetupError(
        f"--mesh must be DATA,EXPERT, two positive integers, got {self.mesh!r}."
        " Use --mesh=1,1 for one device."
      )
    data, expert = self.mesh.split(",")
    return int(data), int(expert)

  @property
  def router(self) -> jaxroute.RouterConfig:
    """What the routers compute."""
    return jaxroute.RouterConfig(
      num_experts=self.num_experts,
      top_k=self.top_k,
      score_fn=self.score_fn,
      histogram=self.rule == "quantile",
    )

  @property
  def rule_rate(self) -> float:
    """The rate of the rule: that given, or its default."""
    return RULES[self.rule][0] if self.rate < 0 else self.rate

  def make_rule(self) -> optax.GradientTransformation:
    """The balancing rule."""
    return RULES[self.rule][1](self.rule_rate)

  @property
  def schedule_steps(self) -> int:
    """Steps until the learning rate is at its end, where it stays."""
    return self.decay_steps or self.steps

  def make_schedule(self) -> optax.Schedule:
    """The learning rate: warm-up, then a cosine down to a tenth."""
    return optax.warmup_cosine_decay_schedule(
      init_value=0.0,
      peak_value=self.learning_rate,
      warmup_steps=min(self.warmup, self.schedule_steps - 1),
      decay_steps=self.schedule_steps,
      end_value=0.1 * self.learning_rate,
    )

  def make_optimizer(self) -> optax.GradientTransformation:
    """AdamW under that schedule, gradients clipped to 1."""
    return optax.chain(
      optax.clip_by_global_norm(1.0),
      optax.adamw(
        self.make_schedule(), b2=0.95, weight_decay=self.weight_decay
      ),
    )

  def identity(self) -> dict[str, Any]:
    """The settings that a run can only be resumed with."""
    settings = {
      f.name: getattr(self, f.name)
      for f in dataclasses.fields(self)
      if not f.metadata["free"]
    }
    return settings | {"decay_steps": self.schedule_steps}

  def continuing(self, saved: dict[str, Any]) -> "Config":
    """The settings that a run goes on with: its schedule stays as it was.

    Args:
      saved: the `identity()` that the run began with, {} if it is new.

    Returns:
      A `Config`, which differs in `decay_steps` if that was left open.
    """
    decay_steps = self.decay_steps or saved.get("decay_steps", 0)
    return dataclasses.replace(self, decay_steps=decay_steps)


def define_flags(flag_values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flag of every field of `Config`.

  Args:
    flag_values: where they are defined.
  """
  define: dict[type, Any] = {
    bool: flags.DEFINE_bool,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    str: flags.DEFINE_string,
  }
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
  rules = values["rule"].split(",")
  if len(set(rules)) < len(rules):
    raise SetupError(f"--rule={values['rule']} lists a rule twice.")
  configs = tuple(Config(**values | {"rule": rule}) for rule in rules)
  folder = pathlib.Path(values["out"])
  if not flag_values["out"].present:
    folder = folder.with_name(folder.name + _differences(configs[0]))
  elif len(rules) == 1:
    return configs
  return tuple(
    dataclasses.replace(c, out=str(folder / c.rule)) for c in configs
  )


def _differences(config: Config) -> str:
  """Names the settings but the rule that make a run another than the default."""
  parts = []
  for field in dataclasses.fields(Config):
    value = getattr(config, field.name)
    fixed = not field.metadata["free"] and field.name != "rule"
    if fixed and value != field.default:
      # A path has slashes, and may be too long for a name.
      text = re.sub(r"[^\w.-]", "_", str(value))[-40:]
      parts.append(f",{field.name}={text}")
  return "".join(parts)
