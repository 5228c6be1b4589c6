# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What the command says of a layer, compiled for chips that are not here."""

import collections
import json
import subprocess
import sys

import pytest

import jaxroute
from jaxroute import presets
from jaxroute.aot import chips, gpu, layer, route, tpu

pytestmark = pytest.mark.any_jax

pytest.importorskip("libtpu", reason="the TPU compiler is for Linux on x86-64")

# T of a device, E, K, D, F.
T, E, K, D, F = 64, 16, 2, 256, 128
SMALL = presets.Preset(
  config=jaxroute.RouterConfig(num_experts=E, top_k=K),
  model_size=D,
  hidden_size=F,
  shared_hidden_size=F,
  num_moe_layers=1,
)


def _report(topology, sizes, preset, tokens, **fields):
  mesh = chips.make_mesh(chips.devices(topology), sizes)
  partition = layer.partition(mesh, **fields)
  chip = chips.chip(topology)
  return layer.report(preset, tokens, mesh, chip, partition, grad=True)


def _of_tokens(report):
  """Collectives of bfloat16 over "expert", outside of loops: operation to bytes."""
  found = collections.Counter()
  for c in report.collectives:
    if c.axes == ("expert",) and "bf16" in c.arrays and not c.in_loop:
      found[c.op] += c.bytes
  return found


def test_the_figures_of_a_layer_are_those_counted_by_hand():
  found = _report("v6e:2x2", {"data": 2, "expert": 2}, SMALL, T, drop=True)
  experts = 3 * E * D * F * 2 // 2  # bytes of the half of a device
  whole = 3 * D * F * 2 + D * E * 4 + E * 4  # shared expert, router and bias
  tokens = 2 * T * D * 2  # and their cotangent
  assert found.arguments == pytest.approx(experts + whole + tokens, rel=0.02)
  assert found.fits and found.needed < 2**24
  assert found.needed_flops == 3 * 2 * T * D * (3 * (K + 1) * F + E)
  # A row for each of K experts of each token: there and back, and their gradients.
  assert _of_tokens(found) == {"ragged-all-to-all": 4 * T * K * D * 2}
  (loads,) = (c for c in found.collectives if c.arrays == f"s32[{E}]")
  assert (loads.op, loads.axes) == ("all-reduce", ("data", "expert"))
  assert found.binds in found.seconds
  assert set(found.seconds) >= {"matrix units", "HBM", "ICI expert", "ICI data"}
  mxu = found.needed_flops / 918e12
  assert found.seconds["matrix units"] == pytest.approx(mxu)


def test_a_layer_that_does_not_fit_says_what_it_needs():
  big = presets.get("deepseek_v3")
  found = _report("v5e:1x1", {"expert": 1}, big, 8)
  assert not found.fits and found.binds is None
  # All experts of a layer, and their gradients.
  assert found.needed > 2 * 3 * 256 * 7168 * 2048 * 2


def test_what_the_compiler_lacks_is_read():
  old = (
    "Ran out of memory in memory space hbm. Used 38.30G of 31.25G hbm. Exceeded"
  )
  assert tpu.lacking(Exception(old)) == (38.30 * 2**30, 31.25 * 2**30)
  new = (
    "the total memory required for HLO temporaries (800.00G) exceeds available"
    " HBM (31.24G). HLO module"
  )
  assert tpu.lacking(Exception(new)) == (800 * 2**30, 31.24 * 2**30)
  huge = new.replace("800.00G", "20.87T")
  assert tpu.lacking(Exception(huge)) == (20.87 * 2**40, 31.24 * 2**30)
  assert tpu.lacking(Exception("INTERNAL: something else")) is None


def test_the_kernel_is_reported_with_its_cycles():
  preset, topology = presets.get("qwen3_235b"), "v6e:2x2"
  kernel, xla = route.implementations(topology)
  assert xla == "xla"
  found = route.report(preset, 1024, topology, kernel)
  assert 1 < found["cycles_per_token"] < 20
  # Logits, bias; experts, weights, load, cutoff.
  moved = 4 * (1024 * 128 + 128 + 2 * 1024 * 8 + 128 + 1024)
  assert found["hbm_bytes"] == pytest.approx(moved, rel=0.02)
  assert 2**20 < found["vmem"] < 2**24


# What the command refuses, and words of what it says.
_REFUSED = [
  ("", "expected one command, of route, layer, got []."),
  ("layer v6e:2x2", "got ['layer', 'v6e:2x2']."),
  (
    "route --preset=v4",
    "`name` must be that of a preset, one of deepseek_v3, ",
  ),
  ("route --grad", "--grad is of `layer`, got the command 'route'."),
  ("route --nodrop --mesh=data=4", "--mesh, --drop is of `layer`, got"),
  ("layer --tokens=4", "--tokens is of `route`, got the command 'layer'."),
  ("route --tokens=0", "`tokens` must be at least 1, got 0."),
  (
    "layer --tokens_per_chip=-4",
    "`tokens_per_chip` must be at least 1, got -4",
  ),
  ("route --tokens=9999999999", "`tokens` must be at most 268435455, got"),
  ("layer --mesh=data=2", "the topology, 4, got 'data=2', which has 2."),
  (
    "layer --preset=kimi_k2 --topology=v5p:8x16x16 --mesh=data=8,expert=256",
    "divide 384 experts, got 256. Take --mesh=data=16,expert=128.",
  ),
  (
    "layer --preset=qwen3_235b --topology=v6e:16x16",
    "divide 128 experts, got 256. Take --mesh=data=2,expert=128.",
  ),
  (
    "layer --exchange=raged",
    "`exchange` must be one of ('ragged', 'equal', ",
  ),
  ("layer --buffer_factor=0", "`buffer_factor` must be a number in (0, inf)"),
  ("layer --exchange=all_gather --drop", "got `exchange`='all_gather'"),
  ("layer --mesh=data=4 --drop", "an `expert_axis` that is one of"),
  (
    "layer --topology=v6e:0x0",
    "at most 16x16, as 'v6e:16x16', got 'v6e:0x0'.",
  ),
]


