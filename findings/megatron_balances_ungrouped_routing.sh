#!/usr/bin/env bash
# Megatron-Core 0.19.2 limits a token to some groups of experts (--moe-router-num-groups, --moe-router-group-topk). One would
# expect its load-balancing loss to count the experts that tokens go to. Seen: the loss takes the top k of all experts, without
# groups. Of 4096 tokens with random logits, 8 experts in 2 groups of which a token chooses one, top 2, it counts other experts
# than the routing for 29% of the choices; without groups the two are equal.
# Exits 0 while that is so, 1 if it is not. Installs Megatron-Core and PyTorch with CUDA's libraries, some 5 GB.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python=${PYTHON:-python3.12}
"$python" -m pip install -q --no-compile --target "$work/packages" "megatron-core==0.19.2" "torch==2.14.1" || exit 2
cat > "$work/show.py" <<'PYTHON'
import importlib.metadata
import sys

import torch
from megatron.core.transformer.moe import moe_utils

logits = torch.randn(4096, 8, generator=torch.Generator().manual_seed(0))


def share_of_others(groups: int | None) -> float:
    """The share of the routing's choices that the loss does not count."""
    chosen = 1 if groups else None
    _, routed = moe_utils.topk_routing_with_score_function(logits, 2, num_groups=groups, group_topk=chosen)
    counted, _ = moe_utils.compute_routing_scores_for_aux_loss(logits, 2, "softmax")
    return float((routed.bool() & ~counted.bool()).sum() / routed.sum())


grouped, plain = share_of_others(2), share_of_others(None)
version = importlib.metadata.version("megatron-core")
print(f"megatron-core {version}: not counted in 2 groups {grouped:.1%}, without groups {plain:.1%}")
sys.exit(not (0.1 < grouped < 0.9 and plain == 0))
PYTHON
PYTHONPATH=$work/packages "$python" -W ignore "$work/show.py" || exit 1
