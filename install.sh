#!/usr/bin/env bash
# Set up everything in .venv, from nothing but Python 3.11 or newer (with venv and pip):
#
#     bash install.sh [EXTRA...]        for example: bash install.sh test
#
# Versions come from constraints.txt. A second run does nothing unless pyproject.toml or constraints.txt changed.
#     PYTHON=python3.12  another interpreter          VENV=folder  another place than .venv
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

venv="${VENV:-.venv}"
extras="$(IFS=,; echo "$*")"
stamp="$venv/.installed-${extras:-core}"

suitable() {
    "$1" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3.11 python3 python3.12 python3.13 python}; do
        if suitable "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    echo "install.sh: no Python >= 3.11 with the venv and ensurepip modules (tried: ${PYTHON:-python3.11" \
        "python3 python3.12 python3.13 python}). On Debian: apt install python3-venv." >&2
    return 1
}

# without pip, an earlier run was cut short
if ! "$venv/bin/python" -c 'import pip' 2>/dev/null; then
    python="$(find_python)"
    echo "install.sh: creating $venv with $python" >&2
    # only ever clear what is an environment
    "$python" -m venv $([[ -f "$venv/pyvenv.cfg" ]] && echo --clear) "$venv"
fi

wanted="$("$venv/bin/python" - pyproject.toml constraints.txt <<'PY'
import hashlib, pathlib, sys

digest = hashlib.sha256(f"{sys.version} {pathlib.Path.cwd()}".encode())
for name in sys.argv[1:]:
    digest.update(pathlib.Path(name).read_bytes())
print(digest.hexdigest())
PY
)"
if [[ -f "$stamp" && "$(<"$stamp")" == "$wanted" ]]; then
    exit 0
fi

install() {
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt "$@"
}
echo "install.sh: installing mergekit_bayes${extras:+[$extras]} into $venv (the first time downloads PyTorch)" >&2
install pip setuptools
# torch on its own first: whatever needs it then keeps this build instead of choosing another one
install torch
# the build tool's advice about editable installs is not for those who follow these lines
PYTHONWARNINGS=ignore install --no-build-isolation --editable ".${extras:+[$extras]}"
echo "$wanted" >"$stamp"
