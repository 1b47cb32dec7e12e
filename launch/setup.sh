#!/usr/bin/env bash
# Installs the pinned packages and this one into .venv; returns at once unless a pin or pyproject.toml has changed.
#   bash launch/setup.sh [EXTRA ...]      EXTRA: tests, torch, hub, onnx, tpu, cuda, gcs, photos, beam, pytest (requirements-EXTRA.txt)
#   VENV=DIR bash launch/setup.sh ...     installs into another folder than .venv
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${VENV:-.venv}
files=(requirements.txt)
[[ " $* " != *" beam "* ]] || files=() # requirements-beam.txt is a complete environment
for extra in "$@"; do files+=("requirements-$extra.txt"); done
stamp=$(cat pyproject.toml "${files[@]}" | sha256sum | cut -c1-16)
marker=$venv/installed-$(IFS=-; echo "$*")-$stamp
[ -e "$marker" ] && exit 0
python=${PYTHON:-python3.11}
command -v "$python" >/dev/null || python=python3
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or later is needed; set PYTHON=/path/to/it" >&2; exit 2; }
[ -d "$venv" ] || "$python" -m venv "$venv"
echo "installing ${files[*]} into $venv ..."
arguments=()
for file in "${files[@]}"; do arguments+=(-r "$file"); done
# Python compiles a module when it is first imported; all of them at once would take as long as the rest of the installation.
# Where it may not store what it compiled, however, every start would compile all that it imports, for seconds.
compile=--no-compile
[ -z "${PYTHONDONTWRITEBYTECODE:-}" ] || compile=--compile
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$compile" "${arguments[@]}" --editable . 2> >(grep -v '^WARNING: Location' >&2)
touch "$marker"
