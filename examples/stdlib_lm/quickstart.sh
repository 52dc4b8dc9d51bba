#!/usr/bin/env bash
# Set up and run the quickstart: three adapters merged with every method, and what each merge did to each skill.
#
#     bash examples/stdlib_lm/quickstart.sh [ARGUMENTS OF quickstart.py]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

bash install.sh evaluate
exec "${VENV:-.venv}/bin/python" examples/stdlib_lm/quickstart.py "$@"
