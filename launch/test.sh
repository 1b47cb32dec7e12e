#!/usr/bin/env bash
# Sets up .venv and runs every test. Arguments go to pytest:  bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh tests torch hub
# Megatron's own reader of the files that `export` writes; it runs without the package's dependencies. Absent, its test is skipped.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: "megatron-core==0.16.1" || true
# Two workers, because each mostly compiles in one thread. The tests of one file share what they set up and stay together.
# Only some faults are injected; all of them, with their table: .venv/bin/python -m pytest tests/faults
# The threads of one worker's linear algebra would only wait for those of the other's: a Frechet distance takes a third.
export OPENBLAS_NUM_THREADS=1
IBQ_FAULTS=few .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
# Plans for TPUs need the TPU's compiler, in a venv of its own, because JAX looks for a TPU wherever it is installed.
if [ $# -eq 0 ] && [ "$(uname -sm)" = "Linux x86_64" ]; then
  VENV=.venv-tpu bash launch/setup.sh tests tpu
  export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0  # what users compile is what these tests read
  COMPILED=(tests/commands/test_plan.py tests/plan tests/system/test_compiled_precision.py)
  .venv-tpu/bin/python -m pytest -n 2 -m "compiler and not long" "${COMPILED[@]}"
  # XLA's compiler for GPUs comes with the CUDA packages, which need no GPU.
  VENV=.venv-cuda bash launch/setup.sh tests cuda
  .venv-cuda/bin/python -m pytest -n 2 -m "compiler and not long" "${COMPILED[@]}" tests/system/test_compiled_kernels.py
  # apache-beam needs older versions of protobuf and other packages.
  VENV=.venv-beam bash launch/setup.sh tests beam
  .venv-beam/bin/python -m pytest tests/system/test_beam.py
fi
