# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A decoder-only transformer over bytes, with DeepSeekMoE feed-forward layers.

The first layer's feed-forward is dense; the others have many small routed
experts and a shared one. B sequences of S bytes make T = B * S tokens for the
routers.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from config import Config
from flax import linen as nn

import jaxroute
import jaxroute.linen
from jaxroute import losses, scores

_VOCABULARY = 256
# Their first axis is E, after that of the scan over layers.
EXPERT_PARAMETERS = ("w_gate", "w_up", "w_down")


class Transformer(nn.Module):
  """Bytes to the logits of the next byte.

  Attributes:
    config: sizes.
    partition: how tokens and experts lie on the mesh; None for one device.
  """

  config: Config
  partition: jaxroute.Partition | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """`[B, S]` integers to `[B, S, 256]` float32."""
    c = self.config
    dtype = jnp.dtype(c.dtype)
    embed = nn.Embed(
      _VOCABULARY,
      c.model_size,
      dtype=dtype,
      embedding_init=nn.initializers.normal(c.model_size**-0.5),
    )
    x = look_up(embed.embedding, tokens).astype(dtype)
    block = Block
    if c.remat:
      # A scan keeps the compiler from joining both computations already.
      block = nn.remat(Block, policy=jaxroute.save_routing, prevent_cse=False)
    x, _ = block(c, dense=True, name="dense_layer")(x, None)
    layers = nn.scan(
      block,
      variable_axes={
        "params": 0,
        "expert_bias": 0,
        **dict.fromkeys(jaxroute.linen.COUNTED, 0),
        "scores": 0,
        "losses": 0,
      },
      split_rngs={"params": True},
      length=c.num_layers - 1,
    )
    x, _ = layers(c, partition=self.partition, name="layers")(x, None)
    x = nn.RMSNorm(dtype=dtype, name="norm")(x)
    return embed.attend(x).astype(jnp.float32)


class Block(nn.Module):
  """Attention and a feed-forward layer, each normalized, each added to x."""

  config: Config
  dense: bool = False
  partition: jaxroute.Partition | None = None

  @nn.compact
  def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
    c = self.config
    dtype = jnp.dtype(c.dtype)
    attention = Attention(c.num_heads, dtype, name="attention")
    x = x + attention(nn.RMSNorm(dtype=dtype)(x))
    y = nn.RMSNorm(dtype=dtype)(x)
    if self.dense:
      # A token meets the same width here as in the other layers.
      width = c.top_k * c.expert_size + c.shared_size
      return x + SwiGLU(width, dtype, name="mlp")(y), None
    y, out = jaxroute.linen.MoE(
      c.router,
      hidden_size=c.expert_size,
      shared_hidden_size=c.shared_size,
      dtype=dtype,
      partition=self.partition,
      name="moe",
    )(y)
    # These are computed only for callers that make the collections mutable.
    # There are logits unless the projection is fused with the routing.
    assert out.logits is not None
    self.sow("scores", "scores", scores.scores(out.logits, c.router))
    self.sow(
      "losses", "switch", losses.switch(out.logits, out.routing, c.router)
    )
    return x + y, None


class Attention(nn.Module):
  """Causal self-attention with rotary positions."""

  num_heads: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    d = x.shape[-1]
    shape = (3, self.num_heads, d // self.num_heads)
    qkv = nn.DenseGeneral(shape, use_bias=False, dtype=self.dtype, name="qkv")(
      x
    )
    q, k, v = (qkv[:, :, i] for i in range(3))
    y = jax.nn.dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
    return nn.DenseGeneral(
      d, axis=(-2, -1), use_bias=False, dtype=self.dtype, name="out"
    )(y)


class SwiGLU(nn.Module):
  """A dense feed-forward layer."""

  width: int
  dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    dense = functools.partial(nn.Dense, use_bias=False, dtype=self.dtype)
    gate = dense(self.width, name="gate")(x)
    up = dense(self.width, name="up")(x)
    return dense(x.shape[-1], name="down")(nn.silu(gate) * up)


def look_up(table: jax.Array, tokens: jax.Array) -> jax.Array:
  """Rows of a table, sharded as the tokens are.

  Args:
    table: `[V, D]`.
    tokens: `[B, S]` integers.

  Returns:
    `[B, S, D]`.
  """
  sharding = jax.typeof(tokens).sharding
  # With explicit axes a lookup has to be told how its result is sharded.
  if jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
    sharding = None
  else:
    sharding = sharding.update(spec=jax.P(*sharding.spec, None))
  return table.at[tokens.astype(jnp.int32)].get(out_sharding=sharding)


def rotate(x: jax.Array) -> jax.Array:
  """Rotary position embedding.

  Args:
    x: `[B, S, heads, width]`, the width even.

  Returns:
    `x` with pairs of channels rotated by angles that grow with the position; the
    rotation is float32, the result of the dtype of `x`.

  References:
    Su et al., 2021, https://arxiv.org/abs/2104.09864.
  """
  _, s, _, width = x.shape
  exponent = jnp.linspace(
    0.0, 1.0, width // 2, endpoint=False, dtype=jnp.float32
  )
  frequency = 10_000.0**-exponent
  angle = jnp.outer(jnp.arange(s, dtype=jnp.float32), frequency)
  sin, cos = (f(angle)[None, :, None] for f in (jnp.sin, jnp.cos))
  a, b = jnp.split(x, 2, axis=-1)
  turned = jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return turned.astype(x.dtype)


def make_loss_fn(
  model: Transformer, switch_weight: jax.typing.ArrayLike | None = None
):
  """The `loss_fn` of `jaxroute.train_step`: mean cross-entropy in nats.

  Args:
    model: as it was initialised.
    switch_weight: if given, the Switch loss, averaged over layers, is added
      with this weight.
  """
  mutable = list(jaxroute.linen.COUNTED)
  if switch_weight is not None:
    mutable.append("losses")

  def loss_fn(params: Any, expert_bias: Any, batch: jax.Array):
    logits, found = model.apply(
      {"params": params, "expert_bias": expert_bias},
      batch[:, :-1],
      mutable=mutable,
    )
    loss = jnp.mean(
      optax.softmax_cross_entropy_with_integer_labels(
        logits, batch[:, 1:].astype(jnp.int32)
      )
    )
    metrics = {"bits_per_byte": loss / jnp.log(2.0)}
    if switch_weight is not None:
      (switch,) = jax.tree.leaves(found["losses"])
      loss += switch_weight * jnp.mean(switch)
    return loss, (jaxroute.linen.counts(found), metrics)

  return loss_fn


def router_scores(
  model: Transformer, params: Any, expert_bias: Any, batch: jax.Array
) -> jax.Array:
  """`[Lyr, T, E]` float32: the unbiased scores of a batch, layer by layer."""
  _, found = model.apply(
    {"params": params, "expert_bias": expert_bias},
    batch[:, :-1],
    mutable=["scores"],
  )
  (scores,) = jax.tree.leaves(found["scores"])
  return scores
