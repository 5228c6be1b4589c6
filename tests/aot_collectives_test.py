# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The collectives that compilers wrote, read and counted by hand."""

import pytest

from jaxroute.aot import collectives

pytestmark = pytest.mark.any_jax

MESH = {"data": 2, "expert": 4}


def _program(*lines, name="main", before=""):
  body = "\n".join(f"  {line}" for line in lines)
  return f"{before}\nENTRY %{name} (p: f32[]) -> f32[] {{\n{body}\n}}\n"


# As XLA writes one group of devices over "expert", three ways, over "data" and all.
@pytest.mark.parametrize(
  ("groups", "axes"),
  [
    ("replica_groups={{0,1,2,3},{4,5,6,7}}", ("expert",)),
    ("replica_groups=[2,4]<=[8]", ("expert",)),
    ("replica_groups=mesh['data'=2,'expert'=4] {'expert'}", ("expert",)),
    # Of the compiler's own names.
    ("replica_groups=mesh['axis_0'=8] {'axis_0'}", ("data", "expert")),
    ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", ("data",)),
    ("replica_groups={{0,4},{1,5},{2,6},{3,7}}", ("data",)),
    ("replica_groups=[4,2]<=[2,4]T(1,0)", ("data",)),
    ("replica_groups={}", ("data", "expert")),
    (
      "replica_groups=mesh['data'=2,'expert'=4] {'data','expert'}",
      ("data", "expert"),
    ),
  ],
)
def test_the_axes_of_a_collective_are_found(groups, axes):
  text = _program(
    "%x.1 = bf16[32,8]{1,0:T(8,128)(2,1)S(1)} parameter(0)",
    "%sum = bf16[32,8]{1,0:T(8,128)(2,1)} all-reduce(%x.1), channel_id=7,"
    f" {groups}, use_global_device_ids=true, to_apply=%add",
  )
  (found,) = collectives.read(text, MESH)
  assert found == collectives.Collective(
    "all-reduce", axes, "bf16[32,8]", 1, 512, False
  )
  group = 8 if len(axes) == 2 else MESH[axes[0]]
  assert found.sent(group) == 2 * (group - 1) / group * 512


def test_bytes_are_of_the_whole_array():
  groups = "replica_groups=[2,4]<=[8], use_global_device_ids=true"
  text = _program(
    "%x = f32[8,4]{1,0} parameter(0)",
    "%y = pred[16]{0} parameter(1)",
    f"%g = f32[32,4]{{1,0}} all-gather(%x), {groups}, dimensions={{0}}",
    f"%h = ((f32[8,4]), f32[32,4]) all-gather-start(%x), {groups}, dimensions={{0}}",
    "%i = f32[32,4]{1,0} all-gather-done(%h)",
    f"%s = f32[2,4]{{1,0}} reduce-scatter(%x), {groups}, dimensions={{0}}",
    f"%t = (f32[8,4], pred[16]) all-to-all(f32[8,4] %x, pred[16] %y), {groups}",
    "%p = (f32[8,4]{1,0}, f32[8,4]{1,0}, u32[]) collective-permute-start(%x),"
    " source_target_pairs={{0,1},{1,2},{4,5}}",
  )
  found = {(c.op, c.arrays): c for c in collectives.read(text, MESH)}
  assert {key: (c.count, c.bytes, c.sent(4)) for key, c in found.items()} == {
    ("all-gather", "f32[32,4]"): (2, 1024, 768),
    ("reduce-scatter", "f32[8,4]"): (1, 128, 96),
    ("all-to-all", "f32[8,4], pred[16]"): (1, 144, 108),
    ("collective-permute", "f32[8,4]"): (1, 128, 128),
  }


# One round: rows go into a buffer of 1.25 times as many, and come back.
_LOOP = """
%body (c: (s32[])) -> (s32[]) {
  %rows = bf16[1024,2,128]{2,1,0} parameter(0)
  %empty = bf16[1280,2,128]{2,1,0} custom-call(), custom_call_target="AllocateBuffer"
  %n = s32[32]{0:T(128)} parameter(1)
  %there = ((bf16[1024,2,128]{2,1,0}, bf16[1280,2,128]{2,1,0}, s32[32]{0}, s32[32]{0}, s32[32]{0}, /*index=5*/s32[32]{0}), bf16[1280,2,128]{2,1,0}, u32[]{:S(2)}) ragged-all-to-all-start(%rows, %empty, %n, %n, %n, /*index=5*/%n), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
  %got = bf16[1280,2,128]{2,1,0} ragged-all-to-all-done(%there)
  ROOT %back = bf16[1024,2,128]{2,1,0} ragged-all-to-all(%got, %rows, %n, %n, %n, /*index=5*/%n), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
}

%all-reduce-scatter (input: bf16[64,8]) -> bf16[16,8] {
  %input = bf16[64,8]{1,0} parameter(0)
  %all = bf16[64,8]{1,0} all-reduce(%input), replica_groups={{0,1,2,3},{4,5,6,7}}
  ROOT %own = bf16[16,8]{1,0} dynamic-slice(%all)
}
"""  # noqa: E501


def test_a_ragged_exchange_counts_its_rows_once_a_round():
  text = _program(
    "%c = (s32[]) parameter(0)",
    "%loop = (s32[]) while(%c), condition=%more, body=%body",
    before=_LOOP,
  )
  ragged, scattered = collectives.read(text, MESH)
  # 1,024 rows of 256 bfloat16, there and back.
  assert ragged == collectives.Collective(
    *("ragged-all-to-all", ("expert",), "bf16[1024,2,128]", 2),
    bytes=2 * 1024 * 256 * 2,
    in_loop=True,
  )
  # An all-reduce of which a fusion keeps a part.
  assert scattered == collectives.Collective(
    "reduce-scatter", ("expert",), "bf16[64,8]", 1, 1024, False
  )
