#!/usr/bin/env bash
# The whole suite on the committed versions (lock), on the newest releases, and on the oldest that pyproject.toml declares.
#
#   tests/matrix.sh                             all three
#   tests/matrix.sh newest oldest               some of them
#   PYTHON=python3.13 tests/matrix.sh lock      with another interpreter
#
# Each has an environment of its own, .venv-NAME-PYTHON (6 GB on Linux, where torch brings its GPU libraries).  The
# oldest run on Python 3.11, for which all of them have wheels.  Ends with one line for each; status 1 if any failed.
set -uo pipefail
cd "$(dirname "$0")/.."

runs() { "$1" -c 'import sys' 2>/dev/null; }

names=("$@")
[ $# -gt 0 ] || names=(lock newest oldest)
summary=()
failed=0
for name in "${names[@]}"; do
  python=${PYTHON:-python3}
  case $name in
    lock) constraints=constraints.txt ;;
    newest) constraints= ;;
    oldest)
      constraints=constraints-oldest.txt
      [ -n "${PYTHON:-}" ] || ! runs python3.11 || python=python3.11
      ;;
    *)
      echo "tests/matrix.sh: no set of versions is called $name; there are lock, newest and oldest" >&2
      exit 2
      ;;
  esac
  release=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 2
  venv=.venv-$name-$release
  [ "$name" != newest ] || rm -f "$venv"/.installed* # what is newest changes without a change of any file here
  log=$(mktemp)
  start=$SECONDS
  echo "== $name, Python $release"
  make install CONSTRAINTS="$constraints" VENV="$venv" PYTHON="$python" || { failed=1; summary+=("$name: not installed"); continue; }
  installed=$((SECONDS - start))
  start=$SECONDS
  result=passed
  make test CONSTRAINTS="$constraints" VENV="$venv" PYTHON="$python" 2>&1 | tee "$log" || { failed=1; result=FAILED; }
  versions=$("$venv/bin/python" -m pip list --format=freeze 2>/dev/null \
    | grep -E '^(torch|torchvision|timm|numpy|faiss[-_]cpu|pydantic)==' | tr '\n' ' ')
  counts=$(grep -E '[0-9]+ (passed|failed).* in ' "$log" | tail -n 1)
  summary+=("$name: $result on Python $release, installed in $installed s, tested in $((SECONDS - start)) s: $counts ($versions)")
  rm -f "$log"
done
printf '%s\n' "${summary[@]}"
exit $failed
