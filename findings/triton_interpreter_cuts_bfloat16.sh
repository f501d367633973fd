#!/usr/bin/env bash
# Triton 3.8.0 runs kernels without a GPU in its interpreter (TRITON_INTERPRET=1), which is how kernels are tested on the CPU. One
# would expect a float32 number that becomes bfloat16 there to be rounded to the nearest, as compiled kernels and PyTorch do.
# Seen: it is cut off toward zero, in a cast and in a store alike. Of 4096 normal random numbers half are one unit too small.
# float16 is rounded. Numbers below the normal range come out wrong altogether: 1e-40 becomes 1.0102e-39. So a test of a kernel
# that ends in bfloat16 cannot ask for equality in the interpreter.
# Exits 0 while that is so, 1 if it is not. Installs Triton and PyTorch with CUDA's libraries, some 5 GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
"$python" -m pip install -q --no-compile --target "$work/packages" "triton==3.8.0" "torch==2.14.1" numpy || exit 2
cat > "$work/show.py" <<'PYTHON'
import sys

import torch
import triton
import triton.language as tl


@triton.jit
def cast(source, target, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(target + place, tl.load(source + place).to(target.dtype.element_ty))


@triton.jit
def store(source, target, N: tl.constexpr):
    place = tl.arange(0, N)
    tl.store(target + place, tl.load(source + place))


drawn = torch.randn(4096, generator=torch.Generator().manual_seed(0))
seen = {}
for kernel in (cast, store):
    for dtype in (torch.bfloat16, torch.float16):
        found = torch.empty(4096, dtype=dtype)
        kernel[(1,)](drawn, found, 4096)
        seen[kernel.__name__, dtype] = float((found == drawn.to(dtype)).float().mean())
        if dtype is torch.bfloat16:
            toward_zero = float((found.float().abs() <= drawn.abs()).float().mean())
            print(f"{kernel.__name__}: of the bfloat16 numbers {toward_zero:.0%} are no larger than their float32")
small, found = torch.full((16,), 1e-40), torch.empty(16, dtype=torch.bfloat16)
cast[(1,)](small, found, 16)
for (name, dtype), share in seen.items():
    print(f"triton {triton.__version__}, {name}: {share:.0%} of {dtype} numbers equal PyTorch's")
print(f"1e-40 in bfloat16: {float(found[0]):.4e} here, {float(small[0].bfloat16()):.4e} by PyTorch")
halves = all(0.4 < share < 0.6 for (_, dtype), share in seen.items() if dtype is torch.bfloat16)
whole = all(share == 1 for (_, dtype), share in seen.items() if dtype is torch.float16)
sys.exit(not (halves and whole and float(found[0]) > 1e-39))
PYTHON
TRITON_INTERPRET=1 PYTHONPATH=$work/packages "$python" -W ignore "$work/show.py" || exit 1
