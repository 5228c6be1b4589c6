# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The machine that runs PTX: values by hand, and what it has to find."""

import numpy as np
import pytest
from ptx import machine, memory, program, transfers

_HEAD = """
.visible .entry test(
	.param .u64 test_param_0,
	.param .u64 test_param_1
)
.maxntid {threads}, 1, 1
{{
	ld.param.b64 	%rd1, [test_param_0];
	mov.u32 	%r1, %tid.x;
	mul.wide.u32 	%rd2, %r1, 4;
	add.s64 	%rd1, %rd1, %rd2;
	ld.global.b32 	%r2, [%rd1];
	mov.b64 	%rd5, __dynamic_shmem__0;
	add.s64 	%rd3, %rd5, %rd2;
{body}
	ret;
$L__func_end0:
}}
"""
# An exchange with the next lane, or with the next warp.
_NEIGHBOR = """
	st.shared.b32 	[%rd3], %r2;
	{barrier}
	xor.b32 	%r3, %r1, {distance};
	mul.wide.u32 	%rd4, %r3, 4;
	add.s64 	%rd4, %rd5, %rd4;
	ld.shared.b32 	%r2, [%rd4];
	st.global.b32 	[%rd1], %r2;
"""
_BLOCK, _WARP = "bar.sync \t0;", "bar.warp.sync \t-1;"


def _run(body, x, threads=64, shared=1024, tensor=None, blocks=1):
  """What a cluster makes of an array in place; `%r2` is a thread's, `%rd1` where."""
  ram = memory.Global()
  address = ram.add(x)
  maps = {}
  if tensor is not None:
    maps[1 << 30] = transfers.TensorMap(base=address, kind=3, **tensor)
  machine.Launch(
    program=program.parse(_HEAD.format(threads=threads, body=body)),
    grid=(blocks, 1, 1),
    cluster=blocks,
    shared_bytes=shared,
    params={"test_param_0": address, "test_param_1": 1 << 30},
    maps=maps,
    memory=ram,
  ).run()
  return ram.read(address).view(x.dtype).reshape(x.shape)


def _compute(*lines, x, result="%r2"):
  body = ";\n".join((*lines, f"st.global.b32 [%rd1], {result};"))
  return _run(body, x, threads=len(x))


def _floats(*values):
  return np.resize(np.array(values, np.float32), 32)


def test_a_fused_product_is_rounded_once():
  x = _floats(1 + 2**-12, 3.0)
  lines = "neg.f32 %r3, %r2", "fma.rn.f32 %r2, %r2, %r2, %r3"
  expected = (x.astype(np.float64) ** 2 - x).astype(np.float32)
  np.testing.assert_array_equal(_compute(*lines, x=x), expected)


def test_rounding_down_goes_down():
  # 2^23 + 0.75 and -2^23 - 0.75, which float32 does not have.
  found = _compute(
    "fma.rm.f32 %r2, %r2, 0f3F800000, 0f3F400000", x=_floats(2**23)
  )
  np.testing.assert_array_equal(found, 2**23)
  found = _compute(
    "fma.rm.f32 %r2, %r2, 0f3F800000, 0fBF400000", x=_floats(-(2**23))
  )
  np.testing.assert_array_equal(found, -(2**23) - 1)


def test_a_result_that_is_no_number_is_that_of_a_gpu():
  found = _compute("sub.f32 %r2, %r2, %r2", x=_floats(np.inf))
  np.testing.assert_array_equal(found.view(np.uint32), 0x7FFFFFFF)


def test_the_nearest_bfloat16_is_the_even_one():
  x = _floats(1 + 2**-8, 1 + 3 * 2**-8, -2.5)
  found = _compute("cvt.rn.bf16x2.f32 %r2, %r2, %r2", x=x).view(np.uint32)
  expected = np.resize(np.array([0x3F80, 0x3F82, 0xC020], np.uint32), 32)
  np.testing.assert_array_equal(found, expected << 16 | expected)


