# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The model of a core, against cycles counted by hand."""

import dataclasses

import gpu_core
import pytest

_CORE = gpu_core.Core(
  shared=23,
  load=400,
  copy=500,
  bytes_per_cycle=10.0,
  barrier=18,
  start=1000,
)


def _cycles(*lines, blocks=1, at_once=1, copy_bytes=(), core=_CORE):
  """Of code whose lines are control codes and an instruction."""
  code = [
    f"{line.split()[0]} /*{16 * i:04x}*/ {line.split(None, 1)[1]}"
    for i, line in enumerate([*lines, "-:-:-:Y:01 EXIT"])
  ]
  steps = gpu_core.path("\n".join(code))
  return gpu_core.cycles(steps, blocks, at_once, copy_bytes, core)


# The four warps of a block begin in the cycles 0 to 3.
@pytest.mark.parametrize(
  ("lines", "expected"),
  [
    # A stall of 4, and then EXIT.
    (["-:-:-:Y:04 MOV R1, R2"], 3 + 4),
    # The pipe of these is kept for two cycles,
    (["-:-:-:Y:01 FMNMX R1, R2, R3, PT"] * 3, 3 + 2 + 2 + 1),
    # and there are two of these,
    (["-:-:-:Y:01 FADD R1, R2, R3"] * 4, 3 + 4),
    # but one for integers.
    (["-:-:-:Y:01 IMAD R1, R2, R3, R4"] * 3, 3 + 2 + 2 + 1),
    (["-:-:-:Y:01 MUFU.EX2 R1, R2"] * 2, 3 + 8 + 1),
    # What is 128 bytes wide for every fourth of a warp takes four cycles of the
    # path that all warps share: the first have it until 4 + 3 * 4.
    (
      ["-:-:0:Y:01 LDS.128 R4, [R1]", "0:-:-:Y:01 FADD R1, R4, R4"],
      4 + 4 * 4 + 23 - 4 + 1,
    ),
    # A counter that nobody waits for.
    (["-:-:0:Y:01 LDG.E R4, desc[UR4][R2.64]"], 3 + 1),
    (
      ["-:-:3:Y:01 LDG.E R4, desc[UR4][R2.64]", "4&3:-:-:Y:01 MOV R1, R4"],
      3 + 4 + 1 + 400 - 4 + 1,
    ),
    # The counter of two is that of the later one.
    (
      [
        "-:-:3:Y:01 LDG.E R4, desc[UR4][R2.64]",
        "-:-:3:Y:01 S2R R6, SR_TID.X",
        "3:-:-:Y:01 MOV R1, R4",
      ],
      3 + 4 + 1 + 400 - 4 + 1,
    ),
    # Operands of a store may be overwritten when it has read them.
    (
      ["-:2:-:Y:01 STG.E desc[UR4][R2.64], R4", "0x04:-:-:Y:01 MOV R4, R1"],
      3 + 4 + 1 + 10 + 1,
    ),
    # All warps wait for the last.
    (["-:-:-:Y:05 BAR.SYNC.DEFER_BLOCKING 0x0"], 3 + 18),
  ],
)
def test_cycles_of_a_block(lines, expected):
  assert _cycles(*lines) == expected


def test_copies_arrive_in_turn():
  start = "-:-:-:Y:01 UTMALDG.2D [UR16], [UR6]"
  wait = "-:-:0:Y:02 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R0"
  # After it a warp looks again, if it has to; that is no step here.
  again = "-:-:0:Y:02 @!P1 SYNCS.PHASECHK.TRANS64 P1, [R3+URZ], R0"
  one = _cycles(start, wait, again, copy_bytes=[1000])
  assert one == 100 + 500 + 2
  # The second copy begins to arrive when the first has arrived.
  two = _cycles(start, start, wait, wait, copy_bytes=[1000, 2000])
  assert two == 100 + 200 + 500 + 2


def test_a_wait_for_no_copy_is_refused():
  wait = "-:-:0:Y:02 SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [R3+URZ], R0"
  with pytest.raises(ValueError, match="wait for more"):
    _cycles(wait)


def test_blocks_follow_each_other_or_share_the_core():
  lines = ["-:-:0:Y:01 LDG.E R4, desc[UR4][R2.64]", "0:-:-:Y:01 MOV R1, R4"]
  once = _cycles(*lines)
  assert _cycles(*lines, blocks=3) == 3 * once + 2 * 1000
  # Two wait for memory together.
  assert _cycles(*lines, blocks=2, at_once=2) < once + 20
  assert _cycles(*lines, blocks=3, at_once=2) == pytest.approx(
    2 * once + 1000, abs=20
  )


def test_what_only_ties_need_is_not_on_the_path():
  steps = gpu_core.path("""
    -:-:-:Y:01 /*0000*/ VOTE.ANY P0, P1
    -:-:-:Y:05 /*0010*/ @!P0 BRA `(.L_x_1)
    -:-:-:Y:01 /*0020*/ FADD R1, R2, R3
.L_x_1:
    -:-:-:Y:05 /*0030*/ EXIT
  """)
  assert [step.base for step in steps] == ["VOTE", "BRA", "EXIT"]


def test_code_without_control_codes_is_refused():
  with pytest.raises(ValueError, match="control codes"):
    gpu_core.path("/*0000*/ MOV R1, R2 ;\n/*0010*/ EXIT ;")


def test_microseconds():
  core = dataclasses.replace(_CORE, clock_ghz=2.0, launch_us=1.5)
  assert core.microseconds(3000) == 3.0
