#!/usr/bin/env bash
# Creates a Cloud TPU, installs this repository on it, runs a command there and shows its output:
#   bash launch/tpu_pod.sh --name=pod --zone=ZONE --type=v5litepod-64 run train --config=... --workdir=gs://BUCKET/run
# Flags: --project=P --spot --queued (wait in Google's queue) --version=RUNTIME (default: by type) --env=NAME=VALUE ...
#   --dry-run (prints each gcloud command, runs none). Instead of run, one of its parts, or what comes later:
#   create        creates the TPU unless it exists; creates it again if it was preempted
#   install       copies the tree at the current commit to every worker and runs launch/setup.sh tpu gcs there
#   start COMMAND starts it on every worker, detached; a preemption notice reaches it as SIGTERM, so that it saves
#   tail          shows worker 0's output until it ends, and exits with its code (Ctrl-C ends only the tail)
#   status        shows the TPU's state and the last line of every worker
#   stop          sends SIGTERM to every worker and waits until all have saved
#   delete        deletes the TPU
# After a preemption, the same run line creates the TPU again and continues. gcloud can only talk to several workers
# with a key from an ssh agent: ssh-add ~/.ssh/google_compute_engine.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
name='' zone='' type='' version='' queued='' dry_run='' spot=() project=() settings=()
while [[ ${1:-} == --* ]]; do
  case $1 in
  --name=*) name=${1#*=} ;;
  --zone=*) zone=${1#*=} ;;
  --type=*) type=${1#*=} ;;
  --project=*) project=("$1") ;;
  --version=*) version=${1#*=} ;;
  --env=[A-Za-z_]*=*) settings+=("${1#*=}") ;;
  --spot) spot=(--spot) ;;
  --queued) queued=1 ;;
  --dry-run) dry_run=1 ;;
  *) wrong_use "there is no flag $1" ;;
  esac
  shift
done
verb=${1:-}
[ -n "$verb" ] || wrong_use "a verb is missing: run, create, install, start, tail, status, stop or delete"
shift
[[ " run create install start tail status stop delete " == *" $verb "* ]] || wrong_use "there is no verb $verb"
[ -n "$name" ] || wrong_use "--name=NAME is missing"
[ -n "$zone" ] || wrong_use "--zone=ZONE is missing"
case $verb in
run | create) [ -n "$type" ] || wrong_use "--type=TYPE is missing, such as v5litepod-64" ;;
esac
case $verb in
run | start)
  needs_command "$@"
  for argument in "$@"; do
    case $argument in
    --workdir=gs://* | --out=gs://*) ;;
    --workdir=* | --out=*)
      echo "tpu_pod.sh: $argument is not gs://...: every worker writes to its own disk, which goes with the TPU" >&2
      ;;
    esac
  done
  ;;
*) [ $# -eq 0 ] || wrong_use "$verb takes no arguments" ;;
esac
if [ -z "$version" ]; then
  case $type in
  v6e-*) version=v2-alpha-tpuv6e ;;
  v5p-*) version=v2-alpha-tpuv5 ;;
  v5litepod-*) version=v2-alpha-tpuv5-lite ;;
  *) version=tpu-ubuntu2204-base ;;
  esac
fi

place=(--zone="$zone" ${project[@]+"${project[@]}"})
command_line() { # runs the command, or prints it in a dry run
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}
tpu_vm() { command_line gcloud compute tpus tpu-vm "$@"; }
queue() { command_line gcloud compute tpus queued-resources "$@"; }
on_workers() { # all|0 COMMAND...: runs it in the tree there
  local workers=$1
  shift
  tpu_vm ssh "$name" "${place[@]}" --worker="$workers" --command="cd ibq_jax && $(quoted "$@")"
}

state() { # prints the TPU's state; nothing if there is no TPU
  if [ -n "$queued" ]; then
    queue describe "$name" "${place[@]}" --format='value(state.state)' 2>/dev/null || true
  else
    tpu_vm describe "$name" "${place[@]}" --format='value(state)' 2>/dev/null || true
  fi
}

create() {
  local now
  if [ -n "$dry_run" ]; then
    state
    now=''
  else
    now=$(state)
  fi
  case $now in
  READY | ACTIVE)
    echo "$name exists" >&2
    return
    ;;
  PREEMPTED | TERMINATED | FAILED | SUSPENDED)
    echo "$name is $now; creating it again" >&2
    delete
    now=''
    ;;
  esac
  if [ -n "$now" ] && [ -z "$queued" ]; then
    echo "tpu_pod.sh: $name is $now; try again when it is READY, or delete it" >&2
    exit 1
  fi
  if [ -z "$queued" ]; then
    tpu_vm create "$name" "${place[@]}" --accelerator-type="$type" --version="$version" ${spot[@]+"${spot[@]}"}
    return
  fi
  if [ -z "$now" ]; then
    queue create "$name" "${place[@]}" --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
      ${spot[@]+"${spot[@]}"}
  fi
  if [ -n "$dry_run" ]; then
    state # repeated until ACTIVE in a real run
    return
  fi
  local seen=''
  until [ "$seen" = ACTIVE ]; do
    now=$(state)
    [ "$now" = "$seen" ] || echo "$name: ${now:-no answer}" >&2
    seen=$now
    case $seen in
    ACTIVE) ;;
    FAILED | SUSPENDING | SUSPENDED)
      echo "tpu_pod.sh: the queue ended with $seen; the same line requests it again" >&2
      exit 1
      ;;
    *) sleep "${IBQ_POLL:-30}" ;;
    esac
  done
}

install() {
  local archive=build/$name.tar.gz apt='sudo apt-get -o DPkg::Lock::Timeout=600'
  if [ -z "$dry_run" ]; then
    [ -z "$(git status --porcelain)" ] || echo "tpu_pod.sh: changes that are not committed are not copied" >&2
    mkdir -p build
  fi
  command_line git archive --format=tar.gz --output="$archive" HEAD
  tpu_vm scp "$archive" "$name:ibq_jax.tar.gz" "${place[@]}" --worker=all
  # Replaces the tree and keeps what was installed and written. Google's images come with Python 3.10 only.
  local steps=(
    "mkdir -p ibq_jax && cd ibq_jax"
    "{ [ ! -e launch/tpu_worker.sh ] || bash launch/tpu_worker.sh idle; }"
    "find . -mindepth 1 -maxdepth 1 ! -name '.venv*' ! -name runs ! -name data -exec rm -r {} +"
    "tar -xzf ../ibq_jax.tar.gz"
    "{ command -v python3.11 >/dev/null || { sudo apt-get update -qq && $apt install -y -qq python3.11-venv; }; }"
    "bash launch/setup.sh tpu gcs"
  )
  local all
  all=$(printf ' && %s' "${steps[@]}")
  tpu_vm ssh "$name" "${place[@]}" --worker=all --command="${all# && }"
}

start() { on_workers all env IBQ_PROCESSES=auto ${settings[@]+"${settings[@]}"} bash launch/tpu_worker.sh start "$@"; }
show() { on_workers 0 bash launch/tpu_worker.sh tail; }

delete() {
  if [ -n "$queued" ]; then
    queue delete "$name" "${place[@]}" --force --quiet
  else
    tpu_vm delete "$name" "${place[@]}" --quiet
  fi
}

case $verb in
run)
  create
  install
  start "$@"
  show
  ;;
create | install | delete) "$verb" ;;
start) start "$@" ;;
tail) show ;;
status)
  state
  on_workers all bash launch/tpu_worker.sh status
  ;;
stop) on_workers all bash launch/tpu_worker.sh stop ;;
esac
