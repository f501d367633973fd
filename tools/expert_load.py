"""Held-out loss of a Mixture-of-Experts, and how evenly its tokens fall on the experts.

    torchrun --nproc-per-node 2 -m tools.expert_load --config configs/demo/moe.yaml --load MOE \\
        --valid-data-path DIR/held_out --output load.json [any flag of pretrain]

Megatron's own evaluation (--skip-train) over ``--eval-iters`` batches; the loss is in its log line. The
output holds ``tokens_per_expert``, for every layer the tokens that each expert was given.
"""

import json
import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling import pretrain
from megatron_router_upcycling.errors import UserError


def measure(argv: list[str]) -> None:
    """Evaluate as ``argv`` says and write the tokens that each expert of each layer was given."""
    run = pretrain.prepare([*argv, "--skip-train"], needs_checkpoint=True)
    if run.router is None:
        raise UserError(f"--load {run.args.load}: is a dense model, which has no experts to count tokens for")
    if not run.args.output:
        raise UserError("--output: name the JSON file to write")
    from megatron.core.transformer.moe.router import TopKRouter

    counts: dict[int, torch.Tensor] = defaultdict(lambda: torch.zeros(run.args.num_experts, dtype=torch.long))

    def count(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(module, TopKRouter):
            _, routing_map = output  # [tokens on this rank, experts], bool
            counts[module.layer_number] += routing_map.sum(dim=0).long().cpu()

    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        pretrain.train(run)
    finally:
        hook.remove()

    # Layers and tokens may be on any rank, and tensor-parallel ranks may count the same tokens again: the
    # sum over ranks keeps the proportions, which are what is asked for.
    everyone: list[dict[int, list[int]] | None] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, {layer: c.tolist() for layer, c in counts.items()})
    if torch.distributed.get_rank() == 0:
        layers = sorted({layer for found in everyone if found for layer in found})
        table = [
            [
                sum(column)
                for column in zip(
                    *(found[layer] for found in everyone if found and layer in found), strict=True
                )
            ]
            for layer in layers
        ]
        output = Path(run.args.output)
        partial = output.with_name(output.name + f".partial{os.getpid()}")
        partial.write_text(json.dumps({"tokens_per_expert": table}) + "\n", encoding="utf-8")
        partial.rename(output)


if __name__ == "__main__":
    pretrain.exit_on_user_error(lambda: measure(sys.argv[1:]))
