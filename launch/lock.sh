#!/usr/bin/env bash
# Writes requirements*.txt, the exact versions that launch/setup.sh and CI install, from the ranges in pyproject.toml.
#   bash launch/lock.sh               keeps every version that the ranges still allow
#   bash launch/lock.sh --upgrade     takes the newest ones instead; --upgrade-package=NAME: of one package only
# requirements.txt is the base install and requirements-EXTRA.txt what an extra adds to it. requirements-beam.txt is an
# environment of its own, since Apache Beam needs older versions of packages in the base install.
set -euo pipefail
cd "$(dirname "$0")/.."
tool=$(mktemp -d)
trap 'rm -rf "$tool"' EXIT
"${PYTHON:-python3.11}" -m venv "$tool"
"$tool/bin/pip" install --quiet --disable-pip-version-check uv==0.13.9

compile() { # FILE UV_OPTION...: one version per package, for Python 3.11 and later, on Linux and macOS
  "$tool/bin/uv" pip compile --quiet --system-certs --universal --fork-strategy fewest --python-version 3.11 \
    --no-annotate --no-header --output-file "$1" "${@:2}" pyproject.toml
}

compile requirements.txt "$@"
compile requirements-beam.txt --extra beam "$@"
constraints=(--constraints requirements.txt) # and every extra before this one, so that they can be combined
for extra in torch cuda tpu hub onnx gcs pytest photos tests; do
  file=requirements-$extra.txt
  compile "$file" --extra "$extra" "${constraints[@]}" "$@"
  left_out='^$'
  # PyTorch's CUDA build brings its own libraries; the CPU build is enough and has none.
  [ "$extra" != torch ] || left_out='^(cuda-|nvidia-|triton=)'
  { echo "# Added to requirements.txt by the extra '$extra'." && grep -vxFf requirements.txt "$file" | grep -vE "$left_out"; } \
    >"$file.partial" && mv "$file.partial" "$file"
  constraints+=(--constraints "$file")
done
