#!/usr/bin/env bash
# Make .venv, with the package (editable), its dependencies and the tools of its developers.
# Takes a fraction of a second when nothing changed since it last ended well.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

stamp=.venv/setup-stamp
wanted=$(cat setup.py pyproject.toml scripts/setup.sh)
# A virtual environment breaks when its Python goes away, or when the folder is moved: its scripts hold its path.
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
echo "setup: installing the package and what it needs (about 5 GB the first time)"
# --no-compile: Python compiles what is imported when it is imported, which is far less than all of it.
install=(.venv/bin/python -m pip install --no-compile --disable-pip-version-check -e '.[dev]')
if ! "${install[@]}" | { grep --line-buffered -v '^Requirement already satisfied' || true; }; then
    echo "error: setup: pip could not install the package (its reason is above); fix that and run 'make setup' again" >&2
    exit 2
fi
printf '%s\n' "$wanted" >"$stamp"
echo "setup: done"
