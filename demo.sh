#!/usr/bin/env bash
# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
#
# Trains a balanced Mixture-of-Experts language model: from any machine with Python.
#
#   ./demo.sh                            a few minutes on two CPU cores
#   ./demo.sh --rule=proportional,none   two rules side by side; --help has more
#   PYTHON=python3.13 ./demo.sh          another interpreter
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
venv="$root/.venv-demo"
python="$venv/bin/python"
installed="$venv/installed"
# Only what is installed may be imported.
unset PYTHONPATH

fail() {
  echo "demo.sh: $1" >&2
  exit 1
}

if [[ -z "${PYTHON:-}" ]]; then
  PYTHON=python3
  # Not `command -v`: a version manager's shim may exist and run nothing.
  for each in python3.11 python3.12 python3.13; do
    if "$each" -c "" 2>/dev/null; then PYTHON="$each"; fi
  done
fi
version() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])'; }
wanted="$(version "$PYTHON")" ||
  fail "\`$PYTHON\` does not run. Set PYTHON to Python 3.11 or newer."
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
  fail "expected Python 3.11 or newer, got $wanted from \`$PYTHON\`. Set PYTHON."

if [[ "$(version "$python" 2>/dev/null)" != "$wanted" ]] ||
  ! "$python" -m pip --version >/dev/null 2>&1; then
  "$PYTHON" -m venv --clear "$venv" ||
    fail "\`$PYTHON -m venv\` failed. On Debian: apt-get install python3-venv."
fi

sources=("$root/jaxroute" "$root/kernels" "$root/setup.cfg")
if [[ ! -e "$installed" ]] ||
  [[ -n "$(find "${sources[@]}" -newer "$installed" -name '*.*' -print -quit)" ]]
then
  echo "demo.sh: installing jaxroute and what the example needs into $venv"
  "$python" -m pip --quiet --disable-pip-version-check install \
    "$root[examples]" || fail "pip failed; see above."
  touch "$installed"
fi

exec "$python" "$root/examples/lm/train.py" "$@"
