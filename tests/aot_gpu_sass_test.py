# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The instructions that a warp executes, in disassemblies by hand."""

import re

import pytest

from jaxroute.aot import gpu_sass

# A wait, four trips of a loop whose counter moves through a predicate, and an
# if of one instruction: 3 + 1 + 4 * 6 + 3. What waits is out of line.
_SASS = """
   /*0000*/                   UMOV UR4, URZ ;
.L_x_1:
   /*0010*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R64+URZ], R3 ;
   /*0020*/              @!P0 BRA `(.L_x_1) ;
   /*0030*/                   HFMA2.MMA R8, -RZ, RZ, 0, 1.9073486328125e-06 ;
.L_x_2:
   /*0040*/                   UIADD3 UR4, UR4, 0x4000, URZ ;
   /*0050*/                   LDS.128 R16, [R74+UR5] ;
   /*0060*/                   UISETP.NE.U32.AND UP0, UPT, UR4, 0x10000, UPT ;
   /*0070*/                   IADD3 R8, P1, R8.reuse, -0x8, RZ ;
   /*0080*/                   PLOP3.LUT P0, PT, PT, PT, UP0, 0x80, 0x0 ;
   /*0090*/               @P0 BRA `(.L_x_2) ;
   /*00a0*/                   ISETP.GT.AND P2, PT, {compared}, 0x3, PT ;
   /*00b0*/               @P2 BRA `({label}) ;
   /*00c0*/                   NOP ;
.L_x_3:
   /*00d0*/                   EXIT ;
.L_x_4:
   /*00e0*/                   NANOSLEEP 0x989680 ;
   /*00f0*/                   BRA `(.L_x_1) ;
"""


@pytest.mark.parametrize(
  ("compared", "label"),
  [("R8", ".L_x_3"), ("R16", ".L_x_3"), ("R8", ".L_x_2")],
)
def test_instructions_are_counted_by_the_trips_of_their_loops(compared, label):
  # R8 starts as the float16 of bits 32, and ends as 0.
  text = _SASS.format(compared=compared, label=label)
  assert gpu_sass.executed(text) == 4 + 4 * 6 + 3


def test_a_loop_whose_trips_depend_on_data_is_not_counted():
  text = _SASS.format(compared="R16", label=".L_x_2")
  with pytest.raises(ValueError, match=re.escape(".L_x_2")):
    gpu_sass.executed(text)


_VOTE = """
   -:-:0:Y:01 /*0000*/                   VOTE.ANY P0, P1
   -:-:-:Y:05 /*0010*/              @!P0 BRA `(.L_x_1)
   -:-:-:Y:01 /*0020*/                   FADD R1, R2, R3
   -:-:-:Y:01 /*0030*/                   NOP
.L_x_1:
   -:-:-:Y:05 /*0040*/                   EXIT
"""


@pytest.mark.parametrize(
  ("votes", "expected"), [(0, "VOTE BRA EXIT"), (1, "VOTE BRA FADD NOP EXIT")]
)
def test_a_vote_decides_which_path_is_walked(votes, expected):
  steps = gpu_sass.walk(_VOTE, votes)
  assert [step.base for step in steps] == expected.split()
  assert steps[0].control == "-:-:0:Y:01"
  assert steps[1].predicate == "!P0"


def test_the_longer_path_of_a_vote_is_counted():
  assert gpu_sass.executed(_VOTE) == 4
