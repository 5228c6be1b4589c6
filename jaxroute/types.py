# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The types that travel between modules, and the letters of their shapes.

Dimension letters, used in every docstring:

  T tokens (batch x sequence, flattened)   E routed experts
  K `top_k`, experts per token             D model width
  F expert hidden width                    G expert groups
  N = T * K assignments                    C capacity, rows per expert
  Lyr layers

Conventions that hold everywhere: a positive `expert_bias` attracts tokens; ties
go to the lowest expert index; scores, weights and biases are float32 and loads
int32 whatever the dtype of the model.
"""

import dataclasses
import math
from typing import Any, Literal, get_args

import jax

from jaxroute import checks
from jaxroute.partition import Exchange as Exchange
from jaxroute.partition import Partition as Partition

ScoreFn = Literal["softmax", "sigmoid", "sqrtsoftplus"]
BiasSpace = Literal["scores", "logits"]
GroupScore = Literal["top1", "top2", "top_k"]
PyTree = Any

SCORE_TAILS = {"sigmoid": (-17.0, 1.0), "sqrtsoftplus": (-15.0, 0.5)}
"""Score function to a start and a slope: where a logit is below the start, its score
is `exp(slope * logit)`, to the last bit or so."""

HISTOGRAM_BINS = 16
"""Bins of `Counts.histogram` per expert; `jaxroute.routing.bias_histogram`."""

HISTOGRAM_OCTAVES = 3
"""Octaves of distance in a bin."""

HISTOGRAM_FIRST_END = -16
"""The bins nearest to 0 end at 2 to this power."""

_LARGEST_FLOAT32 = (2 - 2.0**-23) * 2.0**127


_CHOICES = {
  "score_fn": get_args(ScoreFn),
  "bias_space": get_args(BiasSpace),
  "group_score": get_args(GroupScore),
}
_LEAVE_OUT = "Leave the field out for its default, if it has one."
# Fields that are numbers: from where to where, and what to do.
_INTERVALS = {
  "norm_eps": ("[0, inf)", _LEAVE_OUT),
  "scaling_factor": ("(-inf, inf)", "1.0 is for no scaling."),
  # Logits over a larger cap are subnormal, which is 0.
  "logit_soft_cap": ("(0, 1e30)", "None is for no cap."),
  # Times 0 or less, the -inf of a masked expert would be NaN or +inf.
  "logit_multiplier": ("(0, inf)", "1.0 leaves the logits as they are."),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterConfig:
  """What a router computes; frozen and hashable, so static under `jax.jit`.

  Numbers may be Python's, NumPy's or JAX's, and are kept as Python's.

  Attributes:
    num_experts: E, the number of routed experts.
    top_k: K, experts chosen per token, in `[1, E]`.
    score_fn: logits to scores. "sigmoid" (DeepSeek-V3), "softmax" over the E
      experts, or "sqrtsoftplus" = `sqrt(log(1 + exp(x)))` (DeepSeek-V4).
    score_after_top_k: choose on `logits + expert_bias` and apply `score_fn` to
      the K chosen logits only (softmax then runs over K). The bias is added to
      logits whatever `bias_space` says: there are no scores to choose by.
    bias_space: what `expert_bias` is added to for selection, "scores" or
      "logits".
    num_groups: G. Experts form G contiguous groups of E / G; a token may only
      use experts of its best `group_top_k` groups (node-limited routing).
    group_top_k: groups kept per token, in `[1, G]`.
    group_score: what a group is worth: its best selection score ("top1"), the
      sum of its best two ("top2"), or of its best `top_k / group_top_k`
      ("top_k").
    normalize_weights: divide the K weights by their sum + `norm_eps`. With
      `top_k` = 1 that makes every weight 1, whatever the logit: the router gets
      no gradient through its weights, and learns from auxiliary losses alone.
    norm_eps: draws weights to 0 where all K scores are as small as this. K
      scores that are all 0 (masked experts) have weights of 0, also without it.
    scaling_factor: multiplies the weights at the end.
    logit_soft_cap: if given, logits become `cap * tanh(logits / cap)`.
    logit_multiplier: multiplies the logits before the cap; positive.
    histogram: whether to count `Counts.histogram`, by which
      `jaxroute.dual.quantile` moves the bias.

  Raises:
    ValueError: if a value is of the wrong type or out of range, also as float32,
      or the groups do not divide.

  References:
    DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 2.1.2.
  """

  num_experts: int
  top_k: int
  score_fn: ScoreFn = "sigmoid"
  score_after_top_k: bool = False
  bias_space: BiasSpace = "scores"
  num_groups: int = 1
  group_top_k: int = 1
  group_score: GroupScore = "top2"
  normalize_weights: bool = True
  norm_eps: float = 1e-20
  scaling_factor: float = 1.0
  logit_soft_cap: float | None = None
  logit_multiplier: float = 1.0
  histogram: bool = False

  def __post_init__(self):
    for field in dataclasses.fields(self):
      # Equal numbers of Python, NumPy and JAX make equal configs, all hashable.
      value = self._checked(field.name, getattr(self, field.name))
      object.__setattr__(self, field.name, value)
    if self.top_k > self.num_experts:
      raise ValueError(
        f"`top_k` must be in [1, num_experts={self.num_experts}], got"
        f" {self.top_k}. Choose fewer experts per token or add experts."
      )
    self._check_groups()

  def _checked(self, name: str, value: Any) -> Any:
    """A field as Python's str, bool, int or float."""
    if name in _CHOICES:
      checks.check_choice(name, value, _CHOICES[name], _LEAVE_OUT)
      return value
    if name in _INTERVALS:
      if value is None and name == "logit_soft_cap":
        return None
      return checks.as_float(name, value, *_INTERVALS[name])
    if name in ("num_experts", "top_k", "num_groups", "group_top_k"):
      return checks.as_int(name, value, _LEAVE_OUT)
    return checks.as_bool(name, value, _LEAVE_OUT)

  def _check_groups(self):
    if self.num_experts % self.num_groups:
      raise ValueError(
        f"`num_groups` must divide `num_experts`={self.num_experts}, got"
        f" {self.num_groups}."
      )
    if self.group_top_k > self.num_groups:
      raise ValueError(
        f"`group_top_k` must be in [1, num_groups={self.num_groups}], got"
        f" {self.group_top_k}."
      )
    reachable = self.group_top_k * self.group_size
    if self.top_k > reachable:
      raise ValueError(
        f"`top_k`={self.top_k} experts do not fit into `group_top_k`="
        f"{self.group_top_k} groups of {self.group_size}: at most {reachable}."
        " Keep more groups or choose fewer experts."
      )
    if self.num_groups == 1:
      return
    if self.group_score == "top2" and self.group_size < 2:
      raise ValueError(
        "`group_score`='top2' needs at least 2 experts per group, got"
        f" {self.num_experts} / {self.num_groups} = 1. Use 'top1'."
      )
    if self.group_score == "top_k":
      if self.top_k % self.group_top_k:
        raise ValueError(
          f"`group_score`='top_k' needs `group_top_k`={self.group_top_k} to"
          f" divide `top_k`={self.top_k}. Use 'top1' or 'top2'."
        )

  @classmethod
  def on_scores(cls, num_experts: int, top_k: int) -> "RouterConfig":
    """A router whose "logits" are scores: it compares them, plus the bias, as they are.

    Args:
      num_experts: E.
      top_k: K.

    Returns:
      A `RouterConfig` for `jaxroute.route(scores, expert_bias, config)`.
    """
    return cls(num_experts=num_experts, top_k=top_k, score_after_top_k=True)

  @property
  def group_size(self) -> int:
    """Experts per group, E / G."""
    return self.num_experts // self.num_groups

  @property
  def limits_groups(self) -> bool:
    """Whether a token may use the experts of some groups only."""
    return self.group_top_k < self.num_groups

  @property
  def group_score_count(self) -> int:
    """How many of a group's best selection scores make up its score."""
    counts = {
      "top1": 1,
      "top2": 2,
      "top_k": self.top_k // self.group_top_k,
    }
    return counts[self.group_score]

  @property
  def selects_on_logits(self) -> bool:
    """Whether experts are chosen by logits, not scores, plus the bias."""
    return self.score_after_top_k or self.bias_space == "logits"

  @property
  def needs_row_softmax(self) -> bool:
    """Whether an expert's score depends on the logits of all experts."""
    return self.score_fn == "softmax" and not self.score_after_top_k

  @property
  def split_norm_eps(self) -> tuple[float, float]:
    """`norm_eps` as `(factor, exponent)` of `factor * exp(exponent)`.

    The exponent is a whole number, of at most 0: float32 subtracts it from what
    is below it without rounding. It is the lowest float32 if `norm_eps` is 0.
    """
    if not self.norm_eps:
      return 0.0, -_LARGEST_FLOAT32
    log = math.log(self.norm_eps)
    exponent = min(math.floor(log), 0)
    return math.exp(log - exponent), float(exponent)

  @property
  def weighs_all_logits(self) -> bool:
    """Whether a weight depends on the logits of all experts.

    Without `norm_eps`, the sum over all experts cancels out of normalized weights.
    """
    cancels = self.normalize_weights and not self.norm_eps
    return self.needs_row_softmax and not cancels


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Counts:
  """What was counted, for a dual rule to move the bias by.

  Counts add up: `jax.tree.map(jnp.add, a, b)` are those of both parts of a
  batch. What a layer with a partition counted knows its `parts`, until it is
  changed or leaves a transformation of JAX.

  Attributes:
    load: `[E]` int32. Assignments per expert, of the tokens that count, before
      any drop. In a state: `[Lyr, E]`, or a pytree of `[..., E]` arrays.
    histogram: `[E, 16]` int32, if `RouterConfig.histogram`: how far the bias of
      each expert is from changing the choice of each token, in the bins of
      `jaxroute.routing.bias_histogram`; else None.
  """

  load: PyTree
  histogram: PyTree = None

  @property
  def parts(self) -> "Parts | None":
    """Counts of shards that add up to these, or None if they are not known.

    A caller who has them can sum those of all layers in one all-reduce. They are no
    leaf of the pytree: `jax.tree.map`, `replace` and every transformation lose them.
    """
    return vars(self).get("_parts")

  def made_of(self, parts: "Parts | None") -> "Counts":
    """These counts, with `parts`.

    They are no field, so that counts made of these, which they may not add up to,
    have none, and so that the tree of `Counts` is the same on every mesh.

    Args:
      parts: what adds up to these counts, or None.

    Returns:
      `Counts`.
    """
    counts = dataclasses.replace(self)
    object.__setattr__(counts, "_parts", parts)
    return counts


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Parts:
  """What each of S token shards counted; `jaxroute.counts.sum_shards` sums them.

  Attributes:
    load: `[S, E]` int32, or a pytree of `[..., S, E]` arrays, sharded over S.
    histogram: `[S, E, 16]` int32, or a pytree of `[..., S, E, 16]`; or None.
  """

  load: PyTree
  histogram: PyTree = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Routing:
  """What `jaxroute.route` decided for T tokens.

  Attributes:
    expert_idx: `[T, K]` int32. The chosen experts, best first: distinct within
      a token and in `[0, E)`. In a routing made by hand, any other index is of
      no expert: it is not dispatched, and counts as dropped.
    weights: `[T, K]` float32. From the *unbiased* scores; 0 where a token is
      masked, NaN where one of its chosen logits is NaN. The only field with a
      gradient.
    counts: `Counts`, with `[E]` int32 loads, over the tokens of `token_mask`.
    cutoff: `[T]` float32. The best selection score that was not chosen, the
      (K+1)-th; -inf if there is none.
    token_mask: `[T]` bool. The tokens that are counted and dispatched: those of
      the caller's mask without a NaN among their chosen logits.
    rank: `[T, K]` int32, if it was asked for and "pallas_gpu" did the routing; else
      None. How many assignments of the same expert come before, in order of the
      tokens; of a token that is not counted, how many of those. Under a partition,
      within a token shard. By it `jaxroute.dispatch.sort_by_expert` need not sort.
      It is of these experts and this mask: with others, set it to None.
  """

  expert_idx: jax.Array
  weights: jax.Array
  counts: Counts
  cutoff: jax.Array
  token_mask: jax.Array
  rank: jax.Array | None = None

  @property
  def load(self) -> jax.Array:
    """`[E]` int32. Assignments per expert: `counts.load`."""
    return self.counts.load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class MoEOutput:
  """What a Mixture-of-Experts layer did besides its output; for losses, logs.

  Attributes:
    routing: the routes taken.
    logits: `[T, E]` float32. What was routed; None if `fuse_projection`.
    group_sizes: `[E]` int32. Rows each expert processed: `routing.load` minus
      the drops.
  """

  routing: Routing
  logits: jax.Array | None
  group_sizes: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class RouterState:
  """The dual variables of all layers and what their next update needs.

  Attributes:
    expert_bias: `[Lyr, E]` float32, or a pytree of `[..., E]` arrays (a Flax
      collection, say). Added to the scores for selection only.
    counts: `Counts` since the last update: int32, loads shaped like
      `expert_bias`, histograms (for `jaxroute.dual.quantile`; else None) with
      an axis of 16 bins behind that.
    rule_state: the state of the dual rule, `rule.init(expert_bias)`.
  """

  expert_bias: PyTree
  counts: Counts
  rule_state: PyTree

  @property
  def load(self) -> PyTree:
    """int32, shaped like `expert_bias`: `counts.load`."""
    return self.counts.load


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertParams:
  """Parameters of E SwiGLU experts; of a dense SwiGLU without the E axis.

  Attributes:
    w_gate: `[E, D, F]`. Projection that `silu` is applied to.
    w_up: `[E, D, F]`. Projection it multiplies.
    w_down: `[E, F, D]`. Projection back to the model width.
  """

  w_gate: jax.Array
  w_up: jax.Array
  w_down: jax.Array
