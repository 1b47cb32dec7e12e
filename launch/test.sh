#!/usr/bin/env bash
# Sets up .venv and runs every test but the long ones. Arguments go to pytest:  bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONDONTWRITEBYTECODE  # a hundred processes are started, which would each compile every module again
bash launch/setup.sh tests torch hub
# Megatron's own reader of the files that `export` writes; it runs without the package's dependencies. Absent, its test is skipped.
.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --only-binary :all: "megatron-core==0.16.1" || true
# Programs for TPUs and GPUs are compiled by XLA's own compilers, which need neither, in an environment of their own:
# JAX looks for a TPU wherever libtpu is installed. apache-beam needs older versions of protobuf and other packages.
# Both are installed while the main part runs: pip by itself would leave one of two cores idle.
installing=
if [ $# -eq 0 ] && [ "$(uname -sm)" = "Linux x86_64" ]; then
  (VENV=.venv-compilers bash launch/setup.sh pytest tpu cuda && VENV=.venv-beam bash launch/setup.sh pytest beam) &
  installing=$!
fi
# Two workers, because each mostly compiles in one thread. The tests of one file share what they set up and stay together.
# Only some faults are injected; all of them, with their table: .venv/bin/python -m pytest tests/faults
# The threads of one worker's linear algebra would only wait for those of the other's: a Frechet distance takes a third.
export OPENBLAS_NUM_THREADS=1
IBQ_FAULTS=few .venv/bin/python -m pytest -n 2 --dist loadfile "$@"
if [ -n "$installing" ]; then
  wait "$installing"
  export JAX_PLATFORMS=cpu JAX_DISABLE_MOST_OPTIMIZATIONS=0  # what users compile is what these tests read
  .venv-compilers/bin/python -m pytest -n 2 -m "compiler and not long" tests/commands/test_plan.py tests/plan \
    tests/system/test_compiled_precision.py tests/system/test_compiled_kernels.py
  .venv-beam/bin/python -m pytest tests/system/test_beam.py
fi