@pytest.mark.parametrize(
  ("line", "expected"),
  [
    ("shl.b32 %r2, %r2, 33", lambda x: 0 * x),
    ("shr.s32 %r2, %r2, 40", lambda x: np.where(x < 0, -1, 0)),
    ("shf.l.wrap.b32 %r2, %r2, 5, 4", lambda x: 80 + (x >> 28 & 15)),
    ("bfe.s32 %r2, %r2, 0, 1", lambda x: [-1, -1, 0, 0] * 8),
    ("bfe.u32 %r2, %r2, 1, 2", lambda x: [0, 0, 1, 0] * 8),
    ("popc.b32 %r2, %r2", lambda x: np.bitwise_count(x.view(np.uint32))),
    ("clz.b32 %r2, %r2", lambda x: [0, 31, 30, 32] * 8),
    ("mul.hi.s32 %r2, %r2, 1073741824", lambda x: x >> 2),
    (
      "cvt.s64.s32 %rd7, %r2;\nmul.hi.u64 %rd7, %rd7, %rd7;\ncvt.u32.u64 %r2, %rd7",
      lambda x: [-14, 0, 0, 0] * 8,
    ),
    ("div.s32 %r2, %r2, 2", lambda x: [-3, 0, 1, 0] * 8),
    ("rem.s32 %r2, %r2, 2", lambda x: [-1, 1, 0, 0] * 8),
    ("shfl.sync.bfly.b32 %r2, %r2, 1, 31, -1", lambda x: [1, -7, 0, 2] * 8),
    ("shfl.sync.idx.b32 %r2, %r2, 2, 31, -1", lambda x: 0 * x + 2),
    (
      "setp.lt.s32 %p1, %r2, 0;\nvote.sync.ballot.b32 %r2, %p1, -1",
      lambda x: 0 * x + 0x11111111,
    ),
    (
      "setp.eq.s32 %p1, %r2, -7;\nvote.sync.any.pred %p1, %p1, -1;\n"
      "selp.b32 %r2, 5, 6, %p1",
      lambda x: 0 * x + 5,
    ),
    (
      "setp.eq.s32 %p1, %r2, 9;\nvote.sync.any.pred %p1, %p1, -1;\n"
      "selp.b32 %r2, 5, 6, %p1",
      lambda x: 0 * x + 6,
    ),
  ],
)
def test_integers(line, expected):
  x = np.resize(np.array([-7, 1, 2, 0], np.int32), 32)
  found = _compute(line, x=x)
  np.testing.assert_array_equal(found, np.array(expected(x)).astype(np.int32))


def test_lanes_that_part_meet_again():
  # Odd lanes count to their own number, even ones take 100.
  body = """
	and.b32 	%r3, %r1, 1;
	setp.eq.b32 	%p1, %r3, 0;
	mov.b32 	%r2, 0;
	@%p1 bra 	$L__even;
	bra.uni 	$L__enter;
$L__loop:
	add.s32 	%r2, %r2, 1;
$L__enter:
	setp.lt.s32 	%p2, %r2, %r1;
	@%p2 bra 	$L__loop;
	bra.uni 	$L__end;
$L__even:
	mov.b32 	%r2, 100;
$L__end:
	shfl.sync.bfly.b32 	%r2, %r2, 1, 31, -1;
	st.global.b32 	[%rd1], %r2;
"""
  lane = np.arange(32)
  expected = np.where(lane % 2 == 0, lane + 1, 100)
  found = _run(body, np.zeros(32, np.int32), threads=32)
  np.testing.assert_array_equal(found, expected)


def test_a_barrier_in_both_arms_of_a_branch_hangs():
  body = """
	and.b32 	%r3, %r1, 1;
	setp.eq.b32 	%p1, %r3, 0;
	@%p1 bra 	$L__even;
	bar.sync 	0;
	bra.uni 	$L__end;
$L__even:
	bar.sync 	0;
$L__end:
"""
  with pytest.raises(memory.Fault, match="wait for each other"):
    _run(body, np.zeros(64, np.int32))


def test_a_barrier_that_a_warp_does_not_reach_hangs():
  body = """
	setp.lt.u32 	%p1, %r1, 32;
	@%p1 bra 	$L__end;
	bar.sync 	0;
$L__end:
"""
  with pytest.raises(memory.Fault, match="hangs"):
    _run(body, np.zeros(64, np.int32))


