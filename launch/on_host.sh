#!/usr/bin/env bash
# Runs one host's part of launch/hosts.sh, called over ssh:  IBQ_PROCESSES=... bash launch/on_host.sh LOGS COMMAND
# hosts.sh holds standard input open and writes nothing to it: when it closes, on purpose or because the connection
# broke, the process gets SIGTERM. Output goes to a file, and process 0's is shown from there, because a process that
# prints to a broken connection would be killed while it saves.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
index=${IBQ_PROCESSES##*,}
log=${IBQ_LOGS:-runs/logs}/$1/$index.log
shift
mkdir -p "${log%/*}" && : >"$log" || exit 2
exec 3<&0
"${IBQ_PYTHON:-.venv/bin/python}" -m ibq_jax "$@" >"$log" 2>&1 </dev/null 3<&- &
process=$!
{
  read -r <&3
  kill -TERM $process
  for _ in {1..300}; do sleep 1; done
  kill -KILL $process
} >/dev/null 2>&1 &
stopper=$!
if [ "$index" -eq 0 ]; then
  tail -n +1 -f --pid=$process "$log" 3<&- &
  shown=$!
fi
wait $process
code=$?
kill $stopper
wait $stopper 2>/dev/null # without the shell's message about it
if [ "$index" -eq 0 ]; then
  wait "$shown"
elif [ $code -ne 0 ] && [ $code -ne 143 ]; then
  tail -n 5 "$log" >&2
fi
exit $code
