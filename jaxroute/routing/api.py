# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing with a selection bias: the one entry, and its XLA implementation.

The primal step of auxiliary-loss-free balancing: every token takes the K experts
with the largest score + bias, and is weighted by the scores alone. A kernel does
the forward pass only: the gradient of its weights is that of the XLA version for
the experts it chose.
"""

import functools

import jax
import jax.numpy as jnp

from jaxroute import dispatch, histogram, remat, types
from jaxroute import scores as scores_lib
from jaxroute.kernels import place_tpu, route_tpu

# Below the key of every float, -inf included.
_TAKEN = -(2**31)
# Above that many rounds one sort is faster, and quicker to compile.
_MAX_ROUNDS = 16
_CHUNK = 8


def route(
  logits: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: types.Implementation | None = None,
) -> types.Routing:
  """Chooses K experts per token and weighs them; counts what was chosen.

  Experts are chosen by `scores + expert_bias` (ties: the lowest index), weighted
  by their unbiased scores. Gradients flow to `logits` through the weights only;
  the bias gets none. A NaN logit never beats a finite one; a token that has to
  choose one gets NaN weights and is left out of `load`.

  Args:
    logits: `[T, E]` floating point. Router projection output; -inf masks an
      expert.
    expert_bias: `[E]` float32. The dual variable, or None for no bias.
    config: what to compute; static.
    token_mask: `[T]` bool. False marks padding: weight 0, not counted.
    implementation: "xla", "tpu", "gpu", or None for the best one here. "tpu" is
      a Pallas kernel for v5e, v5p and newer, which XLA does not partition: call
      it on one device, under explicit sharding, or inside `jax.shard_map`. None
      takes it there, if JAX runs on such a TPU and the kernel knows `config`,
      and "xla" elsewhere.

  Returns:
    A `Routing`; on T = 0 its arrays are empty and `load` is zero.

  Raises:
    ValueError: if a shape or dtype does not fit `config`.
    NotImplementedError: if `implementation` cannot do this; "xla" always can.

  Example:
    >>> config = types.RouterConfig(num_experts=4, top_k=2)
    >>> logits = jnp.array([[0.0, 2.0, 1.0, -1.0]])
    >>> route(logits, jnp.zeros(4), config).expert_idx
    Array([[1, 2]], dtype=int32)
    >>> bias = jnp.array([0.0, 0.0, 0.0, 1.0])
    >>> route(logits, bias, config).expert_idx
    Array([[3, 1]], dtype=int32)

  References:
    Wang et al., 2024, https://arxiv.org/abs/2408.15664, section 3.
    DeepSeek-V3, https://arxiv.org/abs/2412.19437, equations 12 to 16.
  """
  check_inputs(logits, expert_bias, config, token_mask)
  unsupported = route_tpu.unsupported(config)
  with jax.named_scope("jaxroute.route"):
    if _takes_tpu_kernel(implementation, unsupported):
      return _route_tpu(logits, None, expert_bias, config, token_mask)
    return _route_xla(logits, expert_bias, config, token_mask)


def project(
  tokens: jax.Array, kernel: jax.Array, token_mask: jax.Array | None = None
) -> jax.Array:
  """Logits in float32, whatever the dtype of the tokens.

  Args:
    tokens: `[T, D]` floating point.
    kernel: `[D, E]`. The router projection.
    token_mask: `[T]` bool. Padding counts as 0, so that no NaN in it, times a
      zero cotangent, reaches the kernel.

  Returns:
    `[T, E]` float32.
  """
  if token_mask is not None:
    zero = jnp.zeros((), tokens.dtype)
    tokens = jnp.where(token_mask[:, None], tokens, zero)
  if tokens.dtype not in (jnp.bfloat16, jnp.float16):
    tokens = tokens.astype(jnp.float32)
  # Narrow tokens stay so: of bf16 a TPU then takes 3 passes for the same
  # products, and 6 of float32.
  return jax.lax.dot_general(
    tokens,
    kernel.astype(jnp.float32),
    dimension_numbers=(((1,), (0,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )


def project_and_route(
  tokens: jax.Array,
  kernel: jax.Array,
  expert_bias: jax.Array | None,
  config: types.RouterConfig,
  token_mask: jax.Array | None = None,
  implementation: types.Implementation | None = None,
) -> types.Routing:
  """`route` of `project`, in one kernel where there is one.

  The kernel does not write logits to memory: it works on those of a block while
  it projects the next, in float32 as `project` does, but for the order of the
  sums. It is for TPU v6e and newer, bfloat16 tokens whose width is a multiple of
  128, projections that fit its memory, and scores other than a softmax over all
  experts. One block is projected twice, so it is for many thousand tokens.

  Args:
    tokens: `[T, D]` floating point.
    kernel: `[D, E]`. The router projection.
    expert_bias: as in `route`.
    config: what to compute; static.
    token_mask: as in `route`.
    implementation: as in `route`. None takes the kernel if JAX runs on a TPU and
      it can do this, and otherwise `project` and `route`.

  Returns:
    A `Routing`. Gradients flow through the weights to `tokens` and `kernel`.

  Raises:
    ValueError: as `route`.
    NotImplementedError: if `implementation` cannot do this; "xla" always can.
  """
  check_kernel(kernel, tokens.shape[1], config)
  logits = jax.ShapeDtypeStruct((len(tokens), kernel.shape[1]), jnp.float32)
  check_inputs(logits, expert_bias, config, token_mask)
  unsupported = route_tpu.unsupported_projection(
    config, tokens.shape[1], tokens.dtype
  )
  spec = jax.typeof(tokens).sharding.spec[1:] + jax.typeof(kernel).sharding.spec
  if any(spec):
    unsupported = f"D and `kernel` must not be sharded, got {spec}"
  if _takes_tpu_kernel(implementation, unsupported):
    with jax.named_scope("jaxroute.route"):
      return _route_tpu(tokens, kernel, expert_bias, config, token_mask)
  logits = project(tokens, kernel, token_mask)
  return route(logits, expert_bias, config, token_mask, implementation)


def check_inputs(logits, expert_bias, config, token_mask) -> None:
  """Raises ValueError unless the arguments of `route` fit together.

  Args:
    logits: `[T, E]` floating point, or an abstract array.
    expert_bias: `[E]` float32, or None.
    config: what E has to be that of.
    token_mask: `[T]` bool, or None.
  """
  if logits.ndim != 2 or logits.shape[1] != config.num_experts:
    raise ValueError(
      f"`logits` must be [T, E={config.num_experts}], got shape"
      f" {logits.shape}. Flatten batch and sequence into T."
    )
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(
      f"`logits` must be floating point, got {logits.dtype}. Pass the router"
      " projection's output, not indices."
    )
  if expert_bias is not None:
    if expert_bias.shape != (config.num_experts,):
      raise ValueError(
        f"`expert_bias` must be [E={config.num_experts}], got shape"
        f" {expert_bias.shape}. Pass the row of one layer."
      )
    if expert_bias.dtype != jnp.float32:
      raise ValueError(
        f"`expert_bias` must be float32, got {expert_bias.dtype}. Leave it out"
        " of casts of the model: lower precision changes which experts win."
      )
  if token_mask is not None:
    if token_mask.shape != logits.shape[:1] or token_mask.dtype != jnp.bool_:
      raise ValueError(
        f"`token_mask` must be bool [T={logits.shape[0]}], got"
        f" {token_mask.dtype} {token_mask.shape}. True marks real tokens."
      )


def check_kernel(
  kernel: jax.Array, width: int, config: types.RouterConfig
) -> None:
  """Raises ValueError unless a projection takes D to E.

  Args:
    kernel: `[D, E]`. The router projection.
    width: D, of the tokens.
    config: what E has to be that of.
  """
  if kernel.shape != (width, config.num_experts):
    raise ValueError(
      f"`kernel` must be [D={width}, E={config.num_experts}], got shape"
      f" {kernel.shape}. Its rows are the features of a token."
    )


def _route_xla(logits, expert_bias, config, token_mask):
  keys = _selection_keys(logits, expert_bias, config)
  expert_idx, cutoff = _select(keys, config)
  expert_idx = remat.name("expert_idx", expert_idx)
  weights, token_mask = _weigh(logits, expert_idx, config, token_mask)
  counts = None
  if config.histogram:
    counts = histogram.count(_from_keys(keys), expert_idx, cutoff, token_mask)
  return types.Routing(
    expert_idx=expert_idx,
    weights=remat.name("weights", weights),
    load=_count(expert_idx, token_mask, config.num_experts),
    cutoff=cutoff,
    token_mask=token_mask,
    histogram=counts,
  )


def _takes_tpu_kernel(implementation, unsupported):
  """Whether the TPU kernel is asked for, or the best there is here."""
  if implementation not in (None, "xla", "tpu", "gpu"):
    raise ValueError(
      "`implementation` must be None, 'xla', 'tpu' or 'gpu', got"
      f" {implementation!r}."
    )
  if implementation == "gpu":
    raise NotImplementedError(
      "there is no 'gpu' routing kernel in this version; use"
      " `implementation=None` or 'xla', which runs on every platform."
    )
  if implementation == "tpu" and unsupported:
    raise NotImplementedError(
      f"{unsupported}; use `implementation=None` or 'xla', which takes any."
    )
  if implementation is not None or unsupported or not route_tpu.runs_here():
    return implementation == "tpu"
  # A mesh with no axis left to XLA, which does not partition a kernel.
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return jax.device_count() == 1
  return jax.sharding.AxisType.Auto not in mesh.axis_types


def _route_tpu(
  inputs, kernel, expert_bias, config, token_mask, interpret=False
):
  """By the kernel, from logits or from tokens and the projection's `kernel`.

  Under explicit sharding shard by shard.
  """

  def call(*operands):
    return _tpu_kernel(config, interpret, *dispatch.vary_alike(operands))

  def call_shard(*operands):
    idx, weights, load, cutoff, counts = call(*operands)
    if axes is not None:
      load, counts = jax.lax.psum((load, counts), axes)
    return idx, weights, load, cutoff, counts

  if expert_bias is not None:
    expert_bias = jax.lax.stop_gradient(expert_bias)
  operands = inputs, kernel, expert_bias, token_mask
  sharding = jax.typeof(inputs).sharding
  if jax.sharding.AxisType.Explicit in sharding.mesh.axis_types:
    axes, whole = sharding.spec[0], jax.P()
    tokens = jax.P(axes)
    out = jax.shard_map(
      call_shard,
      in_specs=(tokens, whole, whole, tokens),
      out_specs=(tokens, tokens, whole, tokens, whole),
      # The interpreter mixes varying and other values itself.
      check_vma=not interpret,
    )(*operands)
  else:
    out = call(*operands)
  idx, weights, load, cutoff, counts = out
  valid = ~jnp.any(jnp.isnan(weights), axis=1)
  token_mask = valid if token_mask is None else token_mask & valid
  return types.Routing(
    expert_idx=idx,
    weights=weights,
    load=load,
    cutoff=cutoff,
    token_mask=token_mask,
    histogram=counts,
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tpu_kernel(config, interpret, *operands):
  return _call_tpu_kernel(config, interpret, False, *operands)


def _call_tpu_kernel(
  config, interpret, with_chosen, inputs, kernel, expert_bias, token_mask
):
  operands = expert_bias, token_mask
  options = dict(config=config, with_chosen=with_chosen, interpret=interpret)
  if kernel is None:
    return route_tpu.route(inputs, *operands, **options)
  return route_tpu.project_and_route(inputs, kernel, *operands, **options)


def _tpu_kernel_fwd(config, interpret, inputs, *operands):
  """Keeps the chosen logits; or scores, and all logits they depend on."""
  kernel, expert_bias, token_mask = operands
  expert_idx, weights, *counted, chosen = _call_tpu_kernel(
    config, interpret, True, inputs, *operands
  )
  expert_idx = remat.name("expert_idx", expert_idx)
  weights = remat.name("weights", weights)
  chosen = remat.name("chosen_logits", chosen)
  if kernel is None and not _is_row_softmax(config):
    inputs = inputs[:0]  # only their dtype is needed
  residuals = chosen, inputs, kernel, expert_idx, expert_bias, token_mask
  return (expert_idx, weights, *counted), residuals


def _tpu_kernel_bwd(config, interpret, residuals, d_out):
  chosen, inputs, kernel, expert_idx, expert_bias, token_mask = residuals
  row_softmax = _is_row_softmax(config)
  chosen = _mask(chosen, token_mask)
  weigh = _weigh_scores if row_softmax else _weigh_chosen
  _, pull = jax.vjp(lambda x: weigh(config, token_mask, x)[0], chosen)
  (d_chosen,) = pull(d_out[1])
  if row_softmax:
    d_logits = place_tpu.softmax_gradient(
      inputs,
      expert_idx,
      chosen,
      d_chosen,
      multiplier=config.logit_multiplier,
      soft_cap=config.logit_soft_cap,
      interpret=bool(interpret),
    )
  else:
    d_logits = place_tpu.place(
      expert_idx,
      d_chosen,
      num_experts=config.num_experts,
      dtype=jnp.float32 if kernel is not None else inputs.dtype,
      interpret=bool(interpret),
    )
  d_bias = None if expert_bias is None else jnp.zeros_like(expert_bias)
  if kernel is None:
    return d_logits, None, d_bias, None
  _, pull = jax.vjp(lambda x, w: project(x, w, token_mask), inputs, kernel)
  return *pull(d_logits), d_bias, None


_tpu_kernel.defvjp(_tpu_kernel_fwd, _tpu_kernel_bwd)


def _selection_keys(logits, expert_bias, config):
  """Selection scores as int32 keys, that of -inf outside the best groups."""
  selection = scores_lib.selection_scores(logits, expert_bias, config)
  # XLA may compute a value anew in every fusion that reads it, with other bits.
  keys = jax.lax.optimization_barrier(_to_keys(selection))
  if config.group_top_k < config.num_groups:
    keys = _keep_best_groups(keys, config)
  return keys


def _select(keys, config):
  """The K best experts, and the (K+1)-th score."""
  k = config.top_k
  top, idx = _largest(keys, min(k + 1, config.num_experts))
  if k < config.num_experts:
    cutoff = _from_keys(top[:, k])
  else:
    cutoff = jnp.full_like(_from_keys(top[:, 0]), -jnp.inf)
  return idx[:, :k], cutoff


def _keep_best_groups(keys, config):
  """Sets the keys outside the best `group_top_k` groups to that of -inf."""
  t = keys.shape[0]
  grouped = keys.reshape(t, config.num_groups, config.group_size)
  count = {
    "top1": 1,
    "top2": 2,
    "top_k": config.top_k // config.group_top_k,
  }[config.group_score]
  best = _from_keys(_largest(grouped, count)[0])
  group_score = best[..., 0]
  for i in range(1, count):
    group_score = group_score + best[..., i]
  # inf + -inf: a group with an infinite member is the best there is.
  group_score = jnp.where(best[..., 0] == jnp.inf, jnp.inf, group_score)
  score_keys = jax.lax.optimization_barrier(_to_keys(group_score))
  _, kept = _largest(score_keys, config.group_top_k)
  keep = jnp.any(kept[..., None] == _iota(config.num_groups, 3), axis=1)
  masked = _to_keys(jnp.float32(-jnp.inf))
  return jnp.where(keep[..., None], grouped, masked).reshape(keys.shape)


def _to_keys(x):
  """float32 without NaN to int32 in the same order, with -0 equal to +0."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  bits = jnp.where(bits == _TAKEN, 0, bits)
  return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _from_keys(keys):
  return jax.lax.bitcast_convert_type(
    keys ^ ((keys >> 31) & 0x7FFFFFFF), jnp.float32
  )


