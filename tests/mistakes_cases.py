# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""A call that works of every public function, and how each argument is spoiled."""

import math

import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np

import jaxroute
from jaxroute import (
  assignment,
  dispatch,
  dual,
  experts,
  layer,
  linen,
  losses,
  metrics,
  nnx,
  plot,
  remat,
  routing,
)
from jaxroute.dual import solvers
from jaxroute.routing import bias_histogram

_SIZES = dict(T=6, E=4, K=2, D=3, F=5, N=12, S=3, Lyr=2)
_CONFIG = jaxroute.RouterConfig(num_experts=4, top_k=2)
_WRONG = {
  "float": (np.int32, np.bool_),
  "float32": (np.int32, np.float16),
  "int": (np.float32, np.bool_),
  "int32": (np.float32, np.bool_),
  "counts": (np.float32, np.bool_, np.int8, np.uint32),
  "bool": (np.int32, np.float32),
  "any": (),
}
_NONE_AT_ALL = ("a text", {"a": 1}, math.nan, jax.random.key(0))


class Argument:
  """An argument that works, and what must not be passed for it."""

  def __init__(self, good, bad, optional=False):
    self.good = good
    self.bad = [*bad, *(() if optional else (None,))]


def _array(letters, dtype="float", fixed="", optional=False, host=False):
  """An array; another size of the letters `fixed` does not fit the others."""
  *names, is_open = *letters.replace("...", "").split(), "..." in letters
  shape = tuple(_SIZES[letter] for letter in names)
  kind = {"float": np.float32, "int": np.int32, "counts": np.int32}
  good = (np.arange(math.prod(shape)) % 2).reshape(shape)
  good = good.astype(kind.get(dtype, np.float32 if dtype == "any" else dtype))
  bad = [good.astype(wrong) for wrong in _WRONG[dtype]]
  bad += [good[0]] if names else []
  bad += [] if is_open else [good[None]]
  for axis, letter in enumerate(names):
    if letter in fixed.split():
      bad.append(np.concatenate([good] * 2, axis=axis))
    if letter not in "TN":
      bad.append(np.take(good, [], axis=axis))
  if host:
    return Argument(good, [*bad, *_NONE_AT_ALL[:3]], optional)
  to_jax = [jnp.asarray(x) for x in bad]
  return Argument(jnp.asarray(good), [*to_jax, *_NONE_AT_ALL, [1]], optional)


def _int(good, low=1, high=None, optional=False):
  bad = [low - 1, "8", 1.5, True, math.nan, {"a": 1}, [good], np.ones(2, int)]
  bad += [] if high is None else [high + 1]
  return Argument(good, bad, optional)


def _number(good, *out_of_range, optional=False):
  bad = ["0.5", math.nan, math.inf, 1e39, True, {"a": 1}, [good], np.ones(2)]
  return Argument(good, [*bad, *out_of_range], optional)


def _one_of(good, *bad, optional=False):
  return Argument(good, [*bad, {"a": 1}, 7], optional)


def _tree(kind, optional=False, **fields):
  """A dataclass, with each field spoiled while the others are right."""
  good = {name: field.good for name, field in fields.items()}
  spoiled = [(name, x) for name, field in fields.items() for x in field.bad]
  bad = [kind(**(good | {name: x})) for name, x in spoiled]
  return Argument(kind(**good), [*bad, "a text", {"a": 1}, 7, good], optional)


def _params(fixed, letters="E ", optional=False):
  return _tree(
    experts.ExpertParams,
    optional,
    w_gate=_array(f"{letters}D F", fixed=fixed),
    w_up=_array(f"{letters}D F", fixed=f"{fixed} F"),
    w_down=_array(f"{letters}F D", fixed=f"{fixed} F"),
  )


