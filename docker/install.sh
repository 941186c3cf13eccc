#!/bin/sh
# Install jepakit with some of its extras into a virtual environment: what the Dockerfile does, and what
# tests/test_docker.py runs, since an image is no more than this plus a user and an entry point.
#
#   sh docker/install.sh /opt/jepakit serve
set -eu
target=$1 extras=$2
here=$(cd "$(dirname "$0")/.." && pwd)
python3 -m venv "$target"
"$target/bin/python" -m pip install --quiet uv
# Versions from the lock, so that an image is the one that was tested; hashes are checked by `make setup`.
sed -n 's/^\([A-Za-z0-9._-]*==[^ \\]*\)\( ;[^\\]*\)\{0,1\}.*/\1\2/p' "$here/requirements.lock" > "$target/constraints.txt"
"$target/bin/uv" pip install --quiet --python "$target/bin/python" --constraint "$target/constraints.txt" "$here[$extras]"
"$target/bin/jepakit" --help > /dev/null
