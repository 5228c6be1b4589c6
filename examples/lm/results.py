# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""What is written and shown when runs have ended."""

from collections.abc import Sequence
from typing import Any

import checkpoint as checkpoint_lib
import data as data_lib
import figures as figures_lib
import report as report_lib
import storage
import strict_json
import yardsticks as yardsticks_lib
from config import Config
from etils import epath


def write(
  config: Config,
  corpus: data_lib.Corpus,
  rows: list[dict[str, Any]],
  sample: str,
  active_parameters: int,
) -> dict[str, Any]:
  """Writes summary.json, sample.txt and figures of a run.

  Args:
    config: the settings.
    corpus: what was trained on, and held out.
    rows: of metrics.jsonl.
    sample: text that the model has written.
    active_parameters: those that a token meets.

  Returns:
    The summary, with "yardsticks".

  Raises:
    SaveError: if something cannot be written.
  """
  out = storage.local(config.out)
  summary = report_lib.summarize(rows, config.batch_size * config.seq_len)
  summary["yardsticks"] = yardsticks_lib.yardsticks(
    config, corpus, rows, active_parameters
  )
  with checkpoint_lib.saving("writing results", out):
    (out / "summary.json").write_text(
      strict_json.dumps(summary, indent=2) + "\n"
    )
    (out / "sample.txt").write_text(sample, encoding="utf-8")
    figures_lib.write_figures(rows, out)
    storage.publish(config.out)
  return summary


def show(
  configs: Sequence[Config], summaries: Sequence[dict[str, Any]]
) -> None:
  """Prints the samples and a table of all runs; several are drawn together.

  Args:
    configs: the settings of the runs; their folders are in one.
    summaries: of `write`.

  Raises:
    SaveError: if something cannot be written.
  """
  by_rule = {c.rule: s for c, s in zip(configs, summaries, strict=True)}
  table = report_lib.table(by_rule)
  out = epath.Path(configs[0].out)
  if len(configs) > 1:
    out = out.parent
    rows = {c.rule: report_lib.read_rows(c.out) for c in configs}
    random_max_vio = summaries[0]["yardsticks"]["max_vio_batch_mean"]
    with checkpoint_lib.saving("writing the comparison", out):
      folder = storage.local(out)
      (folder / "compared.txt").write_text(table + "\n")
      figures_lib.write_comparison(rows, random_max_vio, folder)
      storage.publish(out)
  for config in configs:
    sample = (epath.Path(config.out) / "sample.txt").read_text("utf-8")
    print(f"\n=== {config.rule}\n{sample}")
  print(f"{table}\nFigures, metrics and checkpoints: {out}")
