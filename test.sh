#!/bin/sh
# Sets up as run.sh does, then checks style and types and runs the tests.
#
#   ./test.sh              minutes; other arguments go to pytest
#   ./test.sh --all        also what takes longer: many kills, several processes, fuzzing, benchmarks
set -eu
cd "$(dirname "$0")"
if [ "${1-}" = --all ]; then
    shift
    set -- -m "not long" --hypothesis-profile=all "$@"
fi
./run.sh --setup
.venv/bin/python -m pip install --quiet --requirement tests/requirements.txt
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 --dist=worksteal "$@"
