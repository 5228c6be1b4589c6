# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The router's projection inside the routing kernel: exact products on the MXU.

A float32 router weight is the sum of three bfloat16 terms (bf16x3), and so
tokens of bfloat16 times the weight are three products without rounding. The
tokens are what the MXU holds and the experts pass by, so that few experts leave
none of its width empty.
"""

import jax
import jax.numpy as jnp
from jax import lax

from jaxroute import types
from jaxroute.kernels.tpu import device
from jaxroute.kernels.tpu.route import layout
from jaxroute.kernels.tpu.route import plan as plan_lib
from jaxroute.kernels.tpu.route.plan import Plan
from jaxroute.kernels.tpu.route.refs import InputRefs, Scratch

BF16_TERMS = 3
"""Numbers of bfloat16, of 8 bits each, that add up to one of float32, of 24."""

# VMEM for tokens and router weight: what routing leaves of the 64 MiB of v7x,
# the smallest.
_MAX_BYTES = 20 * 2**20


def unsupported(
  config: types.RouterConfig, width: int, dtype: jax.typing.DTypeLike
) -> str | None:
  """Why `project_and_route` cannot take such tokens, or None if it can.

  Args:
    config: static router description.
    width: D.
    dtype: of the tokens.

  Returns:
    The reason, for an error message.
  """
  if reason := plan_lib.unsupported(config):
    return reason
  if config.needs_row_softmax:
    return "the gradient of a softmax over all experts needs the logits"
  if dtype != jnp.bfloat16:
    return f"tokens must be bfloat16, got {jnp.dtype(dtype)}"
  if (device.generation() or 6) < 6:
    return "TPUs before v6e are faster with the projection apart"
  if width % device.LANES:
    return f"D must be a multiple of {device.LANES}, got {width}"
  many_tokens = device.LANES * device.SUBLANES
  size = vmem_bytes(Plan(config=config, tokens=many_tokens, width=width))
  if size > _MAX_BYTES:
    return (
      f"tokens and projection take {size >> 20} MiB of VMEM, of which there are"
      f" {_MAX_BYTES >> 20}"
    )
  return None


def vmem_bytes(plan: Plan) -> int:
  """Bytes of two blocks of tokens and the terms of the router weight.

  Args:
    plan: the static shape of the call; without a projection there are none.

  Returns:
    Bytes of VMEM.
  """
  rows = 2 * plan.block_tokens + BF16_TERMS * plan.projected_experts
  return rows * plan.width * 2


def split_bf16x3(plan: Plan, router_weight: jax.Array) -> tuple[jax.Array, ...]:
  """Splits a router weight into bfloat16 terms that add up to it.

  Args:
    plan: the static shape of the call.
    router_weight: `[D, E]` floating point, taken as float32.

  Returns:
    `BF16_TERMS` times `[projected_experts, D]` bfloat16, the largest term
    first.
  """
  padding = plan.projected_experts - plan.num_experts
  # [D, E] -> [projected_experts, D].
  rest = jnp.pad(router_weight.astype(jnp.float32).T, ((0, padding), (0, 0)))
  terms = []
  for _ in range(BF16_TERMS):
    # XLA may keep more bits through a cast to bfloat16 and back, but not here.
    term = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
    rest -= term
    terms.append(term.astype(jnp.bfloat16))
  return tuple(terms)


def project(plan: Plan, inputs: InputRefs, scratch: Scratch) -> None:
  """Computes the logits of the next block.

  Reads `tokens` and `router_weight`. Writes `projected_logits`.

  Args:
    plan: the static shape of the call.
    inputs: operands.
    scratch: buffers.
  """
  assert inputs.router_weight is not None
  experts = plan.projected_experts
  # The terms are one operand, so that tokens are loaded into the MXU once:
  # [BF16_TERMS * experts, D] x [tokens, D] -> [BF16_TERMS * experts, tokens].
  products = lax.dot_general(
    jnp.concatenate([term[...] for term in inputs.router_weight]),
    inputs.tokens[...],
    dimension_numbers=(((1,), (1,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  # The smaller terms are added first, which rounds less.
  smaller = products[experts : 2 * experts] + products[2 * experts :]
  scratch.projected_logits[...] = layout.pin(plan, products[:experts] + smaller)
