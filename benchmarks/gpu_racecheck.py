# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
"""Races, bad accesses and bad barriers of the GPU's kernels, by compute-sanitizer.

  python benchmarks/gpu_racecheck.py
  python benchmarks/gpu_racecheck.py --run=routers --seconds=200

runs small routings of every kind of program, and experts, under NVIDIA's tool, which
watches every access to shared memory, and fails if it reports anything. Routers and
experts are told apart: of kernels that multiply asynchronously the tool has reported
what was no fault. It takes at most eight minutes on a Hopper or newer GPU; the tool
comes with the CUDA toolkit.
"""

import argparse
import concurrent.futures
import itertools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
# What the driver is asked, and says no to, is no error of ours.
TOOLS = {
  "racecheck": [],
  "memcheck": ["--report-api-errors", "no"],
  "synccheck": [],
}
# T, E, K, threads a token, and what else the router is. Programs differ by them:
# in the lists they keep, in how lists are merged, and in what they store.
CASES = (
  (300, 8, 2, 1, {}),
  (300, 60, 6, 1, {}),
  (300, 64, 6, 2, dict(score_fn="softmax")),
  (300, 128, 1, 1, {}),
  (300, 128, 4, 2, dict(score_fn="softmax", score_after_top_k=True)),
  (131, 160, 6, 1, dict(num_groups=8, group_top_k=3)),
  (300, 256, 8, 1, {}),
  (300, 256, 8, 2, dict(num_groups=8, group_top_k=4)),
  (131, 256, 8, 4, dict(num_groups=8, group_top_k=4)),
  (17, 256, 8, 8, dict(num_groups=8, group_top_k=4)),
  (131, 256, 8, 4, dict(num_groups=8, group_top_k=4, histogram=True)),
  (131, 256, 8, 2, dict(score_fn="sqrtsoftplus")),
  (131, 256, 16, 2, {}),
  (131, 512, 10, 4, {}),
  (65, 1024, 8, 8, {}),
)


def run_routers() -> None:
  """Runs every router; this is what the tool watches."""
  import jax
  import numpy as np

  import jaxroute

  rng = np.random.default_rng(0)
  for t, e, k, lanes, fields in CASES:
    config = jaxroute.RouterConfig(num_experts=e, top_k=k, **fields)
    logits = np.round(4 * rng.normal(size=(t, e))).astype(np.float32) / 2
    logits[::7, ::3] = np.nan
    bias = rng.normal(size=e).astype(np.float32) / 8
    args = jax.device_put((logits, bias, rng.random(t) < 0.8))
    jax.block_until_ready((_route(args, config, lanes), _order(args, config)))
    print(f"{config}, {lanes} threads a token", flush=True)
  print(f"ran {len(CASES)} routers on {jax.devices()[0].device_kind}")


def run_experts() -> None:
  """Runs experts, and their gradients."""
  import jax

  jax.block_until_ready(_experts())
  print(f"ran experts on {jax.devices()[0].device_kind}")


def _route(args, config, lanes):
  from jaxroute.kernels.gpu import route

  return route.route(
    *args, config=config, with_chosen=True, with_rank=True, lanes=lanes
  )


def _order(args, config):
  import jaxroute
  from jaxroute import dispatch

  logits, bias, mask = args
  kernels = dict(implementation="pallas_gpu")
  r = jaxroute.route(logits, bias, config, mask, with_rank=True, **kernels)
  return dispatch.sort_by_expert(
    r.expert_idx,
    config.num_experts,
    r.token_mask,
    rank=r.rank,
    load=r.load,
    **kernels,
  )


def _experts():
  import jax
  import jax.numpy as jnp

  from jaxroute import experts

  key, dtype = jax.random.key(0), jnp.bfloat16
  x = jax.random.normal(key, (704, 256), dtype)
  params = experts.init_expert_params(key, 4, 256, 128, dtype)
  sizes = jnp.array([300, 0, 129, 171], jnp.int32)

  def swiglu(x, params):
    return experts.swiglu(x, params, sizes, implementation="pallas_gpu")

  out, pull = jax.vjp(swiglu, x, params)
  return out, pull(out)


def find_tool() -> str:
  """The path of compute-sanitizer.

  Raises:
    SystemExit: if there is none.
  """
  toolkits = sorted(pathlib.Path("/usr/local").glob("cuda*/bin"), reverse=True)
  folders = [os.environ.get("PATH", ""), *map(str, toolkits)]
  found = shutil.which("compute-sanitizer", path=os.pathsep.join(folders))
  if not found:
    raise SystemExit(
      "gpu_racecheck: expected compute-sanitizer on the path or in"
      " /usr/local/cuda*/bin, found none. It is part of the CUDA toolkit; on"
      " Debian and Ubuntu: apt-get install cuda-sanitizer-13-0."
    )
  return found


def reported(output: str) -> int | None:
  """How many hazards or errors the tool counted; None if it did not come that far."""
  counts = re.findall(r"^=+ \w+ SUMMARY: (\d+) ", output, re.MULTILINE)
  return sum(map(int, counts)) if counts else None


def check(sanitizer: str, tool: str, part: str, seconds: int) -> bool:
  """Runs a part under a tool, prints what it found, and tells if that is nothing.

  Args:
    sanitizer: the path of compute-sanitizer.
    tool: a key of `TOOLS`.
    part: a key of `PARTS`.
    seconds: after which it is ended.

  Returns:
    Whether it came to its end, and the tool reported nothing.
  """
  command = [sanitizer, "--tool", tool, *TOOLS[tool]]
  command += ["--error-exitcode", "99", "--print-limit", "20"]
  path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
  process = subprocess.Popen(
    [*command, sys.executable, __file__, f"--watched={part}"],
    cwd=ROOT,
    start_new_session=True,
    # An allocation for every array, so that what lies beside one is not memory.
    env=os.environ
    | dict(
      JAX_PLATFORMS="cuda",
      PYTHONPATH=os.pathsep.join(path),
      # The tool sees every launch by itself.
      XLA_FLAGS="--xla_gpu_enable_command_buffer=",
      XLA_PYTHON_CLIENT_ALLOCATOR="platform",
      XLA_PYTHON_CLIENT_PREALLOCATE="false",
    ),
    stderr=subprocess.STDOUT,
    stdout=subprocess.PIPE,
    text=True,
  )
  try:
    output, _ = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    os.killpg(process.pid, signal.SIGKILL)
    output, _ = process.communicate()
  count, has_run = reported(output), "ran " in output
  is_clean = process.returncode == 0 and count == 0 and has_run
  if not is_clean:
    print(*output.splitlines()[-60:], sep="\n")
  found = (
    f"{count} found" if has_run and count is not None else "did not finish"
  )
  code = process.returncode
  print(f"{tool} of {part}: {found}, exit code {code}", flush=True)
  return is_clean


PARTS = {"routers": run_routers, "experts": run_experts}


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--run", choices=PARTS, help="one part; both if left out")
  parser.add_argument(
    "--seconds", type=int, default=480, help="then it is ended"
  )
  parser.add_argument("--watched", choices=PARTS, help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.watched:
    PARTS[args.watched]()
    return
  sanitizer = find_tool()
  jobs = itertools.product(TOOLS, [args.run] if args.run else PARTS)
  # All at once: most of the time the cases are compiled.
  with concurrent.futures.ThreadPoolExecutor() as pool:
    watched = [
      pool.submit(check, sanitizer, tool, part, args.seconds)
      for tool, part in jobs
    ]
    clean = [job.result() for job in watched]
  if not all(clean):
    raise SystemExit("gpu_racecheck: failed")


if __name__ == "__main__":
  main()
