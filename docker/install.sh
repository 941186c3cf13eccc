#!/bin/sh
# Install jepakit with some of its extras into a virtual environment. The Dockerfile does this, and tests/test_docker.py
# runs it, because an image is nothing more than this plus a user and an entry point.
#
#   sh docker/install.sh /opt/jepakit serve
set -eu
target=$1 extras=$2
here=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$target"
"$target/bin/python" -m pip install --quiet uv
# Versions and hashes come from the lock, so that an image holds what was tested: uv checks the hashes in constraints.
# Bytecode is compiled now, because a read-only image cannot store it later.
"$target/bin/uv" pip install --quiet --compile-bytecode --python "$target/bin/python" \
  --build-constraint "$here/requirements.lock" --constraint "$here/requirements.lock" "$here[$extras]"
"$target/bin/uv" pip uninstall --quiet --python "$target/bin/python" uv pip
"$target/bin/jepakit" --help > /dev/null