def _largest(keys, count):
  """The `count` largest of `[..., n]` keys and their indices, best first.

  One round per result. `heads` holds the largest key left in each chunk, so a
  round reads n / 8 heads and one chunk instead of n keys. Equal keys come in
  index order, so those left are the ones after the last result.
  """
  if count > _MAX_ROUNDS:
    return jax.lax.top_k(keys, count)
  n = keys.shape[-1]
  pad = [(0, 0)] * (keys.ndim - 1) + [(0, -n % _CHUNK)]
  keys = jnp.pad(keys, pad, constant_values=_TAKEN)
  chunks = keys.reshape(*keys.shape[:-1], -(-n // _CHUNK), _CHUNK)
  heads = jnp.max(chunks, axis=-1)
  lane = _iota(_CHUNK, keys.ndim)
  chunk_idx = _iota(heads.shape[-1], keys.ndim)
  last, idx = jnp.iinfo(jnp.int32).max, -1
  tops, indices = [], []
  for _ in range(count):
    top = jnp.max(heads, axis=-1, keepdims=True)
    chunk = _first(heads == top)
    row = jnp.take_along_axis(
      chunks, chunk[..., None], axis=-2, mode="promise_in_bounds"
    )[..., 0, :]
    row_idx = chunk * _CHUNK + lane
    left = (row < last) | ((row == last) & (row_idx > idx))
    row = jnp.where(left, row, _TAKEN)
    hit = _first(row == top)
    rest = jnp.where(lane == hit, _TAKEN, row)
    rest = jnp.max(rest, axis=-1, keepdims=True)
    heads = jnp.where(chunk_idx == chunk, rest, heads)
    last, idx = top, chunk * _CHUNK + hit
    tops.append(top)
    indices.append(idx)
  return jnp.concatenate(tops, axis=-1), jnp.concatenate(indices, axis=-1)


def _first(flags):
  """Index of the first True of the last axis, which is kept with size 1."""
  n = flags.shape[-1]
  # A product, for a select between unsharded operands loses the sharding.
  from_end = flags.astype(jnp.int32) * (n - _iota(n, flags.ndim))
  return n - jnp.max(from_end, axis=-1, keepdims=True)


def _iota(n, ndim):
  """0 to n - 1 along the last of `ndim` axes."""
  return jnp.arange(n, dtype=jnp.int32).reshape((1,) * (ndim - 1) + (n,))


def _is_row_softmax(config):
  """Whether a score depends on the logits of all experts."""
  return config.score_fn == "softmax" and not config.score_after_top_k


def _weigh(logits, expert_idx, config, token_mask):
  """Weights of the chosen experts, and the mask less the NaN tokens."""

  def choose(x):
    return jnp.take_along_axis(x, expert_idx, axis=1, mode="promise_in_bounds")

  if not _is_row_softmax(config):
    chosen = _mask(remat.name("chosen_logits", choose(logits)), token_mask)
    return _weigh_chosen(config, token_mask, chosen)
  logits = scores_lib.prepare_logits(_mask(logits, token_mask), config)
  chosen = choose(scores_lib.score(logits, config.score_fn))
  return _weigh_scores(config, token_mask, chosen)


def _mask(x, token_mask):
  """1 for padding: before it is weighed, for its gradient would be 0 * NaN."""
  return x if token_mask is None else jnp.where(token_mask[:, None], x, 1.0)


def _weigh_chosen(config, token_mask, logits):
  """As `_weigh`, from the logits of the chosen experts."""
  logits = scores_lib.prepare_logits(logits, config)
  scores = scores_lib.score(logits, config.score_fn)
  return _weigh_scores(config, token_mask, scores)


def _weigh_scores(config, token_mask, weights):
  """As `_weigh`, from the scores of the chosen experts."""
  if config.normalize_weights:
    # By a power of two, so exactly: the backward pass squares the divisor, and
    # the square of a `norm_eps` of 1e-20 would be zero.
    weights = weights * 2.0**40
    total = jnp.sum(weights, axis=1, keepdims=True)
    weights = weights / (total + config.norm_eps * 2.0**40)
  weights = weights * config.scaling_factor
  is_nan = jnp.any(jnp.isnan(weights), axis=1)
  if token_mask is None:
    token_mask = jnp.ones_like(is_nan)
  weights = jnp.where(is_nan[:, None], jnp.nan, weights)
  weights = jnp.where(token_mask[:, None], weights, 0.0)
  return weights, token_mask & ~is_nan


def _count(expert_idx, token_mask, num_experts):
  """Assignments per expert, summed over every device that holds tokens."""
  mesh = jax.typeof(expert_idx).sharding.mesh
  # Under explicit sharding the sum over shards has to be asked for.
  replicated = None if mesh.empty else jax.NamedSharding(mesh, jax.P(None))
  load = jnp.zeros(num_experts, jnp.int32)
  ones = jnp.broadcast_to(token_mask[:, None], expert_idx.shape)
  return load.at[expert_idx].add(
    ones.astype(jnp.int32), mode="promise_in_bounds", out_sharding=replicated
  )
