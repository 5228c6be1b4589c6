# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Routers and sizes of published models."""

import dataclasses

from jaxroute import checks, types


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
  """The Mixture-of-Experts layers of a model.

  Attributes:
    config: their router.
    model_size: D.
    hidden_size: F.
    shared_hidden_size: F of all shared experts of a layer together, or 0.
    num_moe_layers: Lyr, without the model's dense layers.
  """

  config: types.RouterConfig
  model_size: int
  hidden_size: int
  shared_hidden_size: int
  num_moe_layers: int


PRESETS = {
  # 61 layers, of which the first three are dense. DeepSeek-V3,
  # https://arxiv.org/abs/2412.19437, section 4.2, and inference/configs/
  # config_671B.json of https://github.com/deepseek-ai/DeepSeek-V3.
  "deepseek_v3": Preset(
    config=types.RouterConfig(
      num_experts=256,
      top_k=8,
      num_groups=8,
      group_top_k=4,
      scaling_factor=2.5,
    ),
    model_size=7168,
    hidden_size=2048,
    shared_hidden_size=2048,
    num_moe_layers=58,
  ),
  # 61 layers, of which the first is dense; the router has no groups. Kimi K2,
  # https://arxiv.org/abs/2507.20534, table 2, and config.json of
  # https://huggingface.co/moonshotai/Kimi-K2-Base.
  "kimi_k2": Preset(
    config=types.RouterConfig(num_experts=384, top_k=8, scaling_factor=2.827),
    model_size=7168,
    hidden_size=2048,
    shared_hidden_size=2048,
    num_moe_layers=60,
  ),
  # 94 layers, none dense, no shared expert. Qwen3,
  # https://arxiv.org/abs/2505.09388, table 2, and config.json of
  # https://huggingface.co/Qwen/Qwen3-235B-A22B.
  "qwen3_235b": Preset(
    config=types.RouterConfig(num_experts=128, top_k=8, score_fn="softmax"),
    model_size=4096,
    hidden_size=1536,
    shared_hidden_size=0,
    num_moe_layers=94,
  ),
}
"""Preset by name."""


def get(name: str) -> Preset:
  """The preset of a name.

  Args:
    name: a key of `PRESETS`.

  Returns:
    The preset.

  Raises:
    ValueError: if there is none of that name.
  """
  if not isinstance(name, str) or name not in PRESETS:
    raise ValueError(
      f"`name` must be that of a preset, one of {', '.join(PRESETS)}, got"
      f" {checks.describe(name)}. For another model, write its `RouterConfig`."
    )
  return PRESETS[name]
