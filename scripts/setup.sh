#!/usr/bin/env bash
# Make .venv with the package (editable), its dependencies and the development tools.
# Takes a fraction of a second if nothing changed since it last succeeded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/setup-stamp
wanted=$(cat setup.py pyproject.toml scripts/setup.sh)
# A virtual environment breaks if its Python is removed, or if the folder is moved: its scripts contain its path.
sound() { .venv/bin/python -c '' 2>/dev/null && grep -qsF "$PWD/.venv/bin/" .venv/bin/pip; }

if [[ -f $stamp && $(<"$stamp") == "$wanted" ]] && sound; then
    exit 0
fi
if ! sound; then
    python=$(scripts/find_python.sh)
    echo "setup: making .venv with $python"
    "$python" -m venv --clear .venv
fi
rm -f "$stamp"
# The pip that comes with Python 3.12 takes three times as long to look through the indexes.
.venv/bin/python -m pip install -q --disable-pip-version-check 'pip>=25' || true
echo "setup: installing the package and what it needs (about 5 GB the first time)"
# --no-compile: Python compiles modules when they are imported, which is far fewer than all of them.
install=(.venv/bin/python -m pip install --no-compile --disable-pip-version-check -e '.[dev]')
if ! "${install[@]}" | { grep --line-buffered -v '^Requirement already satisfied' || true; }; then
    echo "error: setup: pip could not install the package (its reason is above); fix that and run 'make setup' again" >&2
    exit 2
fi
printf '%s\n' "$wanted" >"$stamp"
echo "setup: done"
