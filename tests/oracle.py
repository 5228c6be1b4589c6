# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The slow NumPy meaning of every operation: loops over tokens and experts.

Nothing here is shared with the package but `RouterConfig`. Tested itself
against numbers computed by hand, in oracle_test.py.
"""

import itertools
import math

import numpy as np

F32 = np.float32


def score(logits, score_fn):
  """Scores of one row of prepared logits, in float64 rounded to float32."""
  x = np.asarray(logits, np.float64)
  out = np.full(x.shape, np.nan)
  if score_fn == "softmax":
    finite = [v for v in x if not math.isnan(v)]
    peak = max(finite, default=0.0)
    if peak == math.inf:
      return out.astype(F32)
    peak = 0.0 if peak == -math.inf else peak
    total = sum(math.exp(v - peak) for v in finite)
  for e, v in enumerate(x):
    if math.isnan(v):
      continue
    if score_fn == "softmax":
      out[e] = math.exp(v - peak) / (total or 1.0)
    elif score_fn == "sigmoid":
      out[e] = 1 / (1 + math.exp(-v)) if v > -700 else 0.0
    else:
      out[e] = math.sqrt(v if v > 700 else math.log1p(math.exp(v)))
  return out.astype(F32)


def log_score(logits, score_fn):
  """Logarithms of the scores of one row of prepared logits, in float64."""
  x = np.asarray(logits, np.float64)
  if score_fn == "softmax":
    finite = [v for v in x if v > -math.inf]
    peak = max(finite, default=0.0)
    return (x - peak) - math.log(sum(math.exp(v - peak) for v in finite) or 1.0)
  out = np.full(x.shape, np.nan)
  for e, v in enumerate(x):
    if score_fn == "sigmoid":
      out[e] = min(v, 0.0) - math.log1p(math.exp(-abs(v)))
    elif v < -40:
      out[e] = v / 2
    elif not math.isnan(v):
      out[e] = math.log(v if v > 700 else math.log1p(math.exp(v))) / 2
  return out


def chosen_weights(row, ids, config):
  """Weights of the chosen experts of one row of prepared logits, in float64."""
  if config.score_after_top_k:
    log = log_score(row[ids], config.score_fn)
  else:
    log = log_score(row, config.score_fn)[ids]
  shift = total = 0.0
  if config.normalize_weights:
    eps = math.log(config.norm_eps) if config.norm_eps else -math.inf
    shift = max([*log, eps])
    if shift == -math.inf:  # all masked
      return np.zeros(len(ids))
    total = sum(math.exp(v - shift) for v in [*log, eps])
  share = np.array([math.exp(v - shift) for v in log])
  return config.scaling_factor * share / (total or 1.0)


def weights_gradient(row, ids, config, d_weights):
  """The gradient of `chosen_weights` to a row of finite logits, in float64."""
  weights = chosen_weights(row, ids, config)
  d_log = weights * d_weights
  if config.normalize_weights:
    d_log = d_log - weights * np.sum(d_log) / config.scaling_factor
  out = np.zeros(len(row))
  out[ids] = d_log
  if config.score_fn == "softmax":
    among = ids if config.score_after_top_k else np.arange(len(row))
    out[among] -= np.exp(log_score(row[among], "softmax")) * np.sum(d_log)
    return out
  for e in ids:
    v = float(row[e])
    if config.score_fn == "sigmoid":
      out[e] *= math.exp(log_score([-v], "sigmoid")[0])
    else:  # the slope of log(sqrt(log(1 + exp(v))))
      log = log_score([v], "sqrtsoftplus")[0]
      out[e] *= 0.5 * math.exp(log_score([v], "sigmoid")[0] - 2 * log)
  return out


def prepare_logits(logits, config):
  """Multiplier and soft cap; -inf stays -inf."""
  x = np.asarray(logits, F32) * F32(config.logit_multiplier)
  if config.logit_soft_cap is not None:
    cap = F32(config.logit_soft_cap)
    x = np.where(x == -np.inf, x, cap * np.tanh(x / cap))
  return x.astype(F32)


def selection_scores(logits, expert_bias, config):
  """[T, E] selection scores, -inf for masked and NaN experts."""
  logits = prepare_logits(logits, config)
  out = np.empty(logits.shape, F32)
  for i, row in enumerate(logits):
    if not (config.score_after_top_k or config.bias_space == "logits"):
      base = score(row, config.score_fn)
    else:
      base = row
    for e in range(len(row)):
      value = F32(base[e] + (0 if expert_bias is None else expert_bias[e]))
      masked = row[e] == -np.inf or np.isnan(value)
      out[i, e] = -np.inf if masked else value
  return out


def best(values, count):
  """Indices of the `count` largest values, best first, lowest index on ties."""
  left = list(range(len(values)))
  chosen = []
  for _ in range(count):
    top = left[0]
    for e in left:
      if values[e] > values[top]:
        top = e
    chosen.append(top)
    left.remove(top)
  return chosen


def group_score(members, config):
  """What one group of selection scores is worth."""
  count = {
    "top1": 1,
    "top2": 2,
    "top_k": config.top_k // config.group_top_k,
  }[config.group_score]
  order = best(members, count)
  total = members[order[0]]
  if total == np.inf:
    return total
  for e in order[1:]:
    total = F32(total + members[e])
  return total


def within_groups(row, config):
  """Selection scores of one token, -inf outside its best groups."""
  row = np.array(row, F32)
  if config.num_groups > 1:
    groups = row.reshape(config.num_groups, -1)
    worth = [group_score(g, config) for g in groups]
    kept = best(worth, config.group_top_k)
    for g in set(range(config.num_groups)) - set(kept):
      groups[g] = -np.inf
  return row


def select(selection, config):
  """Chosen experts [T, K] and cutoff [T] for given selection scores."""
  ids, cutoffs = [], []
  for row in selection:
    row = within_groups(row, config)
    if config.top_k < config.num_experts:
      *chosen, runner_up = best(row, config.top_k + 1)
      cutoffs.append(row[runner_up])
    else:
      chosen = best(row, config.top_k)
      cutoffs.append(-np.inf)
    ids.append(chosen)
  return (
    np.array(ids, np.int32).reshape(-1, config.top_k),
    np.array(cutoffs, F32),
  )


def route(logits, expert_bias, config, token_mask=None, expert_idx=None):
  """(expert_idx, weights, load, cutoff, token_mask) of a batch.

  `expert_idx`, if given, is taken as the choice instead of being worked out.
  """
  prepared = prepare_logits(logits, config)
  ids, cutoff = select(selection_scores(logits, expert_bias, config), config)
  ids = ids if expert_idx is None else np.asarray(expert_idx)
  t = len(prepared)
  mask = np.ones(t, bool) if token_mask is None else np.array(token_mask)
  weights = np.zeros((t, config.top_k), F32)
  load = np.zeros(config.num_experts, np.int32)
  for i in range(t):
    if not mask[i]:
      continue
    if np.isnan(prepared[i][ids[i]]).any():
      weights[i] = np.nan
      mask[i] = False
      continue
    weights[i] = chosen_weights(prepared[i], ids[i], config)
    for e in ids[i]:
      load[e] += 1
  return ids, weights, load, cutoff, mask


UPPER_EDGES = [2.0 ** (3 * i - 16) for i in range(8)]


def histogram(selection, config, token_mask):
  """[E, 16] counts of the tokens by how far an expert is from their cutoff."""
  counts = np.zeros((config.num_experts, 16), np.int32)
  _, cutoff = select(selection, config)
  for i, row in enumerate(selection):
    row = within_groups(row, config)
    for e, value in enumerate(row):
      if not token_mask[i] or value == -np.inf:
        continue
      distance = F32(cutoff[i] - value)
      size = sum(abs(distance) >= edge for edge in UPPER_EDGES[:-1])
      counts[e, 8 + size if distance >= 0 else 7 - size] += 1
  return counts


def ranks(expert_idx, counted):
  """[T, K] int32: how many of the same expert, or of no expert, come before.

  Args:
    expert_idx: [T, K].
    counted: [T] bool. Assignments of the others are of no expert.
  """
  seen, found = {}, np.zeros(expert_idx.shape, np.int32)
  for (token, choice), expert in np.ndenumerate(expert_idx):
    expert = expert if counted[token] else -1
    found[token, choice] = seen.get(expert, 0)
    seen[expert] = found[token, choice] + 1
  return found


def quantile_step(price, rank):
  """[E] elements of a rank in every column of [T, E], inf left out."""
  found = []
  for column in price.T:
    column = sorted(x for x in column if x < np.inf)
    found.append(column[min(rank, len(column) - 1)])
  return np.array(found)


def sort_by_expert(expert_idx, num_experts, token_mask=None, capacity=None):
  """(permutation, inverse_permutation, group_sizes) by filling buckets."""
  t, k = np.shape(expert_idx)
  buckets = [[] for _ in range(num_experts + 1)]
  for i in range(t):
    for j in range(k):
      e = expert_idx[i][j]
      masked = token_mask is not None and not token_mask[i]
      if not 0 <= e < num_experts:  # of no expert that is here
        e = num_experts
      full = capacity is not None and len(buckets[e]) >= capacity
      buckets[num_experts if full or masked else e].append(i * k + j)
  permutation = np.array([n for b in buckets for n in b], np.int32)
  inverse = np.empty_like(permutation)
  for row, n in enumerate(permutation):
    inverse[n] = row
  sizes = np.array([len(b) for b in buckets[:-1]], np.int32)
  return permutation, inverse, sizes


def exchanged(expert_idx, counted, num_experts, devices, size, exchange):
  """Which assignments fit one round of an exchange, `[T, K]` bool.

  The tokens lie on so many devices, one part after the other, and so do the experts.
  A device takes `size` rows, by expert and then by sender, if the exchange is
  "ragged". If it is "equal" it takes its share of them from each sender, by expert.
  """
  kept = np.zeros(expert_idx.shape, bool)
  taken = np.zeros((devices, devices), int)
  share = -(-size // devices)
  tokens, top_k = expert_idx.shape
  for expert in range(num_experts):
    receiver = expert * devices // num_experts
    for t in range(tokens):
      sender = t * devices // tokens
      for k in range(top_k):
        if not counted[t] or expert_idx[t, k] != expert:
          continue
        if exchange == "ragged":
          fits = taken[:, receiver].sum() < size
        else:
          fits = taken[sender, receiver] < share
        kept[t, k] = fits
        taken[sender, receiver] += fits
  return kept


def grouped_matmul(lhs, rhs, group_sizes):
  """Row i times the matrix of the group that owns it; 0 past the groups."""
  out = np.zeros((lhs.shape[0], rhs.shape[2]), F32)
  row = 0
  for e, size in enumerate(group_sizes):
    for _ in range(size):
      out[row] = lhs[row].astype(np.float64) @ rhs[e].astype(np.float64)
      row += 1
  return out


def moe(x, w_gate, w_up, w_down, ids, weights, kept):
  """Weighted sum of SwiGLU experts over the kept assignments of each token."""
  out = np.zeros(x.shape, np.float64)
  for i in range(x.shape[0]):
    for j, e in enumerate(ids[i]):
      if np.isnan(weights[i, j]):
        out[i] = np.nan
      if not kept[i, j]:
        continue
      gate = x[i].astype(np.float64) @ w_gate[e]
      hidden = gate / (1 + np.exp(-gate)) * (x[i] @ w_up[e])
      out[i] += weights[i, j] * (hidden @ w_down[e])
  return out.astype(F32)


def violation(load):
  """(load - mean) / mean per row of [..., E]; 0 where nothing was counted."""
  load = np.asarray(load, np.float64)
  mean = load.mean(-1, keepdims=True)
  safe = np.where(mean == 0, 1, mean)
  return np.where(mean == 0, 0, (load - mean) / safe).astype(F32)


def dual_value(scores, bias, top_k):
  """Sum of each token's K best of scores + bias, less the mean load of bias."""
  scores = np.asarray(scores, np.float64)
  t, e = scores.shape
  total = sum(sum(sorted(row + bias)[-top_k:]) for row in scores)
  return total - t * top_k / e * np.sum(bias)


def best_assignment(scores, top_k):
  """The best balanced assignment of all there are: its value and 0/1 [T, E]."""
  tokens, experts = np.shape(scores)
  capacity = tokens * top_k // experts
  best, best_x = -math.inf, None
  choices = list(itertools.combinations(range(experts), top_k))
  for chosen in itertools.product(choices, repeat=tokens):
    x = np.zeros((tokens, experts))
    for i, experts_of_i in enumerate(chosen):
      x[i, list(experts_of_i)] = 1
    value = float((x * np.asarray(scores, np.float64)).sum())
    if (x.sum(0) == capacity).all() and value > best:
      best, best_x = value, x
  return best, best_x
