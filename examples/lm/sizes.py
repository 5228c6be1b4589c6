# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What --size stands for: settings from two CPU cores to a pod.

The vocabulary is bytes and attention is plain, whatever the model; the dense
layer is as wide as what a token meets in the others.
"""

from typing import Any

# Wang et al., 2024, https://arxiv.org/abs/2408.15664, appendix: a dense layer,
# then those with 64 routed experts, of which a token meets 6, and 2 shared ones.
_LOSS_FREE: dict[str, Any] = dict(
  seq_len=2048, num_experts=64, top_k=6, dtype="bfloat16"
)

# Name to the settings whose defaults it changes.
SIZES: dict[str, dict[str, Any]] = {
  "tiny": {},
  "lfb_1b": _LOSS_FREE
  | dict(
    batch_size=1152,
    model_size=1024,
    num_layers=10,
    num_heads=8,
    expert_size=528,
    shared_size=2 * 528,
    learning_rate=1e-3,
  ),
  "lfb_3b": _LOSS_FREE
  | dict(
    batch_size=1728,
    model_size=1280,
    num_layers=12,
    num_heads=10,
    expert_size=880,
    shared_size=2 * 880,
    learning_rate=7.8e-4,
  ),
  # DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 4.2; a sequence on each
  # device of a slice of 256.
  "deepseek_v3_layer": dict(
    batch_size=256,
    seq_len=4096,
    model_size=7168,
    num_layers=2,
    num_heads=128,
    num_experts=256,
    top_k=8,
    num_groups=8,
    group_top_k=4,
    expert_size=2048,
    shared_size=2048,
    learning_rate=2.2e-4,
    dtype="bfloat16",
  ),
}
