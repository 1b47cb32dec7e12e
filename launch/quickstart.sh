#!/usr/bin/env bash
# Sets up .venv, builds a data set of 1,898 images, trains a tokenizer and a generator of its codes, evaluates both,
# draws samples, and writes a report of each. If it is interrupted, the same command continues where it stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
run=runs/quickstart
export JAX_NUM_CPU_DEVICES=${JAX_NUM_CPU_DEVICES:-2} # two half batches keep two cores busier than one whole batch
bash launch/setup.sh
ibq() { .venv/bin/python -m ibq_jax "$@"; }
ibq prepare openmoji
ibq train --config=configs/tokenizer.py:openmoji32 --workdir="$run/tokenizer"
ibq evaluate --run="$run/tokenizer" --reconstructions="$run/reconstructions.png" --json="$run/tokenizer.json"
ibq tokenize --run="$run/tokenizer" --out="$run/codes"
ibq train --config=configs/autoregressive.py:openmoji32 --config.token_cache="$run/codes" --workdir="$run/generator"
ibq evaluate --run="$run/generator" --json="$run/generator.json"
ibq sample --run="$run/generator" --out="$run/samples.png"
for part in tokenizer generator; do ibq report --run="$run/$part" --out="$run/$part.html" --overwrite; done
echo
echo "Look at $run/tokenizer.html and $run/generator.html in a browser: curves, images, numbers, what to try."
echo "Next, a larger codebook, in a run folder of its own:"
echo "  .venv/bin/python -m ibq_jax train --config=configs/tokenizer.py:openmoji32 --workdir=runs/codes8192 --config.codebook.size=8192"
