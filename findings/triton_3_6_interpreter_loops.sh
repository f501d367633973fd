#!/usr/bin/env bash
# PyTorch 2.11.0 brings Triton 3.6.0 and allows any NumPy. One would expect Triton's interpreter (TRITON_INTERPRET=1), in which kernels
# are tested without a GPU, to run a loop whose bound is an argument of the kernel. Seen: with NumPy 2.4 and later it raises TypeError
# ("only 0-dimensional arrays can be converted to Python scalars"), with NumPy 2.3.5 it runs, and Triton 3.7.0 runs with both.
# Exits 0 while that is so, 1 if it is not. Installs two Tritons and two NumPys, and PyTorch with CUDA's libraries, some 5 GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
install() { "$python" -m pip install -q --no-compile "$@" || exit 2; }
install --target "$work/torch" "torch==2.11.0"
rm -rf "$work/torch"/triton "$work/torch"/numpy
for version in 3.6.0 3.7.0; do install --no-deps --target "$work/triton-$version" "triton==$version"; done
for version in 2.3.5 2.4.3; do install --no-deps --target "$work/numpy-$version" "numpy==$version"; done
cat > "$work/show.py" <<'PYTHON'
import numpy
import torch
import triton
import triton.language as tl


@triton.jit
def add_up(numbers, total, count, BLOCK: tl.constexpr):
    found = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, count, BLOCK):
        place = start + tl.arange(0, BLOCK)
        found += tl.load(numbers + place, mask=place < count, other=0.0)
    tl.store(total, tl.sum(found, 0))


total = torch.zeros(1)
try:
    add_up[(1,)](torch.ones(100), total, 100, 16)
    said = "right" if total.item() == 100 else f"wrong: {total.item()}"
except Exception as error:  # Triton's InterpreterError
    said = str(error).splitlines()[-1]
print(f"triton {triton.__version__}, numpy {numpy.__version__}: {said}")
PYTHON
for triton in 3.6.0 3.7.0; do
    for numpy in 2.3.5 2.4.3; do
        PYTHONPATH=$work/triton-$triton:$work/numpy-$numpy:$work/torch TRITON_INTERPRET=1 "$python" -W ignore "$work/show.py"
    done
done | tee "$work/said"
[[ $(grep -c ': right$' "$work/said") == 3 ]] && grep -q "triton 3.6.0, numpy 2.4.3: .*0-dimensional" "$work/said"
