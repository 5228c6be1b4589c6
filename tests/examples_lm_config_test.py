# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Settings of the main job: which are refused, and which a run is known by."""

import dataclasses
import subprocess
import sys

import command
import config as config_lib
import lm_runs
import pytest
import train as train_lib
from absl import flags

pytestmark = pytest.mark.any_jax

CONFIG = config_lib.Config(
  batch_size=4, seq_len=32, model_size=32, num_heads=2, num_experts=8
)


@pytest.mark.parametrize(
  "change, message",
  [
    ({"steps": 0}, "--steps must be at least 1, got 0"),
    ({"num_layers": 1}, "--num_layers must be at least 2"),
    ({"rule": "magic"}, "--rule must be one of none, sign, .* got 'magic'"),
    ({"score_fn": "relu"}, "--score_fn must be one of"),
    ({"top_k": 9}, "--top_k must be in"),
    ({"rate": float("inf")}, "--rate must be finite"),
    ({"rate": 1e39}, "--rate must be finite"),
    ({"rate": float("nan")}, "--rate must be finite"),
    ({"rate": float("-inf")}, "--rate must be finite"),
    ({"learning_rate": 1e39}, "--learning_rate must be finite"),
    ({"learning_rate": float("nan")}, "--learning_rate must be at least 0"),
    ({"weight_decay": 1e39}, "--weight_decay must be finite"),
    ({"switch_weight": 1e39}, "--switch_weight must be finite"),
    ({"steps": 2**31}, "--steps must be finite and at most 2147483647"),
    ({"seed": 2**32}, "--seed must be finite and at most 4294967295"),
    ({"seed": -1}, "--seed must be at least 0"),
    ({"batch_size": 2**25, "seq_len": 64}, "--batch_size=.* since loads are"),
    ({"out": ""}, "--out must be a folder, .* got ''"),
    (
      {"out": "gs://bucket"},
      "--out must be .* or gs://BUCKET/FOLDER, got 'gs:",
    ),
    ({"out": "s3://bucket/run"}, "--out must be .* got 's3://bucket/run'"),
    ({"out": "caf\udce9"}, "--out must be a folder"),
    ({"mesh": "1,1"}, "--mesh must be data=D or data=D,expert=X"),
    ({"mesh": "expert=2"}, "--mesh must be data=D or data=D,expert=X"),
    ({"mesh": "data=2,model=2"}, "--mesh must be .* got 'data=2,model=2'"),
    ({"mesh": "data=0"}, "--mesh must be .* Use --mesh=data=1 for one device"),
    ({"mesh": "data=" + "9" * 5000}, "--mesh must be data=D or"),
    (
      {"mesh": "data=3"},
      "--batch_size=4 must be divisible by .* the 3 devices of --mesh=data=3."
      " Type --batch_size=6, or take fewer devices, as by --mesh=data=2",
    ),
    (
      {"mesh": "data=2,expert=4"},
      "must be divisible .* the 8 devices of --mesh",
    ),
    (
      {"mesh": "data=1,expert=3", "batch_size": 6},
      "--num_experts=8 must be divisible by the 3",
    ),
    (
      {"dtype": "float16"},
      "--dtype must be float32 or bfloat16, got 'float16'",
    ),
    ({"num_groups": 3}, "--num_groups must divide"),
    ({"num_heads": 32}, "--num_heads=32 must divide --model_size=32"),
  ],
)
def test_an_impossible_setting_is_named(change, message):
  with pytest.raises(config_lib.SetupError, match=message):
    dataclasses.replace(CONFIG, **change)


def test_a_run_is_known_by_what_its_steps_depend_on():
  identity = CONFIG.identity()
  for name in ("out", "steps", "mesh", "eval_every", "save_every", "resume"):
    assert name not in identity
  for name in ("rule", "rate", "seed", "data", "num_experts"):
    assert identity[name] == getattr(CONFIG, name)
  assert identity["decay_steps"] == CONFIG.steps


def _parsed(*arguments):
  """The runs of a command line."""
  values = flags.FlagValues()
  command.define_flags(values)
  values(["train.py", *arguments])
  return command.from_flags(values)


