#!/bin/sh
# Sets up as run.sh does, then checks style and types and runs every test.
set -eu
cd "$(dirname "$0")"
./run.sh --setup
.venv/bin/python -m pip install --quiet --requirement tests/requirements.txt
.venv/bin/ruff check
.venv/bin/ruff format --check
.venv/bin/mypy
.venv/bin/python -m pytest -n 2 --dist=worksteal "$@"
