# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""The programs of a run: every device used, what lies where, in which dtype."""

import math

import command
import config as config_lib
import jax
import jax.numpy as jnp
import lm_runs
import numpy as np
import pytest
import trainer as trainer_lib
from absl import flags

pytestmark = [
  pytest.mark.any_jax,
  pytest.mark.implicit_promotion,
  pytest.mark.devices(8),
]


def _config(**changes):
  return config_lib.Config(**lm_runs.TINY | changes)


def _parsed(*arguments):
  values = flags.FlagValues()
  command.define_flags(values)
  values(["train.py", *arguments])
  (config,) = command.from_flags(values)
  return config


def test_all_devices_are_used_unless_the_batch_does_not_divide():
  config = _config(mesh="")
  mesh = trainer_lib.make_mesh(config.on_devices(8))
  assert dict(mesh.shape) == {"data": 8}
  assert config.on_devices(1).mesh == "data=1"
  assert trainer_lib.make_mesh(config.on_devices(1)) is None
  message = (
    "--batch_size=8 must be divisible by --micro_batches=1 times the 6 devices of"
    " --mesh=data=6. Type --batch_size=12, or take fewer devices, as by"
    " --mesh=data=4."
  )
  with pytest.raises(config_lib.SetupError) as error:
    config.on_devices(6)
  assert str(error.value) == message
  with pytest.raises(
    config_lib.SetupError, match="one device.*=9, or other --micro_batches"
  ):
    _config(mesh="data=1", micro_batches=3)


@pytest.mark.parametrize(
  "size, billions",
  [("lfb_1b", 1.02), ("lfb_3b", 2.55), ("deepseek_v3_layer", 12.1)],
)
def test_a_size_has_the_parameters_of_its_name(size, billions):
  config = _parsed(f"--size={size}", "--mesh=data=1", "--steps=7")
  shapes = trainer_lib.Trainer(config, None).shapes.params
  total = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes))
  assert total / 1e9 == pytest.approx(billions, rel=0.01)
  assert config.steps == 7 and config.dtype == "bfloat16"
  router = config.router
  expected = (8, 4) if size == "deepseek_v3_layer" else (1, 1)
  assert (router.num_groups, router.group_top_k) == expected


def test_flags_go_before_the_size():
  config = _parsed("--size=lfb_1b", "--seq_len=64", "--dtype=float32")
  assert (config.seq_len, config.dtype) == (64, "float32")
  assert config.model_size == 1024
  assert _parsed().identity() == config_lib.Config().identity()


def _first_step(config, mesh):
  """The report and the state after a step, on some bytes."""
  trainer = trainer_lib.Trainer(config, mesh)
  batch = np.random.default_rng(0).integers(
    0, 99, (config.batch_size, config.seq_len + 1), np.uint8
  )
  state = trainer.init(jax.random.key(0))
  return trainer, *trainer.step(state, trainer.place(batch.__getitem__))


def test_bfloat16_remat_and_fsdp_train_as_one_device_does():
  config = _config()
  _, _, expected = _first_step(config, None)
  config = _config(
    mesh="data=4,expert=2", fsdp=True, remat=True, dtype="bfloat16"
  )
  mesh = trainer_lib.make_mesh(config)
  trainer, state, report = _first_step(config, mesh)
  assert all(x.is_fully_replicated for x in jax.tree.leaves(report))
  # Routes are those of rounded tokens, of which a few choose another expert.
  load, other = (
    np.asarray(jax.tree.leaves(r["load"])[0]) for r in (report, expected)
  )
  assert load.sum() == other.sum()
  assert np.abs(load - other).sum() < 0.05 * load.sum()
  assert report["loss"] == pytest.approx(float(expected["loss"]), rel=0.02)
  specs = {}
  for path, x in jax.tree_util.tree_leaves_with_path(state.params):
    assert x.dtype == jnp.float32
    specs[path[-1].key] = x.sharding.spec
  assert "expert" in specs["w_up"] and "data" in specs["w_up"]
  assert "data" in specs["embedding"]
  w_up = state.params["layers"]["moe"]["w_up"]
  moment = state.opt_state[1][0].mu["layers"]["moe"]["w_up"]
  assert moment.sharding == w_up.sharding
  assert w_up.addressable_shards[0].data.size == w_up.size // 8
  assert all(x.is_fully_replicated for x in jax.tree.leaves(state.router))


def test_every_process_makes_only_the_rows_of_its_devices():
  config = _config(mesh="data=4,expert=2")
  trainer = trainer_lib.Trainer(config, trainer_lib.make_mesh(config))
  made = []

  def rows(part):
    made.append((part.start, part.stop))
    return np.arange(8 * 33, dtype=np.uint8).reshape(8, 33)[part]

  batch = trainer.place(rows)
  assert sorted(made) == [(i, i + 1) for i in range(8)]
  np.testing.assert_array_equal(batch, rows(slice(None)))
