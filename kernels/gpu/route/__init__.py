# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing on GPU: scores, choice, weights and loads in one pass.

A token is shared by L threads, `Plan.lanes`: each has a *row* of E / L experts, its
*part* of them. A block has 128 threads and so 128 rows, a *tile* of 128 / L tokens.
With `[T, E]` logits taken as `[T L, E / L]`, row r of memory is row r of its tile.
Almost all work is on a thread's own row, without a word to another: lists of the
largest scores are sorted and merged by selection networks, in registers, and the
experts are found by bits. L is small where there are many tokens, and 8 where there
are few.

  stage  function                reads              writes
  -----  ----------------------  -----------------  ----------------------------------
  start  score.start_copies      rows (in)          logits
         score.load_bias         expert_bias (in)   expert_bias
  1      score.softmax_sums      logits             softmax_sums, selection_scores
         score.score_chunk       logits,            selection_scores
                                 expert_bias
  2      select.threshold        selection_scores   lists
         weigh.write_cutoff                         cutoff (out)
  3      select.choose           selection_scores   bits, chosen
  4      weigh.weigh             chosen, logits (in),  chosen, is_counted;
                                 expert_bias,       expert_idx, weights, token_mask,
                                 softmax_sums,      chosen (out)
                                 token_mask (in)
  5      count.transpose_chosen  is_counted         bits
         count.count             bits               ranks; load, counts, span_counts
                                                    (out)
  6      count.write_ranks       bits, ranks,       rank (out)
                                 chosen
  7      histogram.write_distances  selection_scores,  distances
                                 is_counted
         histogram.count         distances          histogram (out)

Names are those of `refs.Buffers`, in shared memory; (in) and (out) mark operands and
results, in global memory. Stages 6 and 7 are there if ranks and a histogram are asked
for; 7 runs around the barrier of 5. What the table does not say of a stage:

  start  Chunks of up to 32 experts of all rows arrive one by one, each with a barrier
         of its own, so that stage 1 begins with the first.
  1, 2   A chunk is scored, written back, and its K + 1 largest values are merged into
         those of the row so far: no indices. With groups every group has a list, and
         the lists of groups that are not kept count as -inf. The lists of a token's
         rows are merged last, by exchanges within the warp.
  3      A score sets a bit if it is not below the K-th largest. If a token has more
         than K bits, the warp compares again, and of the equals of the K-th those of
         the lowest index stay. The experts of a token come out in order of their
         index, its rows one after the other.
  4      Now a thread has one of the K experts of a token. It scores it again, from the
         logit in global memory, finds its place among the K by comparing, and writes
         the results to it.
  5      A transpose of 32 by 32 bits in every warp turns a word for each row with a
         bit for each expert into the opposite; ones are counted. A block adds its
         counts to the load of all. Sums of integers do not depend on the order.
  6      The ones before a row, and those of the warps before, make the rank of an
         assignment in its tile. `order.rank` adds what the tiles before have.
  7      As in 5, but for five bits of every expert, and the bins are counted that
         they make.

Blocks do not wait for each other. Within a block, warps wait three times: for the
bias, for all bits of stage 5, and for the sums of stage 6. Stages 3 and 4 exchange by
shared memory within a warp only.

Memory: the logits of a tile once, 64 KiB / L for 128 experts, if these are float32.
"""

from jaxroute.kernels.gpu.route.call import Outputs, route
from jaxroute.kernels.gpu.route.lanes import unsupported

__all__ = ["Outputs", "route", "unsupported"]
