# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Published models by name."""

import pytest

from jaxroute import presets

pytestmark = pytest.mark.any_jax


# Billions of parameters of all Mixture-of-Experts layers, and of those that a token
# passes, from the sizes in the papers: Lyr (E + shared) 3 D F, and K for E.
@pytest.mark.parametrize(
  ("name", "total", "active"),
  [
    ("deepseek_v3", 656.5, 23.0),
    ("kimi_k2", 1017.3, 23.8),
    ("qwen3_235b", 227.1, 14.2),
  ],
)
def test_a_preset_has_the_size_of_its_model(name, total, active):
  preset = presets.get(name)
  assert name in presets.PRESETS
  expert = 3 * preset.model_size * preset.hidden_size
  shared = 3 * preset.model_size * preset.shared_hidden_size
  for number, billions in (
    (preset.config.num_experts, total),
    (preset.config.top_k, active),
  ):
    size = preset.num_moe_layers * (number * expert + shared)
    assert size / 1e9 == pytest.approx(billions, abs=0.05)


def test_an_unknown_preset_is_refused_with_the_known_ones():
  with pytest.raises(ValueError, match="deepseek_v3, kimi_k2, qwen3_235b, got"):
    presets.get("deepseek_v9")
  with pytest.raises(
    ValueError, match="must be that of a preset, one of.*got a list"
  ):
    presets.get(["deepseek_v3"])
