#!/usr/bin/env bash
# From nothing to a trained tokenizer with pictures: sets up .venv, builds a data set of 1,898 pictures, trains, measures.
# Six minutes on two CPU cores. Killed? The same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-2} # two data-parallel halves of a batch keep two cores busier than one whole
bash launch/setup.sh
.venv/bin/python -m ibq_jax prepare openmoji
.venv/bin/python -m ibq_jax train --config=configs/tokenizer.py:openmoji32 --workdir="$run" "$@"
.venv/bin/python -m ibq_jax evaluate --run="$run" --pictures="$run/reconstructions.png" --json="$run/evaluation.json"
echo
echo "Look at $run/reconstructions.png (originals above, reconstructions below)."
echo "Next, a larger codebook in another work folder:"
echo "  .venv/bin/python -m ibq_jax train --config=configs/tokenizer.py:openmoji32 --workdir=runs/codes8192 --config.codebook.size=8192"
