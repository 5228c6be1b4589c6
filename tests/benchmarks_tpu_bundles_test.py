# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Counting the bundles of a kernel, as the TPU compiler lists them."""

import json

import pytest
import tpu_bundles
import tpu_cycles
import tpu_layer

from jaxroute.aot import tpu

# A grid of six steps. A step tests whether there is work, and whether a condition
# holds, under which a loop of seven bundles runs ten times.
_KERNEL = """
     0   :  { %s1 = smov 0 } /* Start region 1 */
   0x1 LB: > { %s2 = sphi %s1, %s3 } /* Start region 2 :: Start region 6 */
   0x2   : > { %4 = sbr.rel (%p1) target = $region5 }
   0x3   : > { %5 = dma.hbm_to_vmem /*hbm=*/%s5 /*
base_bounds: (8192, 16)
element_size_in_bytes: 2048 */ } /* End region 6 */
   0x4   : > {}
   0x5   :  {}
   0x6   : > {}
   0x7   : > { %v1 = vld [vmem:[%s1] sm:$0xff]  ;;  %s6 = smov 0 }
   0x8   : > { %6 = sbr.rel (%p2) target = $region4 }
   0x9   : > {}
   0xa   : > {}
   0xb   : > {}
   0xc   :  {}
   0xd LB: >> { %s7 = sphi %s6, %s8 } /* Start region 3 */
   0xe   : >> { %p3 = scmp.ge.s32.totalorder %s8, 10 /* loop exit test */ }
   0xf   : >> { %s8 = sadd.s32 1, %s7  ;;  %7 = sbr.rel (!%p3) target = $region3 }
  0x10   : >> {}
  0x11   : >> {}
  0x12   : >> {}
  0x13   : >> { %8 = vst [vmem:[%s1] sm:$0xff] %v1 } /* End region 3 */
  0x14 PF: > { %v2 = vld [vmem:[%s1] sm:$0xff] } /* Start/End empty region 4 */
  0x15 PF: > { %p4 = scmp.ge.s32.totalorder %s3, 6 /* loop exit test */ }
/* Start/End empty region 5 */
  0x16   : > { %9 = sbr.rel (!%p4) target = $region2 }
  0x17   : > {}
  0x18   : > {}
  0x19   : > {}
  0x1a   : > {} /* End region 2 */
  0x1b   :  { %10 = vsyncpa [#allocation6], 1 } /* End region 1 */
"""


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_loops_and_conditions_are_counted_out(share):
  once, step, loop = 2, 26 - 7, 7 * 10
  expected = once + 6 * (step + share * loop)
  assert tpu_bundles.count(_KERNEL, [share]) == expected


def test_what_cannot_be_counted_is_an_error():
  with pytest.raises(ValueError, match="expected 1 conditions.*got 2"):
    tpu_bundles.count(_KERNEL, [1, 1])
  with pytest.raises(ValueError, match="bundle 13 has no constant end"):
    tpu_bundles.count(_KERNEL.replace("%s8, 10 /*", "%s8, %s9 /*"), [1])


@pytest.mark.long
@pytest.mark.parametrize("program", ["combine", "swiglu"])
def test_no_count_of_a_layer_has_risen(program):
  pytest.importorskip("libtpu")
  tables = json.loads(tpu_cycles.TABLE.read_text())
  if tpu.version() not in tables:
    pytest.skip(f"nothing is recorded for libtpu {tpu.version()}")
  recorded = tables[tpu.version()][f"v6e {tpu_layer.CASE}"]
  found = tpu_layer.estimate("v6e", program)
  assert found["cycles"] < 1.1 * recorded[program]["cycles"]
