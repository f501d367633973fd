#!/usr/bin/env bash
# Print the path of a Python with which the package can be set up, or an error that says what is missing.
# Prefers 3.12 or 3.13 on PATH (megatron-core has wheels for these), then an inactive one of pyenv, then one
# from uv; a newer Python is used only if there is none of these.
set -euo pipefail

# A candidate is usable if it runs (a pyenv shim of an inactive version does not), its version is at least $2 and
# below $3, it can make virtual environments (a separate package on Debian), and it is not .venv's own Python,
# which may be active and is about to be removed.
usable() {
    "$1" -c '
import os, sys
if os.path.realpath(sys.prefix) == os.path.realpath(".venv"):
    sys.exit(1)
low, high = (tuple(map(int, v.split("."))) for v in sys.argv[1:])
if not low <= sys.version_info[:2] < high:
    sys.exit(1)
import ensurepip, venv
' "$2" "$3" >/dev/null 2>&1
}

# Every Python on PATH and under pyenv, one path a line.
candidates() {
    type -ap python3.12 python3.13 python3 python || true
    local pyenv_root=${PYENV_ROOT:-$HOME/.pyenv}
    local versions=("$pyenv_root"/versions/3.*/bin/python3)
    if [[ -e ${versions[0]} ]]; then
        printf '%s\n' "${versions[@]}"
    fi
    type -ap python3.14 python3.15 || true
}

find_between() {
    local python
    while IFS= read -r python; do
        if usable "$python" "$1" "$2"; then
            echo "$python"
            exit 0
        fi
    done < <(candidates)
}

find_between 3.12 3.14
if command -v uv >/dev/null && { uv python find --system 3.12 || uv python install 3.12; } >/dev/null 2>&1; then
    python=$(uv python find --system 3.12)
    usable "$python" 3.12 3.14 && echo "$python" && exit 0
fi
find_between 3.14 4.0

echo "error: no Python >= 3.12 that can make virtual environments is on PATH, under pyenv or through uv;" \
    "install one (for example: apt install python3.12-venv, pyenv install 3.12, or uv from https://docs.astral.sh/uv)" >&2
exit 2
