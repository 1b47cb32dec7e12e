#!/usr/bin/env bash
# A sweep with a job for each point, and its table after them:
#   bash launch/sweep.sh [--sbatch=FLAG ...] [--dry-run] sweep --config=... --over codebook.size=256,1024 --workdir=runs/sweep
# Where there is Slurm: a job array, each of whose jobs trains a point with launch/slurm.sbatch (which saves before the
# time limit and is queued again), then a job that writes the table, whatever became of the points. --sbatch=--time=8:00:00
# --sbatch=--gpus-per-node=8 and so on are of the array; account, partition and qos of the table's job too. Without Slurm
# the points are trained here, one after the other. The same line again trains what is not done. On hosts or a TPU pod:
# --launcher, see python -m ibq_jax sweep --help.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/common.sh
dry_run='' for_points=() for_table=()
while [[ ${1:-} == --* ]]; do
  case $1 in
  --sbatch=--account=* | --sbatch=--partition=* | --sbatch=--qos=*)
    for_points+=("${1#*=}")
    for_table+=("${1#*=}")
    ;;
  --sbatch=-*) for_points+=("${1#*=}") ;;
  --dry-run) dry_run=1 ;;
  *) wrong_use "there is no flag $1" ;;
  esac
  shift
done
[ "${1:-}" = sweep ] || wrong_use "write sweep and its flags, such as: sweep --config=... --over FIELD=A,B --workdir=..."
sweep=("${IBQ_PYTHON:-.venv/bin/python}" -m ibq_jax "$@")

if ! command -v sbatch >/dev/null; then
  if [ -n "$dry_run" ]; then quoted "${sweep[@]}"; else exec "${sweep[@]}"; fi
  exit 0
fi
points=$("${sweep[@]}" --list) # and what is wrong with the flags is said here, not in every job
last=$(($(wc -l <<<"$points") - 1))
submit() { # runs it, or prints it
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}
point="exec $(quoted "${sweep[@]}" "--launcher=bash launch/slurm.sbatch") --point=\$SLURM_ARRAY_TASK_ID"
array=$(submit sbatch --parsable --job-name=ibq-sweep "--array=0-$last" --ntasks-per-node=1 --signal=TERM@300 --requeue \
  --open-mode=append ${for_points[@]+"${for_points[@]}"} --wrap="$point")
if [ -n "$dry_run" ]; then
  echo "$array"
  array=ARRAY
fi
submit sbatch --job-name=ibq-sweep-table "--dependency=afterany:${array%%;*}" ${for_table[@]+"${for_table[@]}"} \
  --wrap="exec $(quoted "${sweep[@]}" --table)"