def _routing(fixed):
  def make(load, **fields):
    counts = jaxroute.Counts(load=load)
    return jaxroute.Routing(counts=counts, cutoff=jnp.zeros(6), **fields)

  return _tree(
    make,
    expert_idx=_array("T K", "int", fixed),
    weights=_array("T K", "float32", fixed),
    load=_array("E", "counts", "E" if "E" in fixed else ""),
    token_mask=_array("T", "bool", fixed),
    rank=_array("T K", "int32", "T K", optional=True),
  )


_config = _one_of(_CONFIG, "sigmoid", dict(num_experts=4, top_k=2))
_implementation = _one_of("xla", "tpu", optional=True)
_flag = _one_of(False, "yes", 1)
_mask = _array("T", "bool", "T", optional=True)
_logits = _array("T E", fixed="E")
_bias = _array("E", "float32", "E", optional=True)
_scores = dict(
  scores=_array("T E", fixed="E"),
  expert_bias=_array("E", "float32", "E"),
  top_k=_int(2, high=4),
  token_mask=_mask,
)
_permutation = _tree(
  dispatch.Permutation,
  permutation=_array("N", "int32", "N"),
  inverse_permutation=_array("N", "int32", "N"),
  group_sizes=_array("E", "int32"),
)
_grouped = dict(
  group_sizes=_array("E", "int32", "E"),
  implementation=_one_of("tiled", "tpu", optional=True),
  interpret=_flag,
  expected_rows=_int(4, low=0, optional=True),
)
_rate = _number(0.1, -1.0)
_steps = _array("S", "any", host=True)
_history = _array("S Lyr E", "any", "S", host=True)
_lines = dict(xlabel=_one_of("step"), ylabel=_one_of("loss"))
_pair = (np.arange(3), np.arange(3.0))
_routes = dict(
  expert_bias=_bias,
  config=_config,
  token_mask=_mask,
  implementation=_implementation,
  interpret=_flag,
  with_rank=_flag,
)

