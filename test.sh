#!/usr/bin/env bash
# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
#
# Lint, types, build, install the wheel, test it: from any machine with Python.
#
#   ./test.sh                     all but the long tables
#   ./test.sh --all               all
#   ./test.sh -x -k routing       arguments go to pytest
#   PYTHON=python3.13 ./test.sh   another interpreter, its own environment
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT
# Only what is installed may be imported.
unset PYTHONPATH

fail() {
  echo "test.sh: $1" >&2
  exit 1
}

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  # Not `command -v`: a version manager's shim may exist and run nothing.
  if python3.11 -c "" 2>/dev/null; then PYTHON=python3.11; fi
fi
version="$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])')" ||
  fail "\`$PYTHON\` does not run. Set PYTHON to Python 3.11 or newer."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "\`$PYTHON\` is $version, expected 3.11 or newer. Set PYTHON."

venv="$root/.venv-test-$version"
python="$venv/bin/python"
if ! "$python" -m pip --version >/dev/null 2>&1; then
  "$PYTHON" -m venv --clear "$venv" ||
    fail "\`$PYTHON -m venv\` failed. On Debian: apt-get install python3-venv."
fi

step() { echo "== $1 ($SECONDS s)"; }
pip() { "$python" -m pip --quiet --disable-pip-version-check "$@"; }

step "build"
pip install build
"$python" -m build --outdir "$scratch/dist" "$root" >"$scratch/log" 2>&1 || {
  cat "$scratch/log" >&2
  fail "the package does not build."
}

step "install"
wheel="$(echo "$scratch"/dist/*.whl)"
pip install "${wheel}[test]"
# The version alone does not tell pip that the wheel is new.
pip install --force-reinstall --no-deps "$wheel"

cd "$root"
step "lint"
"$python" -m ruff check .
"$python" -m ruff format --check .

step "types"
"$python" -m pyrefly check --python-interpreter-path "$python"

# From elsewhere, so that the checkout cannot be imported by accident. A file has one
# worker: its tests share fixtures and compiled programs.
cd "$scratch"
step "tests"
"$python" -m pytest -c "$root/setup.cfg" --rootdir "$root" --numprocesses 2 \
  --dist loadfile --durations=20 --durations-min=2 \
  --doctest-modules "$root/tests" --pyargs jaxroute "$@"

echo "test.sh: passed in $SECONDS s with Python $version," \
  "jax $("$python" -c 'import jax; print(jax.__version__)')"
