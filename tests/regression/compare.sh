#!/usr/bin/env bash
# Compare, bit for bit, what the commands of two checkouts write: tests/regression/compare.sh OLD NEW   (README.md)
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-$here/../../.venv/bin/python}"
if [ ! -x "$python" ]; then
  echo "error: there is no $python; run 'make install', or set PYTHON to one that has hsat's dependencies" >&2
  exit 2
fi
exec "$python" "$here/compare.py" "$@"