CALLS = {
  jaxroute.route: dict(logits=_logits, **_routes),
  routing.project_and_route: dict(
    tokens=_array("T D", fixed="D"),
    router_weight=_array("D E", fixed="D E"),
    **_routes,
  ),
  routing.project: dict(
    tokens=_array("T D", fixed="D"),
    router_weight=_array("D E", fixed="D"),
    token_mask=_mask,
  ),
  bias_histogram.count: dict(
    selection=_array("T E", "float32"),
    expert_idx=_array("T K", "int", "T"),
    cutoff=_array("T", "float32", "T"),
    token_mask=_array("T", "bool", "T"),
  ),
  dispatch.sort_by_expert: dict(
    expert_idx=_array("T K", "int"),
    num_experts=_int(4),
    token_mask=_mask,
    capacity=_int(2, optional=True),
    implementation=_implementation,
    interpret=_flag,
    rank=_array("T K", "int32", "T K", optional=True),
    load=_array("E", "counts", "E", optional=True),
  ),
  dispatch.expert_capacity: dict(
    config=_config,
    num_tokens=_int(8, low=0),
    capacity_factor=_number(1.0, 0.0, -1.0),
    partition=_one_of(jaxroute.Partition(), "data", optional=True),
  ),
  dispatch.dispatch: dict(x=_array("T D", "any"), permutation=_permutation),
  dispatch.combine: dict(
    rows=_array("N D", fixed="N"),
    weights=_array("T K", "float32", "T K"),
    permutation=_permutation,
  ),
  experts.grouped_matmul: dict(
    lhs=_array("N D", fixed="D"),
    rhs=_array("E D F", fixed="D"),
    preferred_element_type=_one_of("float32", "no", jnp.int32, optional=True),
    **_grouped,
  ),
  experts.swiglu: dict(
    x=_array("N D", fixed="D"), params=_params("D"), **_grouped
  ),
  experts.dense_swiglu: dict(
    x=_array("T D", fixed="D"), params=_params("D", "")
  ),
  experts.init_expert_params: dict(
    key=Argument(jax.random.key(0), ["a", 1, {}, jnp.ones(2)]),
    num_experts=_int(4),
    model_size=_int(3),
    hidden_size=_int(5),
    dtype=_one_of(jnp.float32, "no", jnp.int32, int),
  ),
  layer.router: dict(
    x=_array("... D", fixed="D"),
    router_weight=_array("D E", fixed="D E"),
    expert_bias=_bias,
    config=_config,
    token_mask=Argument(None, [jnp.ones(3), jnp.ones(3, bool), "a", {}, 1], 1),
    implementation=_implementation,
    fuse_projection=_flag,
    partition=_one_of(None, "data", optional=True),
  ),
  layer.moe: dict(
    x=_array("... T D", fixed="D"),
    routing=_routing("T K E"),
    params=_params("D E"),
    shared=_params("D", "", optional=True),
    config=_config,
    capacity_factor=_number(1.0, 0.0, -1.0, optional=True),
    dtype=_one_of("bfloat16", "no", jnp.int32, optional=True),
    partition=_one_of(None, "data", optional=True),
    experts_implementation=_one_of("tiled", "tpu", optional=True),
  ),
  layer.local_moe: dict(
    x=_array("T D", fixed="D"),
    routing=_routing("T K"),
    params=_params("D E"),
    capacity=_int(2, optional=True),
    implementation=_one_of("tiled", "tpu", optional=True),
  ),
  losses.switch: dict(
    logits=_logits, routing=_routing("T K E"), config=_config
  ),
  losses.global_batch: dict(
    logits=_logits,
    load=_array("E", "counts", "E"),
    config=_config,
    token_mask=_mask,
  ),
  losses.sequence_wise: dict(
    logits=_logits,
    config=_config,
    num_sequences=Argument(2, [0, 4, "2", 1.5, True, math.nan, {}, [2]]),
    token_mask=_mask,
  ),
  losses.z_loss: dict(logits=_array("T E"), token_mask=_mask),
  **dict.fromkeys(
    (
      metrics.violation,
      metrics.mean_load,
      metrics.max_vio,
      metrics.coefficient_of_variation,
      metrics.load_entropy,
      metrics.dead_experts,
    ),
    dict(load=_array("... E", "counts")),
  ),
  metrics.total: dict(counts=_array("... E", "counts")),
  metrics.drop_fraction: dict(
    load=_array("... E", "counts", "E"),
    group_sizes=_array("... E", "counts", "E"),
  ),
  metrics.bias_spread: dict(expert_bias=_array("... E")),
  metrics.summary: dict(
    load=_array("... E", "counts", "E"), expert_bias=_array("... E", fixed="E")
  ),
  assignment.solve: dict(
    scores=Argument(
      np.eye(4, 2),
      [np.ones(4), np.ones((1, 4, 2)), "a text", {"a": 1}, [[1], [1, 2]]],
    ),
    top_k=_int(1, high=2),
    token_mask=_array("E", "bool", "E", optional=True, host=True),
  ),
  assignment.dual_value: dict(_scores, expert_bias=_array("E", fixed="E")),
  assignment.dual_value_of_choice: dict(
    selected=_array("T K"),
    expert_bias=_array("E"),
    token_mask=_array("T", "bool", "T"),
  ),
  assignment.primal_value: dict(
    scores=_array("T E"),
    expert_idx=_array("T K", "int", "T"),
    token_mask=_mask,
  ),
  assignment.duality_gap: _scores,
  assignment.round_to_balanced: _scores,
  assignment.complementary_slackness: dict(
    expert_bias=_array("... E", fixed="E"),
    load=_array("... E", "counts", "E"),
  ),
  assignment.regret: dict(
    scores=Argument(np.ones((2, 4, 2)), [np.ones((4, 2)), "a text", {}]),
    expert_bias=Argument(np.ones((2, 2)), [np.ones(2), np.ones((3, 2)), "a"]),
    top_k=_int(1, high=2),
  ),
  dual.sign: dict(rate=_rate),
  dual.proportional: dict(rate=_rate),
  dual.smebu: dict(
    rate=_rate, beta=_number(0.5, 1.0, -0.1), kappa=_number(2.0, 0.0, 1e-50)
  ),
  dual.pid: dict(proportional=_rate, integral=_rate, derivative=_rate),
  dual.triple_momentum: dict(rate=_rate, condition=_number(2.0, 0.5)),
  dual.quantile: dict(ema=_number(0.5, 1.0, -0.1)),
  dual.quantile_bias: _scores,
  dual.inverse: dict(rate=_rate),
  dual.inverse_sqrt: dict(rate=_rate),
  dual.solve: dict(
    _scores,
    expert_bias=_bias,
    solver=_one_of(solvers.bundle(), "bundle", solvers.bundle, optional=True),
    tolerance=_number(1e-4, 1.0, -1.0),
    max_iterations=_int(3),
  ),
  solvers.subgradient: dict(rule=_one_of(dual.sign(1.0), "sign", dual.sign)),
  solvers.sinkhorn: dict(temperature=_number(0.1, 0.0, -1.0)),
  solvers.sparse_transport: dict(
    rule=_one_of(dual.sign(1.0), "sign"), regularization=_number(0.1, 0.0, -1.0)
  ),
  solvers.bundle: dict(size=_int(3, low=2)),
  remat.checkpoint_name: dict(
    kept=_one_of("weights", "bias"), x=Argument(1, [], 1)
  ),
  plot.load_heatmap: dict(steps=_steps, load=_history),
  plot.max_vio_curves: dict(steps=_steps, load=_history),
  plot.bias_curves: dict(steps=_steps, expert_bias=_history),
  plot.curves: dict(
    series=_one_of({"a": _pair}, "a", {"a": _pair[:1]}, {"a": (1, 2)}),
    log_scale=_flag,
    window=_int(1),
    **_lines,
  ),
  plot.trade_off: dict(
    points=_one_of({"a": _pair}, "a", {"a": _pair[:1]}, {"a": ((), ())}),
    **_lines,
  ),
}

