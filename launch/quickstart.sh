#!/usr/bin/env bash
# From nothing to pictures: sets up .venv, builds a data set of 1,898 pictures, trains a tokenizer and a generator of its
# codes, measures both, draws, and makes a page of each. Killed? The same command goes on where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-2} # two data-parallel halves of a batch keep two cores busier than one whole
bash launch/setup.sh
ibq() { .venv/bin/python -m ibq_jax "$@"; }
ibq prepare openmoji
ibq train --config=configs/tokenizer.py:openmoji32 --workdir="$run/tokenizer"
ibq evaluate --run="$run/tokenizer" --pictures="$run/reconstructions.png" --json="$run/tokenizer.json"
ibq tokenize --tokenizer="$run/tokenizer" --out="$run/codes"
ibq train --config=configs/autoregressive.py:openmoji32 --config.token_cache="$run/codes" --workdir="$run/generator"
ibq evaluate --run="$run/generator" --json="$run/generator.json"
ibq sample --run="$run/generator" --out="$run/samples.png"
for part in tokenizer generator; do ibq report --workdir="$run/$part" --out="$run/$part.html" --overwrite; done
echo
echo "Look at $run/tokenizer.html and $run/generator.html in a browser: curves, pictures, numbers, what to try."
echo "Next, a larger codebook in another work folder:"
echo "  .venv/bin/python -m ibq_jax train --config=configs/tokenizer.py:openmoji32 --workdir=runs/codes8192 --config.codebook.size=8192"
