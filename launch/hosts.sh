#!/usr/bin/env bash
# Starts one process on each host of a list, over ssh:
#   bash launch/hosts.sh --hosts=a,b,c [--dir=PATH] [--port=8476] [--env=NAME=VALUE ...] [--dry-run] train --config=...
# --hosts=@FILE reads the hosts from a file, one per line. Every host needs the repository, with its .venv, at the same
# path (--dir; default: the path here) and ssh access without a password. All hosts must reach the first one at --port.
# The first host's output is shown here; each host writes its own to PATH/runs/logs (or --env=IBQ_LOGS=FOLDER). SIGTERM,
# Ctrl-C and a broken connection reach every process as SIGTERM, so that it saves. Exits with the first exit code that
# is not 0.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
hosts='' folder=$PWD port=8476 dry_run='' settings=()
while [[ ${1:-} == --* ]]; do
  case $1 in
  --hosts=*) hosts=${1#*=} ;;
  --dir=*) folder=${1#*=} ;;
  --port=*) port=${1#*=} ;;
  --env=[A-Za-z_]*=*) settings+=("${1#*=}") ;;
  --dry-run) dry_run=1 ;;
  *) wrong_use "there is no flag $1" ;;
  esac
  shift
done
if [[ $hosts == @* ]]; then
  [ -r "${hosts#@}" ] || wrong_use "the list of hosts ${hosts#@} cannot be read"
  hosts=$(sed 's/#.*//' "${hosts#@}")
fi
read -r -d '' -a hosts <<<"${hosts//,/ }" || true
[ ${#hosts[@]} -gt 0 ] || wrong_use "--hosts=a,b,c or --hosts=@FILE is missing"
for host in "${hosts[@]}"; do [[ $host =~ ^[A-Za-z0-9_] ]] || wrong_use "$host is not a host"; done
needs_command "$@"
is_count "$port" || wrong_use "--port=$port is not a port"
stamp=${IBQ_STAMP:-$(date +%Y%m%d-%H%M%S)-$$}

on_host() { # INDEX COMMAND...: prints the line that ssh runs there
  local index=$1
  shift
  echo "cd $(quoted "$folder") && $(quoted env "IBQ_PROCESSES=${hosts[0]##*@}:$port,${#hosts[@]},$index" \
    ${settings[@]+"${settings[@]}"} bash launch/on_host.sh "hosts-$stamp" "$@")"
}
connect=(ssh -o BatchMode=yes -o ServerAliveInterval=15 -o ServerAliveCountMax=8)

if [ -n "$dry_run" ]; then
  for i in "${!hosts[@]}"; do quoted "${connect[@]}" "${hosts[i]}" "$(on_host "$i" "$@")"; done
  exit 0
fi
held=$(mktemp -d)
mkfifo "$held/pipe"
# shellcheck disable=SC2094 # both ends, on purpose
exec 9<>"$held/pipe" 8<"$held/pipe" # readers of 8 see end of file when 9 is closed, even by kill -9
rm -r "$held"
stop_all() { exec 9>&-; }
remember_signals
set -m # one process group each, so that Ctrl-C does not end the connections
for i in "${!hosts[@]}"; do
  "${connect[@]}" "${hosts[i]}" "$(on_host "$i" "$@")" <&8 9>&- &
  pids+=($!)
  logs+=("hosts-$stamp/$i.log on ${hosts[i]}")
done
set +m
echo "${#hosts[@]} processes; 0 on ${hosts[0]} prints here, each logs to hosts-$stamp/ in its host's $folder/runs/logs" >&2
attend