_initializer = _one_of(jax.nn.initializers.normal(), "normal")
_router = dict(
  config=_config,
  kernel_init=_initializer,
  implementation=_implementation,
  fuse_projection=_flag,
  partition=_one_of(None, "data", optional=True),
)
_moe = dict(
  _router,
  hidden_size=_int(5),
  shared_hidden_size=_int(5, low=0),
  capacity_factor=_number(1.0, 0.0, -1.0, optional=True),
  dtype=_one_of("bfloat16", "no", jnp.int32, optional=True),
  param_dtype=_one_of(jnp.float32, "no", jnp.int32, int),
  expert_init=_initializer,
  shared_init=_initializer,
  experts_implementation=_one_of("tiled", "tpu", optional=True),
)
_tokens = dict(
  x=_array("... T D"),
  token_mask=_array("T", "bool", "T", optional=True),
)


def _linen(layer_class):
  def apply(x, token_mask, **attributes):
    key = jax.random.key(0)
    return layer_class(**attributes).init_with_output(key, x, token_mask)[0]

  return apply


def _nnx(layer_class):
  def apply(x, token_mask, rngs, **arguments):
    # Flax counts the keys that are drawn, where `rngs` were made.
    rngs = flax.nnx.Rngs(0) if rngs == "new" else rngs
    return layer_class(rngs=rngs, **arguments)(x, token_mask)

  return apply


_nnx_only = dict(in_features=_int(3), rngs=_one_of("new", "a text"))
LAYERS = {
  "linen.Router": (_linen(linen.Router), _router | _tokens),
  "linen.MoE": (_linen(linen.MoE), _moe | _tokens),
  "nnx.Router": (_nnx(nnx.Router), _router | _tokens | _nnx_only),
  "nnx.MoE": (_nnx(nnx.MoE), _moe | _tokens | _nnx_only),
}
