# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The settings of `train.py`: one dataclass, from which the flags are made."""

import dataclasses
import re
from typing import Any

import numpy as np
import optax

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


class SaveError(OSError):
  """A save failed, on a full disk say; shown without a traceback."""


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
    " --rule lists several. By default it is named by rule and settings. A folder"
    " that all hosts see, or gs://BUCKET/FOLDER.",
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
  num_groups: int = _flag(1, "Groups of experts.")
  group_top_k: int = _flag(1, "Groups that a token may use experts of.")
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
    "",
    "data=D or data=D,expert=X: the batch is sharded over D * X devices, and the"
    " experts over X. By default D is all devices.",
    free=True,
  )
  fsdp: bool = _flag(
    False,
    "Shard parameters and optimizer over the data devices too.",
    free=True,
  )
  remat: bool = _flag(
    False,
    "Compute layers again for their gradients, but for the routes; saves memory.",
    free=True,
  )
  dtype: str = _flag(
    "float32",
    "float32 or bfloat16, of the computation; parameters are float32.",
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
    is_known = re.fullmatch("gs://[^/]+/.+", self.out) or "://" not in self.out
    if not self.out or not is_known or not is_text:
      raise SetupError(
        "--out must be a folder, of this machine or gs://BUCKET/FOLDER, got"
        f" {self.out!r}."
      )
    if self.dtype not in ("float32", "bfloat16"):
      raise SetupError(
        f"--dtype must be float32 or bfloat16, got {self.dtype!r}."
      )
    if self.model_size % (2 * self.num_heads):
      raise SetupError(
        f"--num_heads={self.num_heads} must divide --model_size="
        f"{self.model_size} into heads of even width."
      )
    if self.rule not in RULES:
      raise SetupError(
        f"--rule must be one of {', '.join(RULES)}, got {self.rule!r}."
      )
    if self.mesh:
      self._check_divides(*self.mesh_shape)
    for make in (lambda: self.router, self.make_rule):
      try:
        make()
      except ValueError as error:
        # The package names its arguments, which are the flags, in backticks.
        raise SetupError(re.sub("`([^`]*)`", r"--\1", str(error))) from error

  def _check_divides(self, data: int, expert: int):
    devices, unit = data * expert, self.micro_batches * data * expert
    if self.batch_size % unit:
      fewer = [
        n
        for n in range(1, devices)
        if self.batch_size % (self.micro_batches * n) == 0
      ]
      number = f"{devices} devices" if devices > 1 else "one device"
      other = "other --micro_batches"
      if fewer:
        other = f"take fewer devices, as by --mesh=data={fewer[-1]}"
      raise SetupError(
        f"--batch_size={self.batch_size} must be divisible by --micro_batches="
        f"{self.micro_batches} times the {number} of --mesh={self.mesh}."
        f" Type --batch_size={-(-self.batch_size // unit) * unit}, or {other}."
      )
    if self.num_experts % expert:
      raise SetupError(
        f"--num_experts={self.num_experts} must be divisible by the {expert}"
        " expert devices of --mesh."
      )

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
    count = "0*([1-9][0-9]{0,8})"
    found = re.fullmatch(f"data={count}(?:,expert={count})?", self.mesh)
    if not found:
      raise SetupError(
        "--mesh must be data=D or data=D,expert=X, two positive integers, got"
        f" {self.mesh[:100]!r}. Use --mesh=data=1 for one device, and leave it out"
        " for all."
      )
    return int(found[1]), int(found[2] or 1)

  def on_devices(self, count: int) -> "Config":
    """The settings with a mesh: theirs or, if they leave it open, of all devices.

    Args:
      count: devices that there are.

    Raises:
      SetupError: if the batch does not divide over them.
    """
    return dataclasses.replace(self, mesh=self.mesh or f"data={count}")

  @property
  def router(self) -> jaxroute.RouterConfig:
    """What the routers compute."""
    return jaxroute.RouterConfig(
      num_experts=self.num_experts,
      top_k=self.top_k,
      score_fn=self.score_fn,
      num_groups=self.num_groups,
      group_top_k=self.group_top_k,
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
    # Runs from before there were these settings had their defaults.
    for name in ("dtype", "num_groups", "group_top_k"):
      if settings[name] == Config.__dataclass_fields__[name].default:
        del settings[name]
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
