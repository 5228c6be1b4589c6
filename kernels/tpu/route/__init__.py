# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Top-k routing on TPU: scores, choice, weights and loads in one pass.

The grid walks the tokens; a grid step routes one block of up to 1024 of them,
or two. A block is up to 8 columns of 128 tokens, and goes through the stages
below. Experts are cut into 8 parts of R = ceil(E / 8), one for each sublane of
a vector register. Two layouts of a register [8, 128] alternate:

  column  8 experts x 128 tokens of one column. Register r holds expert s R + r
          on sublane s, so that a sublane, or a segment of its experts, lies
          within one expert group.
  dense   8 columns x 128 tokens: one number for each of 1024 tokens.

To change the layout is to store registers and to load them with a stride. Loads
from rows a multiple of 8 apart meet in one memory bank, so every buffer has an
odd pitch.

  stage  function                   layout  reads              writes
  -----  -------------------------  ------  -----------------  ----------------
  start  layout.broadcast_bias      column  expert_bias (in)   bias, bias_row
  1      score.score_column         column  logits (in), bias  expert_logits,
                                                               logits, lists,
                                                               selection_scores,
                                                               row_max,
                                                               inverse_row_sum
  2      select.threshold           dense   lists              cutoff,
                                                               bound_not_below,
                                                               bound_above
  3      select.compare_column      column  selection_scores,  bits_not_below,
                                            bound_not_below,   bits_above
                                            bound_above
  4      select.break_ties          dense   bits_not_below,    bits_not_below
                                            bits_above
         select.extract_chosen      dense   what that returns  expert_idx
  5      weigh.gather_column        column  expert_idx,        chosen_logits
                                            logits
  6      weigh.weigh                dense   chosen_logits,     expert_idx,
                                            bias_row,          weights,
                                            row_max,           chosen, valid
                                            inverse_row_sum,
                                            token_mask (in)
  7      weigh.write_column         column  expert_idx,        expert_idx (out),
                                            weights, cutoff,   weights (out),
                                            chosen             cutoff (out),
                                                               chosen (out)
  8      count.count_chosen         column  bits_not_below,    counters
                                            valid
  9      histogram.store_cutoffs    dense   cutoff, valid      bound_above
         histogram.count_distances  column  selection_scores,  bin_counts
                                            bound_above
  next   projection.project         MXU     tokens (in),       projected_logits
                                            router_weight (in)
  flush  histogram.reduce_bins      column  bin_counts         histogram (out)
  end    count.write_load           column  counters           load (out)

Names are those of `refs.Scratch`; (in) and (out) mark operands and results.
Stage 9 and `flush` are there for `config.histogram`, `next` for
`project_and_route`. What the table does not say of a stage:

  1. Logits are transposed, scored and biased. The selection scores are stored,
     and every later stage reads them from there: none computes them again with
     other bits. A selection network keeps the K + 1 largest values of every
     sublane, no indices. Without groups, values that lost an early comparison
     are kept in separate, shorter lists, as fewer of them are wanted. Columns
     take turns in two buffers of transposed logits: with one for each, all
     transposes would come first, with nothing to do beside them.
  2. The 8 sublanes' lists are merged, each class with its own. A group's score
     is the sum of the heads of its list; a group that is not kept is taken out
     as a whole. The last merge leaves the K-th largest value and the next, the
     cutoff.
  3. A score sets one bit if it is not below the K-th largest, and one if it is
     above: two words per sublane for every 32 registers.
  4. Where more than K are not below, as many of the equal ones as are wanted
     are taken from the lowest index on. That leaves K bits per token, in index
     order, which are extracted one by one, from both ends at once. The bits of
     several sublanes are packed into one word for that where they fit.
  6. The chosen experts are scored again, weighed and sorted by score. Only
     their order depends on the scores having the same bits as in stage 1.
  8. Counters are bit-sliced, and hold what was counted in all blocks so far.

No stage branches on the data: ties cost the same as none.

Memory: the block of logits twice (the pipeline's double buffer), once by
columns, and once more as selection scores: 4 MiB for 256 experts.

`project_and_route` makes the logits itself, a block ahead of the one that it
routes, so that the MXU and the vector units work at the same time: logits are
projected as soon as those of the block before have been read. The first grid
step routes zeros, which the second forgets.
"""

from jaxroute.kernels.tpu.route.call import Outputs, project_and_route, route
from jaxroute.kernels.tpu.route.plan import unsupported
from jaxroute.kernels.tpu.route.projection import (
  unsupported as unsupported_projection,
)

__all__ = [
  "Outputs",
  "project_and_route",
  "route",
  "unsupported",
  "unsupported_projection",
]
