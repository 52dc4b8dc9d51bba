#!/usr/bin/env bash
# Set up and run every check: lint, format, types, tests with branch coverage. Fails if any of them fails.
#
#     bash tests/run.sh [PYTEST ARGUMENTS]        for example: bash tests/run.sh tests/posterior -m "not slow"
#
# MERGEKIT_PYTHON=path/to/python compares with a real mergekit 0.1.5 as well (tests/parity).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash install.sh test || exit 1
bin="$(cd "${VENV:-.venv}" && pwd)/bin"
export PATH="$bin:$PATH"
# One thread per test process: OpenMP threads that wait for each other on a busy machine slow everything several times.
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1

failed=()
check() {
    echo "== $*"
    "$@" || failed+=("$*")
}
check ruff check .
check ruff format --check .
check mypy

echo "== pytest"
workers="$(python -c 'import os; print(min(8, len(os.sched_getaffinity(0))))')"
python -m pytest -n "$workers" --dist worksteal --cov --cov-report=term:skip-covered "$@" || failed+=(pytest)

if ((${#failed[@]})); then
    printf 'tests/run.sh: failed: %s\n' "${failed[@]}" >&2
    exit 1
fi
