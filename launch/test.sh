#!/usr/bin/env bash
# Sets up .venv and runs every test. Arguments go to pytest:  bash launch/test.sh -m 'not slow'
set -euo pipefail
cd "$(dirname "$0")/.."
bash launch/setup.sh tests torch
exec .venv/bin/python -m pytest "$@"