@pytest.mark.parametrize(
  ("barrier", "distance"), [(_BLOCK, 1), (_BLOCK, 32), (_WARP, 1)]
)
def test_threads_exchange_over_a_barrier(barrier, distance):
  x = np.arange(64, dtype=np.int32)
  found = _run(_NEIGHBOR.format(barrier=barrier, distance=distance), x)
  np.testing.assert_array_equal(found, x ^ distance)


@pytest.mark.parametrize(
  ("barrier", "distance"), [("", 1), ("", 32), (_WARP, 32)]
)
def test_without_a_barrier_that_is_a_race(barrier, distance):
  body = _NEIGHBOR.format(barrier=barrier, distance=distance)
  with pytest.raises(memory.Fault, match="race"):
    _run(body, np.arange(64, dtype=np.int32))


@pytest.mark.parametrize("barrier", ["", _WARP])
def test_a_write_over_what_others_read_is_a_race(barrier):
  body = _NEIGHBOR.format(barrier=_BLOCK, distance=32) + barrier
  body += "\n\tst.shared.b32 \t[%rd3], %r2;"
  with pytest.raises(memory.Fault, match="race"):
    _run(body, np.arange(64, dtype=np.int32))


@pytest.mark.parametrize(
  ("line", "reason"),
  [
    ("ld.global.b32 %r3, [%rd1+4]", "global memory ends at byte 256"),
    ("ld.global.b32 %r3, [%rd1+-2]", "no multiples of 4"),
    ("st.shared.b32 [%rd3+1024], %r2", "shared memory has 1024 bytes"),
    ("st.shared.b32 [__dynamic_shmem__0], %r2", "same shared address"),
    ("mov.b32 %r3, %r9", "was not written"),
    (
      "st.global.b32 [%rd1], %r2;\nld.global.b32 %r3, [%rd1+-4]",
      "race: global",
    ),
  ],
)
def test_what_is_not_there_is_a_fault(line, reason):
  with pytest.raises(memory.Fault, match=reason):
    _run(line + ";", np.zeros(64, np.int32))


# Rows of 32 words from row 8 on, to the shared memory, by one thread of 32.
_COPY = """
	ld.param.b64 	%rd6, [test_param_1];
	setp.eq.u32 	%p1, %r1, 0;
	mov.b32 	%r4, 8;
	mov.b32 	%r5, 0;
	@%p1 mbarrier.init.shared.b64 [__dynamic_shmem__0+2048], 1;
	bar.sync 	0;
	@%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64
	  _, [__dynamic_shmem__0+2048], {bytes};
	@%p1 cp.async.bulk.tensor.2d.shared::cta.global.mbarrier::complete_tx::bytes
	  [__dynamic_shmem__0], [%rd6, {{%r5,%r4}}], [__dynamic_shmem__0+2048];
	{wait}
	ld.shared.b32 	%r2, [%rd3+128];
	st.global.b32 	[%rd1], %r2;
"""
_WAIT = """{
	.reg .pred P1;
	LAB_WAIT:
	mbarrier.try_wait.parity.shared.b64 P1, [__dynamic_shmem__0+2048], 0, 100;
	@P1 bra.uni DONE;
	bra.uni LAB_WAIT;
	DONE:
	}"""
_ROWS = dict(sizes=(10, 32), strides=(32, 1), box=(4, 32))


def _copy(wait, swizzle, expected_bytes=512):
  x = np.arange(320, dtype=np.int32).reshape(10, 32)
  body = _COPY.format(bytes=expected_bytes, wait=wait)
  tensor = _ROWS | dict(swizzle=swizzle)
  return _run(body, x, threads=32, shared=2056, tensor=tensor)[0]


def test_a_copy_brings_a_box():
  np.testing.assert_array_equal(_copy(_WAIT, 16), 9 * 32 + np.arange(32))


def test_a_swizzle_moves_pieces_of_16_bytes():
  piece, word = np.divmod(np.arange(32), 4)
  # Row 1 of the pattern: pieces change places in pairs.
  expected = 9 * 32 + (piece ^ 1) * 4 + word
  np.testing.assert_array_equal(_copy(_WAIT, 128), expected)


def test_a_copy_that_is_not_waited_for_is_a_race():
  with pytest.raises(memory.Fault, match="race"):
    _copy("", 16)


