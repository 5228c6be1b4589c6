# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Tables of what ran on a GPU, from rows and reports written out by hand."""

import gpu_report
import pytest

pytestmark = pytest.mark.any_jax

COPY = dict(name="copy", us=40.0, launches=1.0, kernels={"add": (1.0, 40.0)})
ROUTE = dict(
  name="route",
  us=32.0,
  launches=2.0,
  kernels={"route|mosaic": (1.0, 31.0), "fill": (1.0, 1.0)},
)
BROKEN = dict(name="order", error="NotImplementedError: not here")


def test_a_row_is_seen_against_the_first():
  lines = gpu_report.profile_table("T=64", [COPY, ROUTE, BROKEN]).splitlines()
  assert lines == [
    "| T=64 | us | launches | x the first | longest |",
    "| --- | --- | --- | --- | --- |",
    "| copy | 40.0 | 1 | 1 | add x1 40.0 |",
    "| route | 32.0 | 2 | 0.8 | route/mosaic x1 31.0; fill x1 1.0 |",
    "| order | - | - | - | NotImplementedError: not here |",
  ]


def test_useful_work_gets_a_column():
  row = ROUTE | dict(tflops=312.4)
  text = gpu_report.profile_table("experts", [BROKEN, row])
  assert "| experts | us | launches | x the first | TFLOP/s | longest |" in text
  # Nothing to be seen against, where the first could not be measured.
  assert "| route | 32.0 | 2 | - | 312 |" in text


@pytest.mark.parametrize(
  "bar, value, met",
  (
    (("T=64", "route", "copy", 0.85), 0.8, True),
    (("T=64", "route", "copy", 0.75), 0.8, False),
    (("T=64", "route", None, 31), 32.0, False),
    (("T=64", "route", "copy", 1.2, True), 1.25, True),
    (("T=64", "route", "copy", 1.3, True), 1.25, False),
    (("T=64", "order", "copy", 1), None, None),
    (("T=64", "route", "plain", 1), None, None),
    (("T=16", "route", "copy", 1), None, None),
  ),
)
def test_a_bar_is_met_or_not_or_not_measured(bar, value, met):
  tables = {"T=64": [COPY, ROUTE, BROKEN]}
  (found,) = gpu_report.held([gpu_report.Bar(*bar)], tables)
  assert (found["value"], found["met"]) == (value, met)
  line = gpu_report.bars_table([found]).splitlines()[-1]
  assert {None: "not measured", True: "yes", False: "no"}[met] in line


JUNIT = """<?xml version="1.0" encoding="utf-8"?>
<testsuites><testsuite name="pytest">
<testcase classname="tests.step_test" name="test_a" time="0.1" />
<testcase classname="tests.step_test" name="test_b[x]" time="0.1">
  <failure message="AssertionError: 1 != 2&#10;more">trace</failure>
</testcase>
<testcase classname="tests.step_test" name="test_c" time="0.1">
  <skipped type="pytest.skip" message="needs 8 devices, found 1">at</skipped>
</testcase>
<testcase classname="tests.layer_test" name="test_d" time="0.1">
  <error message="failed on setup with &quot;worker 'gw0' crashed&quot;" />
</testcase>
</testsuite></testsuites>
"""


def test_a_report_of_pytest_is_counted_with_its_reasons(tmp_path):
  path = tmp_path / "report.xml"
  path.write_text(JUNIT)
  found = gpu_report.read_junit(path)
  assert found == dict(
    passed=1,
    failed={
      "step_test::test_b[x]": "AssertionError: 1 != 2",
      "layer_test::test_d": "failed on setup with \"worker 'gw0' crashed\"",
    },
    skipped={"needs 8 devices, found 1": ["step_test::test_c"]},
  )
  part = found | dict(code=1, seconds=9.6, left_out="tiled")
  text = gpu_report.tests_table({"own": part})
  assert "- left out of own, by name: tiled\n" in text
  assert "| own | 1 | 2 | 1 | 10 |" in text
  assert "- failed: step_test::test_b[x]: AssertionError: 1 != 2\n" in text
  assert "- skipped, needs 8 devices, found 1: step_test::test_c\n" in text


def test_a_run_that_left_no_report_passed_nothing(tmp_path):
  found = gpu_report.read_junit(tmp_path / "missing.xml")
  assert found == dict(passed=0, failed={}, skipped={})
