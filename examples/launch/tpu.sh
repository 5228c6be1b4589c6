#!/usr/bin/env bash
# Copyright 2026 The jaxroute Authors. Licensed under the Apache License, 2.0.
#
# A slice of Cloud TPUs, from asking for it to giving it back. Only `create` makes
# something that is billed, and only in the project and zone that you name:
#
#   export PROJECT=my-project ZONE=us-west4-a OUT=gs://my-bucket/run
#   examples/launch/tpu.sh create              asks for the slice
#   examples/launch/tpu.sh wait                until it is there
#   examples/launch/tpu.sh install             this checkout's HEAD, on every host
#   examples/launch/tpu.sh run --size=tiny     train.py on every host, into OUT
#   examples/launch/tpu.sh logs                of process 0, as they come
#   examples/launch/tpu.sh stop                saves and ends; `run` goes on from there
#   examples/launch/tpu.sh delete              the slice; OUT stays
#
# Variables, with their defaults: NAME=jaxroute, ACCELERATOR=v5litepod-16, RUNTIME (by
# ACCELERATOR), SPOT=0 (1: cheaper, and may be taken away), WORKER=0 (of `logs`),
# POLL=30 (seconds between looks of `wait`).
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"

fail() {
  echo "tpu.sh: $1" >&2
  exit 2
}

: "${PROJECT:?Set PROJECT to the Google Cloud project that pays.}"
# https://cloud.google.com/tpu/docs/regions-zones
: "${ZONE:?Set ZONE to one that has such TPUs, as us-west4-a.}"
NAME="${NAME:-jaxroute}"
ACCELERATOR="${ACCELERATOR:-v5litepod-16}"
where=("--project=$PROJECT" "--zone=$ZONE")

queue() { gcloud compute tpus queued-resources "$@" "${where[@]}"; }
# The node of a queued resource has its name.
on() {
  gcloud compute tpus tpu-vm ssh "$NAME" "${where[@]}" "--worker=$1" "--command=$2"
}

create() {
  case "$ACCELERATOR" in
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) runtime="${RUNTIME:?Set RUNTIME to that of $ACCELERATOR.}" ;;
  esac
  request=("--node-id=$NAME" "--accelerator-type=$ACCELERATOR")
  request+=("--runtime-version=${RUNTIME:-$runtime}")
  if [[ "${SPOT:-0}" == 1 ]]; then request+=(--spot); fi
  queue create "$NAME" "${request[@]}"
}

wait_for_it() {
  while true; do
    state="$(queue describe "$NAME" "--format=value(state.state)")"
    echo "$(date +%T) $NAME: $state"
    case "$state" in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED)
        queue describe "$NAME" >&2
        fail "$NAME is $state, see above. Delete it, and create it anew."
        ;;
    esac
    sleep "${POLL:-30}"
  done
}

# The hosts' own Python is older than jax allows.
install() {
  scratch="$(mktemp -d)"
  trap 'rm -rf "$scratch"' EXIT
  git -C "$root" archive --format=tar.gz "--output=$scratch/jaxroute.tar.gz" HEAD
  gcloud compute tpus tpu-vm scp "$scratch/jaxroute.tar.gz" "$NAME:" "${where[@]}" \
    --worker=all
  on all "set -e
rm -rf jaxroute && mkdir jaxroute && tar -xzf jaxroute.tar.gz -C jaxroute
curl -LsSf https://astral.sh/uv/install.sh | sh
~/.local/bin/uv venv --clear --python=3.12 venv
~/.local/bin/uv pip install --python=venv './jaxroute[tpu,examples]' 'etils[epath-gcs]'"
}

# Behind nohup, so that it outlives the connection.
run() {
  : "${OUT:?Set OUT to gs://BUCKET/FOLDER, which all hosts can write to.}"
  line="$(printf ' %q' "--out=$OUT" "$@")"
  on all "cd jaxroute
if [ -e ~/train.pid ] && kill -0 \"\$(cat ~/train.pid)\" 2>/dev/null; then
  echo 'A run is in progress here. Say tpu.sh stop first.' >&2
  exit 2
fi
nohup ~/venv/bin/python -u examples/lm/train.py$line >~/train.log 2>&1 </dev/null &
echo \$! >~/train.pid"
}

case "${1:-}" in
  create) create ;;
  wait) wait_for_it ;;
  install) install ;;
  run) run "${@:2}" ;;
  logs) on "${WORKER:-0}" "tail -n +1 -F train.log" ;;
  stop) on all 'kill -TERM "$(cat train.pid)"' ;;
  delete)
    # It asks before it deletes, and the list shows what is still billed.
    queue delete "$NAME" --force
    gcloud compute tpus tpu-vm list "${where[@]}"
    ;;
  *) fail "expected create, wait, install, run, logs, stop or delete, got '${1:-}'." ;;
esac