def test_a_wait_for_more_bytes_than_come_hangs():
  with pytest.raises(memory.Fault, match="hangs"):
    _copy(_WAIT, 16, expected_bytes=516)


# Two blocks of a warp. Block 0 copies a row to both, and both write what they got.
_PAIR = """
	ld.param.b64 	%rd6, [test_param_1];
	mov.u32 	%r4, %cluster_ctaid.x;
	mul.lo.s32 	%r5, %r4, 128;
	cvt.u64.u32 	%rd7, %r5;
	add.s64 	%rd1, %rd1, %rd7;
	setp.eq.u32 	%p1, %r1, 0;
	setp.eq.u32 	%p2, %r4, 0;
	and.pred 	%p2, %p2, %p1;
	mov.b32 	%r5, 8;
	mov.b32 	%r6, 0;
	mov.b16 	%rs1, 3;
	@%p1 mbarrier.init.shared.b64 [__dynamic_shmem__0+2048], {arrivals};
	@%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64
	  _, [__dynamic_shmem__0+2048], 512;
	barrier.cluster.arrive.relaxed.aligned;
	barrier.cluster.wait.aligned;
	{before}
	@%p2 {copy}
	  [__dynamic_shmem__0], [%rd6, {{%r6,%r5}}], [__dynamic_shmem__0+2048], %rs1;
	{wait}
	ld.shared.b32 	%r2, [%rd3+128];
	st.global.b32 	[%rd1], %r2;
"""
_COPY_TO_ALL = (
  "cp.async.bulk.tensor.2d.shared::cluster.global"
  ".mbarrier::complete_tx::bytes.multicast::cluster"
)
# Each tells the other, by the other's mbarrier.
_TELL = """
	cvt.u32.u64 	%r7, %rd5;
	add.s32 	%r7, %r7, 2048;
	xor.b32 	%r8, %r4, 1;
	mapa.shared::cluster.u32 %r9, %r7, %r8;
	@%p1 mbarrier.arrive.shared::cluster.b64 _, [%r9];
"""


def _pair(arrivals, before="", wait=_WAIT):
  x = np.arange(320, dtype=np.int32).reshape(10, 32)
  body = _PAIR.format(
    arrivals=arrivals, before=before, copy=_COPY_TO_ALL, wait=wait
  )
  return _run(
    body,
    x,
    threads=32,
    shared=2056,
    tensor=_ROWS | dict(swizzle=16),
    blocks=2,
  )[:2]


@pytest.mark.parametrize(("arrivals", "before"), [(1, ""), (2, _TELL)])
def test_a_copy_to_a_cluster_comes_to_every_block(arrivals, before):
  np.testing.assert_array_equal(
    _pair(arrivals, before), [9 * 32 + np.arange(32)] * 2
  )


def test_a_block_that_its_neighbor_does_not_tell_hangs():
  with pytest.raises(memory.Fault, match="hangs"):
    _pair(2)


def test_a_block_of_a_cluster_that_does_not_wait_for_its_copy_is_a_fault():
  with pytest.raises(memory.Fault, match="race|has ended"):
    _pair(1, wait="")


@pytest.mark.parametrize("fence", ["", "fence.proxy.async.shared::cta;"])
def test_what_is_copied_out_has_to_be_shown_to_the_engine(fence):
  body = f"""
	ld.param.b64 	%rd6, [test_param_1];
	setp.eq.u32 	%p1, %r1, 0;
	mov.b32 	%r4, 1;
	mov.b32 	%r5, 0;
	st.shared.b32 	[%rd3], %r2;
	{fence}
	bar.sync 	0;
	@%p1 cp.async.bulk.tensor.2d.global.shared::cta.bulk_group
	  [%rd6, {{%r5,%r4}}], [__dynamic_shmem__0];
	cp.async.bulk.commit_group;
	cp.async.bulk.wait_group.read 0;
"""
  x = np.arange(64, dtype=np.int32).reshape(2, 32)
  tensor = dict(sizes=(2, 32), strides=(32, 1), box=(1, 32), swizzle=16)
  if not fence:
    with pytest.raises(memory.Fault, match="fence.proxy.async"):
      _run(body, x, threads=32, tensor=tensor)
    return
  found = _run(body, x, threads=32, tensor=tensor)
  np.testing.assert_array_equal(found, [x[0], x[0]])
