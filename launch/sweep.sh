#!/usr/bin/env bash
# Runs a sweep with one job per point, and then writes its table:
#   bash launch/sweep.sh [--sbatch=FLAG ...] [--dry-run] sweep --config=... --over codebook.size=256,1024 --workdir=runs/sweep
# With Slurm: submits a job array, in which each job trains one point with launch/slurm.sbatch (it saves before the time
# limit and is requeued), then a job that writes the table even if points failed. --sbatch=FLAG, such as --time=8:00:00
# or --gpus-per-node=8, applies to the array; account, partition and qos also to the table's job. Without Slurm: trains
# the points here, one after the other. The same line again trains only the points that are not done. For other hosts or
# a TPU pod see --launcher in python -m ibq_jax sweep --help.
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
points=$("${sweep[@]}" --list) # which also reports wrong flags once, here, instead of in every job
last=$(($(wc -l <<<"$points") - 1))
submit() { # runs the command, or prints it in a dry run
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
