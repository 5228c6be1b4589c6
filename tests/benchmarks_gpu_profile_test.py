# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Device time from a profile that is written out by hand."""

import gpu_profile
import jax
import jax.numpy as jnp
import pytest
from jax.profiler import ProfileData

from jaxroute import ladder

# Two calls of three launches; other lines and planes show the time again.
PROFILE = """
  planes {
    name: "/device:GPU:0"
    lines {
      name: "Stream #13(Compute)"
      events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000 }
      events { metadata_id: 2 offset_ps: 4000000 duration_ps: 500000 }
      events { metadata_id: 2 offset_ps: 5000000 duration_ps: 500000 }
      events { metadata_id: 1 offset_ps: 9000000 duration_ps: 5000000 }
      events { metadata_id: 2 offset_ps: 15000000 duration_ps: 1000000 }
    }
    lines {
      name: "Stream #14(MemcpyD2D)"
      events { metadata_id: 3 offset_ps: 0 duration_ps: 2000000 }
    }
    lines {
      name: "XLA Ops"
      events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 }
    }
    event_metadata { key: 1 value { id: 1 name: "route_mosaic_gpu_kernel" } }
    event_metadata { key: 2 value { id: 2 name: "fill" } }
    event_metadata { key: 3 value { id: 3 name: "MemcpyD2D" } }
  }
  planes {
    name: "/host:CPU"
    lines {
      name: "Stream of the host"
      events { metadata_id: 1 offset_ps: 0 duration_ps: 9000000 }
    }
    event_metadata { key: 1 value { id: 1 name: "python" } }
  }
"""


def test_streams_of_the_gpu_are_counted_by_kernel():
  planes = ProfileData.from_text_proto(PROFILE).planes
  profile = gpu_profile.from_planes(planes, calls=2)
  # A copy runs beside a kernel.
  assert profile == gpu_profile.Profile(
    us=5.0,
    launches=3.0,
    kernels={
      "route_mosaic_gpu_kernel": (1.0, 4.0),
      "fill": (1.5, 1.0),
      "MemcpyD2D": (0.5, 1.0),
    },
  )
  assert next(iter(profile.kernels)) == "route_mosaic_gpu_kernel"
  # The second call alone; the fills and the copy are three launches for both.
  planes = ProfileData.from_text_proto(PROFILE).planes
  profile = gpu_profile.from_planes(planes, calls=1, warm=1)
  assert profile.kernels["route_mosaic_gpu_kernel"] == (1.0, 5.0)
  assert profile.kernels["fill"] == (2.0, 1.5)


# Steps and operations show the time again.
TPU_PROFILE = """
  planes {
    name: "/device:TPU:0"
    lines {
      name: "XLA Modules"
      events { metadata_id: 1 offset_ps: 0 duration_ps: 3000000 }
      events { metadata_id: 1 offset_ps: 4000000 duration_ps: 5000000 }
    }
    lines {
      name: "XLA Ops"
      events { metadata_id: 2 offset_ps: 0 duration_ps: 2000000 }
    }
    event_metadata { key: 1 value { id: 1 name: "jit_ours" } }
    event_metadata { key: 2 value { id: 2 name: "fusion" } }
  }
"""


def test_programs_of_the_tpu_are_counted():
  planes = ProfileData.from_text_proto(TPU_PROFILE).planes
  assert gpu_profile.from_planes(planes, calls=2) == gpu_profile.Profile(
    us=4.0, launches=1.0, kernels={"jit_ours": (1.0, 4.0)}
  )


def test_a_profile_without_a_gpu_is_refused():
  with pytest.raises(
    RuntimeError, match="expected kernels of a GPU or TPU.*CUPTI"
  ):
    gpu_profile.of_call(jax.jit(jnp.sin), jnp.zeros(3), repeats=2)


@pytest.mark.gpu
def test_a_sum_takes_time_on_the_device():
  x = jnp.ones((1024, 1024))
  call = jax.jit(lambda x: x + 1)
  # Other processes may share the device by turns.
  profiles = [gpu_profile.of_call(call, x) for _ in range(3)]
  assert {profile.launches for profile in profiles} == {1}
  assert 1 < min(profile.us for profile in profiles) < 1000


def test_what_fails_or_is_late_is_a_row_that_says_so(monkeypatch, capsys):
  profile = gpu_profile.Profile(us=2.0, launches=1.0, kernels={"k": (1.0, 2.0)})
  monkeypatch.setattr(gpu_profile, "of_call", lambda call, *args: profile)

  def broken(x):
    raise NotImplementedError("no kernel here")

  args = (jnp.zeros(3),)
  table = gpu_profile.Table(
    "sums",
    lambda: {"good": (jnp.sin, args), "broken": (broken, args)},
    flops=4_000_000,
  )
  saved = {}
  gpu_profile.measure(table, float("inf"), saved.__setitem__)
  good, bad = saved["sums"]
  assert (good["us"], good["tflops"]) == (2.0, 2.0)
  words = "NotImplementedError: no kernel here"
  assert bad == dict(name="broken", error=words, refused=False)
  assert "| broken | - | - | - | - | NotImplementedError" in (
    capsys.readouterr().out
  )
  gpu_profile.measure(table, 0.0, saved.__setitem__)
  assert [row["error"] for row in saved["sums"]] == [gpu_profile.LEFT_OUT] * 2
  gpu_profile.check_all_measured(saved, may_refuse=False)


def test_a_refusal_may_be_allowed_and_a_defect_not():
  def raises(error):
    def function(x):
      raise error

    return function

  def saved_of(**errors):
    table = gpu_profile.Table(
      "sums",
      lambda: {n: (raises(x), (jnp.zeros(3),)) for n, x in errors.items()},
    )
    saved = {}
    gpu_profile.measure(table, float("inf"), saved.__setitem__)
    return saved

  refused = saved_of(refusing=ladder.Refusal("XLA can"))
  gpu_profile.check_all_measured(refused, may_refuse=True)
  with pytest.raises(SystemExit, match="Refusal: XLA can"):
    gpu_profile.check_all_measured(refused, may_refuse=False)
  broken = saved_of(broken=NotImplementedError("no such primitive"))
  with pytest.raises(SystemExit, match="no such primitive"):
    gpu_profile.check_all_measured(broken, may_refuse=True)


def test_a_table_that_cannot_be_made_is_one_row():
  def candidates():
    raise ImportError("no such kernel")

  saved = {}
  table = gpu_profile.Table("lanes", candidates)
  gpu_profile.measure(table, float("inf"), saved.__setitem__)
  assert saved["lanes"] == [
    dict(name="all", error="ImportError: no such kernel", refused=False)
  ]
