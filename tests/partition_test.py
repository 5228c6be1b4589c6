# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What a partition takes, and what it refuses."""

import pytest

import jaxroute

pytestmark = pytest.mark.any_jax

_EXCHANGES = dict(token_axes="expert", expert_axis="expert")


def test_a_partition_takes_one_name_or_several():
  for axes in ("data", ["data"], ("data",)):
    assert jaxroute.Partition(token_axes=axes).token_axes == ("data",)


@pytest.mark.parametrize(
  ("change", "words"),
  (
    (dict(token_axes=("data", "data")), "once, got .'data', 'data'"),
    (dict(token_axes=3), "tuple of names of mesh axes, got 3"),
    (dict(token_axes=None), "got None. Take ()"),
    (dict(token_axes=("data", None)), "got .'data', None"),
    (dict(expert_axis=("expert",)), "the name of one mesh axis.*got .'expert'"),
    (dict(fsdp_axis=3), "`fsdp_axis` must be the name of one mesh axis.*got 3"),
    (dict(tensor_axis=()), "`tensor_axis` must be the name of one"),
    (
      dict(expert_axis="a", fsdp_axis="a"),
      "`fsdp_axis` must be another axis than `expert_axis`='a'",
    ),
    (
      dict(token_axes="a", tensor_axis="a"),
      "`tensor_axis` must be an axis of its own, got 'a'",
    ),
    (
      dict(expert_axis="a", tensor_axis="b"),
      "`tensor_axis` shards experts.*got `expert_axis`='a' too",
    ),
    (_EXCHANGES | dict(exchange="all"), "`exchange` must be one of.*got 'all'"),
    (_EXCHANGES | dict(buffer_factor=0), "`buffer_factor`.*got 0"),
    (_EXCHANGES | dict(buffer_factor="1"), "`buffer_factor`.*got '1'"),
    (_EXCHANGES | dict(drop=1), "`drop`.*got 1"),
    (
      _EXCHANGES | dict(exchange="all_gather", drop=True),
      "'ragged' and 'equal', got `exchange`='all_gather'",
    ),
    (
      dict(token_axes="data", expert_axis="expert", exchange="equal"),
      "are for an `expert_axis` that is one of `token_axes`, got 'expert'",
    ),
    (dict(token_axes="data", drop=True), "got None and .'data',."),
  ),
)
def test_what_names_no_mesh_axis_is_refused(change, words):
  with pytest.raises(ValueError, match=words):
    jaxroute.Partition(**change)
