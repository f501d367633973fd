#!/usr/bin/env bash
# sonic-moe 0.1.2.post1 (fused experts) and flash-attn-4 4.0.0b36 (attention) are both written in NVIDIA's CuTe DSL, by overlapping
# authors, and one would expect a model to train with both. Seen: they cannot be installed together, since sonic-moe wants
# nvidia-cutlass-dsl 4.4.2 exactly and flash-attn-4 at least 4.6.2. sonic-moe also wants PyTorch 2.9.1 at most, so that beside
# a newer one it goes in by --no-deps only (with quack-kernels 0.3.11: newer ones want a newer DSL as well).
# Exits 0 while that is so, 1 if it is not. Installs nothing: pip looks for versions that fit. It may load PyTorch, 0.9 GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
sonic="sonic-moe==0.1.2.post1" flash="flash-attn-4==4.0.0b36"
"$python" -m pip download -q --no-deps -d "$work" "$sonic" "$flash" || exit 2
for wheel in "$work"/*.whl; do
    echo "${wheel##*/}:"
    "$python" -m zipfile -e "$wheel" "$work/${wheel##*/}.d"
    grep -hE '^Requires-Dist: (nvidia-cutlass-dsl|torch|quack-kernels)([^-\[a-z].*)?$' "$work/${wheel##*/}.d"/*.dist-info/METADATA
done
if "$python" -m pip install --dry-run --target "$work/both" "$sonic" "$flash" > "$work/said" 2>&1; then
    echo "both can be installed now"
    exit 1
fi
grep -E "depends on nvidia-cutlass-dsl" "$work/said" || { tail -n 5 "$work/said"; exit 2; }
