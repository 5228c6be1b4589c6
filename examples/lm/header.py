# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a run says of itself before it trains."""

import math
import shlex
from typing import Any

import jax
import model as model_lib
import numpy as np
from config import Config


def header(
  config: Config, params: Any, corpus: str, last_step: int, device_count: int
) -> str:
  """The lines that are printed before training.

  Args:
    config: the settings.
    params: the parameters of the model, or their shapes.
    corpus: describes what is trained on.
    last_step: of the checkpoint that the run continues from, 0 if it is new.
    device_count: devices that JAX has found.

  Returns:
    Lines, each with its name.
  """
  c = config
  total, active = parameter_counts(c, params)
  shared = ", and a shared one" if c.shared_size else ""
  lines = {
    "corpus": corpus,
    "model": f"{total:,} parameters, {active:,} of them active for a token",
    "experts": (
      f"{c.num_experts} in each of {c.num_layers - 1} MoE layers, top-{c.top_k}"
      f"{shared}"
    ),
    "rule": f"{c.rule}, rate {c.rule_rate:g}",
    "devices": _devices(c, device_count),
    "steps": _steps(c, last_step),
    "output": c.out,
    "watch": (
      f"pip install tensorboard; tensorboard --logdir={shlex.quote(c.out)}"
    ),
  }
  return "\n".join(f"{name:9s}{text}" for name, text in lines.items())


def parameter_counts(config: Config, params: Any) -> tuple[int, int]:
  """How many parameters there are, and how many of them a token meets.

  Args:
    config: K of E experts are met.
    params: the parameters of the model, or their shapes.
  """
  experts = others = 0
  for path, x in jax.tree_util.tree_leaves_with_path(params):
    if path[-1].key in model_lib.EXPERT_PARAMETERS:
      experts += math.prod(x.shape)
    else:
      others += math.prod(x.shape)
  met = experts * config.top_k // config.num_experts
  return others + experts, others + met


def _devices(config: Config, count: int) -> str:
  used = math.prod(config.mesh_shape)
  text = f"uses {used} of {count}, {jax.devices()[0].device_kind}"
  if used > 1:
    text += f", as --mesh={config.mesh}{' --fsdp' if config.fsdp else ''}"
  if jax.process_count() > 1:
    text += (
      f"; {jax.local_device_count()} in each of {jax.process_count()} processes"
    )
  if used < count:
    text += "; without --mesh all are used"
  return text


def _steps(config: Config, last_step: int) -> str:
  if last_step == config.steps:
    text = f"{last_step}, all done before"
  else:
    text = (
      f"{last_step + 1} to {config.steps}, each of"
      f" {config.batch_size * config.seq_len:,} bytes"
    )
  if config.schedule_steps != config.steps:
    rate = np.asarray(config.make_schedule()(config.schedule_steps))
    text += (
      f"; the learning rate falls to {rate:.2g} over the first"
      f" {config.schedule_steps} and stays there (--decay_steps)"
    )
  return text
