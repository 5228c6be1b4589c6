# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Counting sort of expert indices on TPU: the row of every assignment.

The row of an assignment in expert order is its expert's first row plus its rank
among that expert's assignments. A rank is a running count, and the MXU counts:
it multiplies the 0/1 matrix [experts, tokens], which says which token chose
which expert, by a triangle of ones. XLA would sort, or gather and scatter one
number at a time.

A grid block is up to 2048 tokens. It is cut into products, as many tokens as
the MXU multiplies at once, and these into columns of 128 tokens, one on each
lane. Choices, or experts, are on sublanes.

  stage | function | layout | reads | writes
  1 locate the choices | `_locate_choices` | [K, tokens of a block] |
    `expert_idx` | `word_and_sublane`, `bit_mask`, `expert`,
    `earlier_unassigned` as flags
  2 build the matrix | `_write_membership` | [experts / 2, 128] words |
    `word_and_sublane`, `bit_mask` | `membership`
  3 count choices of no expert | `_count_unassigned` | [1, 128] |
    `earlier_unassigned` | `earlier_unassigned` as counts, `num_unassigned`,
    `membership`
  4 count assignments | `multiply` | [experts, tokens of a product] |
    `membership` | counts, which it returns
  5 number assignments | `write_rows` | [8 choices, 128] | counts, `next_row`,
    `expert`, `earlier_unassigned`, `num_unassigned` | the rows

Stage 1 is done once a grid block, 4 once a product, the others once a column.
`count_assignments` does stages 1 to 4, with ones in place of the triangle, and
`assignment_rows` does all.

The matrix is made from words that have a bit for each of 32 experts, as
`bit_address` says. It holds 2.0 for 1, whose bfloat16 has a single bit, and
what it is multiplied by holds 0.5. The index E stands for no expert. A token
may have several choices of it, so index E has lines of its own, which hold
twice their number.
"""

from jaxroute.kernels.tpu.sort.call import (
  assignment_rows,
  count_assignments,
  unsupported,
)
from jaxroute.kernels.tpu.sort.plan import bit_address

__all__ = [
  "assignment_rows",
  "bit_address",
  "count_assignments",
  "unsupported",
]