@pytest.mark.parametrize(
  ("args", "flags", "found"),
  [
    (
      "route --preset=qwen3_235b --tokens=256",
      {"preset": "qwen3_235b", "topology": "v6e:1x1", "tokens": 256},
      ("pallas_tpu", "xla"),
    ),
    (
      "layer --preset=qwen3_235b --tokens_per_chip=128",
      {"preset": "qwen3_235b", "tokens_per_chip": 128, "grad": False},
      ("arguments", "collectives", "binds", "mesh"),
    ),
  ],
)
def test_json_says_what_was_asked(args, flags, found):
  command = [sys.executable, "-m", "jaxroute.aot", *args.split()]
  command += ["--topology=v6e:1x1", "--json"]
  ended = subprocess.run(command, capture_output=True, text=True, check=True)
  said = json.loads(ended.stdout)
  assert flags.items() <= said["flags"].items()
  assert "libtpu" in said["versions"]
  assert set(found) <= said.keys()


# All of them in one process, for flags are a process's and JAX takes seconds.
_REFUSE = """
import contextlib, io, json, sys
from absl import flags
from absl.testing import flagsaver
from jaxroute.aot import __main__
said = []
for args in json.loads(sys.argv[1]):
  with flagsaver.flagsaver(), contextlib.redirect_stderr(io.StringIO()) as text:
    try:
      __main__.main(flags.FLAGS(["aot", *args.split()]))
      code = 0
    except SystemExit as ended:
      code = ended.code
  said.append((code, text.getvalue()))
print(json.dumps(said))
"""


def test_the_command_refuses_in_one_line():
  cases = json.dumps([args for args, _ in _REFUSED])
  ended = subprocess.run(
    [sys.executable, "-c", _REFUSE, cases],
    capture_output=True,
    text=True,
    check=True,
  )
  said = json.loads(ended.stdout)
  for (args, words), (code, text) in zip(_REFUSED, said, strict=True):
    (line,) = text.splitlines()
    assert code == 2, args
    assert line.startswith("jaxroute.aot: ") and words in line, args


@pytest.mark.parametrize(
  ("topology", "words"),
  [
    ("v9:2x2", "'v6e:16x16', .* got 'v9:2x2'"),
    ("H100", "'h100:8', .* got 'H100'"),
    ("h100:9", "of 1 to 8 GPUs of one node, .* got 'h100:9'"),
    ("h100:", "of 1 to 8 GPUs of one node, .* got 'h100:'"),
    ("v6e", "a slice of 2 dimensions"),
    ("v6e:2*2", "a slice of 2 dimensions"),
    # The compiler dies of no chips, and takes what does not exist.
    ("v6e:0x0", "a slice of 2 dimensions"),
    ("v6e:2x2x2", "a slice of 2 dimensions"),
    ("v6e:32x32", "at most 16x16, .* got 'v6e:32x32'"),
    ("v5p:2x2", "a slice of 3 dimensions, at most 16x16x24"),
    ("v6e:3x5", "a slice that the compiler knows.*not divisible"),
  ],
)
def test_an_unknown_topology_is_refused(topology, words, monkeypatch):
  # Where there is no compiler for GPUs, that is said first.
  monkeypatch.setattr(gpu, "missing", lambda: "")
  with pytest.raises(ValueError, match=words):
    chips.devices(topology)


def test_a_missing_compiler_is_said_with_how_to_get_it(monkeypatch):
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  with pytest.raises(RuntimeError, match="pip install libtpu"):
    chips.devices("v6e:2x2")


@pytest.mark.parametrize(
  ("text", "words"),
  [
    ("data=2", "as many devices as the topology, 4, got 'data=2'"),
    ("data=2;expert=2", "each once, as in"),
    ("data=2,data=2", "each once, as in"),
    # Of another name an axis would shard tokens and no experts.
    ("data=2,experts=2", "the axes data and expert"),
    ("data=2,model=2", "the axes data and expert"),
  ],
)
def test_a_mesh_of_another_form_or_size_is_refused(text, words):
  with pytest.raises(ValueError, match=words):
    chips.parse_mesh(text, 4)


def test_a_mesh_is_read():
  assert chips.parse_mesh("data=2,expert=2", 4) == {"data": 2, "expert": 2}
  assert chips.parse_mesh("", 4) == {"expert": 4}


def test_a_mesh_that_does_not_divide_the_experts_is_refused():
  with pytest.raises(
    ValueError, match="divide 16 experts, got 3. Take --mesh=data=3,expert=2"
  ):
    layer.check(SMALL, {"data": 2, "expert": 3})


@pytest.mark.long
@pytest.mark.parametrize(
  ("drop", "gigabytes"), [(False, 17), (True, 9)], ids=["dropless", "drop"]
)
def test_a_large_layer_fits_256_chips(drop, gigabytes):
  preset = presets.get("deepseek_v3")
  sizes = {"data": 16, "expert": 16}
  found = _report("v6e:16x16", sizes, preset, 4096, drop=drop)
  assert found.fits and found.temporaries <= gigabytes * 1e9
  config = preset.config
  rows = 4096 * config.top_k * preset.model_size * 2  # of bfloat16
  assert _of_tokens(found) == {
    "ragged-all-to-all": pytest.approx(4 * rows, rel=0.01)
  }
