#!/usr/bin/env bash
# Runs a command on all GPUs of this host, in one process or several:
#   bash launch/local_gpus.sh [--processes=N] [--port=PORT] [--dry-run] train --config=... --workdir=...
# By default one process drives all GPUs. With --processes=N, each of N processes gets an equal share of them (on a host
# without GPUs: simulated CPU devices, see JAX_NUM_CPU_DEVICES). Process 0 prints here; the others write to a folder
# that is named on start. SIGTERM and Ctrl-C reach all processes as SIGTERM, so that they save. Exits with the first
# exit code that is not 0. IBQ_PYTHON (default .venv/bin/python) is the interpreter, IBQ_LOGS (default runs/logs) the
# log folder.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
processes=1 port='' dry_run=''
while [[ ${1:-} == --* ]]; do
  case $1 in
  --processes=*) processes=${1#*=} ;;
  --port=*) port=${1#*=} ;;
  --dry-run) dry_run=1 ;;
  *) wrong_use "there is no flag $1" ;;
  esac
  shift
done
needs_command "$@"
is_count "$processes" || wrong_use "--processes=$processes is not a number of processes"
[ -z "$port" ] || is_count "$port" || wrong_use "--port=$port is not a port"

gpus=0
if command -v nvidia-smi >/dev/null; then
  if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then # JAX numbers these from 0
    visible=${CUDA_VISIBLE_DEVICES//[^,]/}
    [ -z "$CUDA_VISIBLE_DEVICES" ] || gpus=$((${#visible} + 1))
  else
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU') || true # without a driver there are no GPUs
  fi
fi
share=$((gpus / processes))
[ $((share * processes)) -eq "$gpus" ] || wrong_use "$gpus GPUs cannot be shared evenly by $processes processes"

if [ "$processes" -gt 1 ] && [ -z "$port" ]; then
  port=$((20000 + RANDOM % 12000)) # below the range from which the system assigns ports
  while (: <"/dev/tcp/localhost/$port") 2>/dev/null; do port=$((20000 + RANDOM % 12000)); done
fi
python=${IBQ_PYTHON:-.venv/bin/python}
settings() { # prints the environment of process $1
  [ "$processes" -eq 1 ] && return
  echo "IBQ_PROCESSES=localhost:$port,$processes,$1"
  [ "$share" -eq 0 ] || echo "JAX_LOCAL_DEVICE_IDS=$(seq -s, $(($1 * share)) $((($1 + 1) * share - 1)))"
}

if [ -n "$dry_run" ]; then
  for ((i = 0; i < processes; i++)); do
    # shellcheck disable=SC2046 # settings have no spaces
    quoted $(settings "$i") "$python" -m ibq_jax "$@"
  done
  exit 0
fi
folder=${IBQ_LOGS:-runs/logs}/local-$(date +%Y%m%d-%H%M%S)-$$
if [ "$processes" -gt 1 ]; then
  mkdir -p "$folder"
  echo "$processes processes; 0 prints here, the others into $folder/" >&2
fi
stop_all() {
  for pid in "${pids[@]}"; do kill -TERM "$pid" 2>/dev/null || true; done
}
remember_signals
set -m # one process group each, so that Ctrl-C reaches them once, through this script
for ((i = 0; i < processes; i++)); do
  # shellcheck disable=SC2046 # settings have no spaces
  if [ "$i" -eq 0 ]; then
    env $(settings "$i") "$python" -m ibq_jax "$@" </dev/null &
    logs+=('')
  else
    logs+=("$folder/$i.log")
    env $(settings "$i") "$python" -m ibq_jax "$@" </dev/null >"$folder/$i.log" 2>&1 &
  fi
  pids+=($!)
done
set +m
attend