@pytest.mark.parametrize(
  "arguments, folders",
  [
    ([], ["runs/lm/proportional"]),
    (["--rule=none"], ["runs/lm/none"]),
    (["--rule=none,sign"], ["runs/lm/none", "runs/lm/sign"]),
    (["--rule=none", "--out=a/b"], ["a/b"]),
    (["--rule=none,sign", "--out=a"], ["a/none", "a/sign"]),
    # What a run may be resumed with is not in its name.
    (["--steps=700", "--mesh=data=2"], ["runs/lm/proportional"]),
    (
      ["--out=gs://b/c", "--rule=none,sign"],
      ["gs://b/c/none", "gs://b/c/sign"],
    ),
    (
      ["--size=lfb_1b", "--top_k=4", "--remat"],
      ["runs/lm,size=lfb_1b,top_k=4/proportional"],
    ),
    (
      ["--seed=1", "--data=/usr/share/a text"],
      ["runs/lm,data=_usr_share_a_text,seed=1/proportional"],
    ),
  ],
)
def test_every_run_of_a_command_has_its_folder(arguments, folders):
  configs = _parsed(*arguments)
  assert [c.out for c in configs] == folders
  rules = [a.split("=")[1].split(",") for a in arguments if "rule" in a]
  assert [c.rule for c in configs] == (rules or [["proportional"]])[0]


@pytest.mark.parametrize(
  "rules, message",
  [
    ("none,none", "--rule=none,none lists a rule twice"),
    ("none,", "--rule must be one of none, sign, .* got ''"),
  ],
)
def test_a_list_of_rules_is_checked(rules, message):
  with pytest.raises(config_lib.SetupError, match=message):
    _parsed(f"--rule={rules}")


def test_a_run_that_goes_on_keeps_its_schedule():
  saved = CONFIG.identity()
  longer = dataclasses.replace(CONFIG, steps=700)
  assert longer.identity() != saved
  extended = longer.continuing(saved)
  assert extended.identity() == saved and extended.steps == 700
  assert longer.continuing({}).schedule_steps == 700
  explicit = dataclasses.replace(longer, decay_steps=50)
  assert explicit.continuing(saved) == explicit
  rate, rates = extended.make_schedule(), CONFIG.make_schedule()
  for step in (0, 30, 300, 599):
    assert rate(step) == rates(step)
  assert rate(600) == rate(699) == pytest.approx(0.1 * CONFIG.learning_rate)


def test_more_devices_than_there_are_is_named(tmp_path):
  corpus = lm_runs.write_corpus(tmp_path)
  config = dataclasses.replace(
    CONFIG,
    batch_size=16,
    mesh="data=16",
    data=str(corpus),
    out=str(tmp_path / "o"),
  )
  with pytest.raises(config_lib.SetupError, match="needs 16 devices, found 8"):
    train_lib.train(config)
  assert not (tmp_path / "o").exists()


@pytest.mark.parametrize(
  "argument, message",
  [
    ("--steps=abc", "flag --steps=abc: invalid literal"),
    ("--stepz=3", "Unknown command line flag 'stepz'"),
    ("--resume=maybe", "flag --resume=maybe"),
  ],
)
def test_a_wrong_flag_is_named(capsys, monkeypatch, argument, message):
  parsed = flags.FlagValues()
  flags.DEFINE_integer("steps", 1, "", flag_values=parsed)
  flags.DEFINE_bool("resume", True, "", flag_values=parsed)
  monkeypatch.setattr(command.flags, "FLAGS", parsed)
  with pytest.raises(SystemExit) as error:
    command.parse_flags(["/path/train.py", argument])
  assert error.value.code == 2
  assert capsys.readouterr().err.startswith(f"train.py: {message}")


def test_errors_come_without_a_traceback(tmp_path):
  out, missing = tmp_path / "o", tmp_path / "none"
  done = subprocess.run(
    [sys.executable, lm_runs.SCRIPT, f"--data={missing}", f"--out={out}"],
    capture_output=True,
    text=True,
  )
  assert done.returncode == 2
  assert done.stderr.splitlines()[-1].startswith(f"train.py: --data={missing}")
  assert "Traceback" not in done.stderr
