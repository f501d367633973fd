#!/usr/bin/env bash
# PyTorch 2.14.1 has a device "meta", whose tensors have shapes and no values: one would expect that deriving a shape there
# costs nothing. Seen: the first sum of two tensors, product with a number, division or square root of such a tensor imports
# PyTorch's compiler (torch._dynamo), and takes about a second in a fresh process. A matrix product, the sum over an axis and
# softmax do not import it (0.3 seconds), nor does a division on the CPU (none).
# Exits 0 while that is so, 1 if it is not. Installs PyTorch with CUDA's libraries, some 5 GB, for a minute or two.
set -euo pipefail
unset PYTHONDONTWRITEBYTECODE
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
"$python" -m pip install -q --no-compile --target "$work/packages" "torch==2.14.1" || exit 2
cat > "$work/show.py" <<'PYTHON'
import sys
import time

import torch

device, what = sys.argv[1:]
x = torch.empty(4, 4, device=device)
start = time.perf_counter()
made = {
    "x + x": lambda: x + x, "x * 2": lambda: x * 2, "x / 2": lambda: x / 2, "x.sqrt()": lambda: x.sqrt(),
    "x @ x": lambda: x @ x, "x.sum(0)": lambda: x.sum(0), "softmax": lambda: x.softmax(0),
}[what]()
seconds = time.perf_counter() - start
imported = "torch._dynamo" in sys.modules
print(f"torch {torch.__version__}, {device}, {what}: {seconds:.2f} s, compiler imported: {imported}")
sys.exit(imported)
PYTHON
show() { PYTHONPATH=$work/packages "$python" -W ignore "$work/show.py" "$@"; }
show meta 'x / 2' >/dev/null || true # Python compiles what it imports the first time
for what in 'x + x' 'x * 2' 'x / 2' 'x.sqrt()'; do
    if show meta "$what"; then exit 1; fi
done
for what in 'x @ x' 'x.sum(0)' softmax; do show meta "$what" || exit 1; done
show cpu 'x / 2' || exit 1
