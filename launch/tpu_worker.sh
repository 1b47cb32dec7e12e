#!/usr/bin/env bash
# Runs one TPU worker's part of launch/tpu_pod.sh, which calls it over ssh:  bash launch/tpu_worker.sh start COMMAND ...
# Also: tail, status, stop, idle. runs/worker/ holds the log, the pid of the supervising shell, and the exit code.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=${IBQ_LOGS:-runs/worker}
verb=$1
shift
runs() { [ -e "$folder/pid" ] && kill -0 "$(<"$folder/pid")" 2>/dev/null; }
ended() {
  local code
  code=$(cat "$folder/exit" 2>/dev/null) || code='none: nothing was started, or the machine restarted'
  echo "$(hostname): ended with exit code $code"
}

needs_idle() {
  if runs; then
    echo "$(hostname): a command is already running (see tail, status and stop)" >&2
    exit 2
  fi
}

# Waits for Google's notice, about 30 seconds ahead, that this machine will be preempted.
preemption() {
  local url=http://${GCE_METADATA_HOST:-metadata.google.internal}/computeMetadata/v1/instance/preempted
  local etag=0 answer='' # with etag 0 the first answer comes at once, each later one on a change or after a minute
  until [[ $answer == *TRUE* ]]; do
    if ! answer=$(curl -sf -i --max-time 90 -H 'Metadata-Flavor: Google' \
      "$url?wait_for_change=true&timeout_sec=60&last_etag=$etag"); then
      answer=''
      sleep "${IBQ_POLL:-10}"
      continue
    fi
    etag=$(tr -d '\r' <<<"$answer" | sed -n 's/^[Ee][Tt][Aa][Gg]: *//p')
    answer=${answer##*$'\n'}
  done
}

case $verb in
idle) needs_idle ;;
start)
  needs_idle
  mkdir -p "$folder"
  rm -f "$folder/exit"
  setsid nohup bash launch/tpu_worker.sh watch "$@" </dev/null >>"$folder/log" 2>&1 &
  echo $! >"$folder/pid"
  ;;
watch) # runs the command and waits for it; started by start
  echo "--- $(date '+%F %T') $*"
  "${IBQ_PYTHON:-.venv/bin/python}" -m ibq_jax "$@" &
  command=$!
  trap 'signalled=1; kill -TERM $command 2>/dev/null || true' TERM
  set -m # a process group of its own, so that curl ends with it
  {
    preemption
    echo "--- $(date '+%F %T') this machine is being preempted: SIGTERM"
    kill -TERM $command
  } &
  watcher=$!
  set +m
  signalled=1
  while [ -n "$signalled" ]; do # a signal ends the wait, but not the command
    signalled='' code=0
    wait $command || code=$?
  done
  { kill -- -$watcher && wait $watcher; } 2>/dev/null || true
  echo "--- $(date '+%F %T') exit code $code"
  echo "$code" >"$folder/exit"
  ;;
tail)
  if runs; then tail -n 100 -f --pid="$(<"$folder/pid")" "$folder/log"; else tail -n 100 "$folder/log"; fi
  exit "$(cat "$folder/exit" 2>/dev/null || echo 1)"
  ;;
status)
  if runs; then echo "$(hostname): runs; $(tail -n 1 "$folder/log")"; else ended; fi
  ;;
stop)
  if runs; then kill -TERM "$(<"$folder/pid")"; fi
  while runs; do sleep 0.2; done
  ended
  ;;
*)
  echo "tpu_worker.sh: there is no verb $verb" >&2
  exit 2
  ;;
esac
