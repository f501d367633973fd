"""A dense checkpoint into a Mixture-of-Experts."""

import argparse
import dataclasses
import sys
import time
from pathlib import Path
from typing import Any

from megatron_router_upcycling.commands.shared import add_output_flags, progress_bar
from megatron_router_upcycling.config.start import HEAD_KEYS, InitConfig
from megatron_router_upcycling.conversion.options import Method, read_method
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import GROUPINGS, POOLINGS, RouterConfig

EXAMPLES = """\
example:
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config dense.yaml \\
      --load ckpt/dense --output ckpt/key_stats.safetensors
  router-upcycle convert ckpt/dense ckpt/moe --key-stats ckpt/key_stats.safetensors --num-experts 8 --top-k 2
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config moe.yaml \\
      --load ckpt/moe --save runs/moe

DENSE and OUT are checkpoint roots: the folder of latest_checkpointed_iteration.txt. OUT names the bytes of
each expert once, whatever --num-experts, and hard-links what does not change: DENSE may be deleted, but its
files must not be written over in place (by training that saves the same iteration again). --materialize
makes a checkpoint that shares nothing.

DENSE is in torch_dist or in the legacy format (mp_rank_XX/model_optim_rng.pt), saved at any tensor and
pipeline parallel size. Of the legacy format nothing can be linked, and little with --layers: it is copied.

--config names the file that pretrain will be given. Its entries num_experts, moe_router_topk and
moe_router_pre_softmax, and its upcycling: section, are the conversion's options, so that one file is one
method: see configs/methods and configs/ablations.

--granularity G cuts each of the --num-experts copies in G experts of 1/G the width, which start with equal
router keys, so that a token goes to all G of each of --top-k copies. --shared-expert keeps the dense FFN for
every token: one half of the output is its, the other the chosen experts'. What is said below of the first
step holds for both, but that shards differ from the start, and that half of the output cannot shrink.

--target-entropy E scales each layer's logits so that a token's routing distribution over all experts has a
mean entropy of E nats (even routing over n experts: ln n, 2.08 for 8) on the hidden states that collect_keys
keeps (--router-samples). Routers made of heads may start surer than is good for them, and random ones too
even: inspect shows each layer's entropy, and names the flag where it would help. For the mixture and for
linear, switch and mlp routers.
configs/methods/calibrated.yaml is the paper's method with 1.5, calibrated_topk_first.yaml a random linear
router with 1.5 and softmax after top-k; docs/comparison.md has what is known of them.

what to expect of the first step:
  --moe-router-pre-softmax      softmax over all experts, then top-k (the paper): the k weights sum to less
                                than 1, the FFN's output shrinks by that sum and the loss jumps; the router
                                learns from the first step
  --no-moe-router-pre-softmax   top-k, then softmax: exactly the dense model; the LM loss gives the router no
                                gradient until the experts differ

where the model can go (export-hf): transformers, vLLM and SGLang compute either order. llama.cpp does not ask
for it: if the model is to go there, give a Qwen3 --no-moe-router-pre-softmax and a Qwen1.5, 2 or 2.5
--moe-router-pre-softmax, and leave --layers out. No class of transformers holds a Qwen3 with
--shared-expert, which needs --allow-no-export. A model that is no Qwen is converted, and a line says that it
has no class there.
"""


def add(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a Mixture-of-Experts checkpoint of a dense one",
        description="Make a Mixture-of-Experts checkpoint (torch_dist) of a dense one (torch_dist or legacy)."
        " Any tensor, pipeline and expert parallel size loads it.",
        epilog=EXAMPLES,
    )
    convert.add_argument("dense", metavar="DENSE", type=Path, help="the dense model's checkpoint")
    convert.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to make")
    convert.add_argument("--key-stats", metavar="FILE", type=Path, help="what collect_keys wrote for DENSE")
    convert.add_argument(
        "--config", metavar="YAML", type=Path, help="the method, as in configs/methods; flags stand above it"
    )
    convert.add_argument("--num-experts", type=int, help="experts a layer (default: 8)")
    convert.add_argument("--top-k", type=int, help="experts a token goes to (default: 2; 1 for switch)")
    convert.add_argument(
        "--granularity",
        metavar="G",
        type=int,
        default=1,
        help="cut each expert in G narrower ones; a token goes to G times as many (default: 1)",
    )
    convert.add_argument(
        "--layers",
        metavar="LIST",
        help="give experts to these layers only, as in 1,3,5-7 or 1-23:2 (default: all)",
    )
    convert.add_argument(
        "--shared-expert", action="store_true", help="keep the dense FFN as an expert for every token as well"
    )
    convert.add_argument(
        "--router", choices=kinds.KINDS, help="(default: mixture; linear is vanilla upcycling)"
    )
    convert.add_argument("--num-routers", type=int, help="routers in the mixture (default: --num-experts)")
    convert.add_argument("--pooling", choices=POOLINGS, help="how scores combine (default: sum)")
    convert.add_argument("--grouping", choices=GROUPINGS, help="how heads are paired (default: greedy)")
    convert.add_argument(
        "--head-key",
        choices=HEAD_KEYS,
        help="a head's key: the mean key of its query group (the paper's), or what the head attends to"
        " (default: mean; attended where a model has fewer query groups than heads)",
    )
    convert.add_argument(
        "--target-entropy",
        metavar="E",
        type=float,
        help="scale each layer's logits to this mean routing entropy, in nats (default: as they come); see"
        " below",
    )
    convert.add_argument("--seed", type=int, default=1234, help="of all that is drawn (default: 1234)")
    convert.add_argument(
        "--moe-router-pre-softmax",
        action=argparse.BooleanOptionalAction,
        help="softmax before top-k (default), or after; see below",
    )
    convert.add_argument("--materialize", action="store_true", help="real copies; share no bytes with DENSE")
    convert.add_argument(
        "--allow-no-export",
        action="store_true",
        help="convert what options make impossible to export as well",
    )
    convert.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    add_output_flags(convert)
    convert.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    file, router, init = method(args)
    import torch

    from megatron_router_upcycling.conversion import convert, describe
    from megatron_router_upcycling.conversion.options import Options
    from megatron_router_upcycling.diagnostics import ties
    from megatron_router_upcycling.hf import exporter

    torch.set_num_threads(1)  # the work is moving bytes; more threads only wait for each other
    start = time.monotonic()
    options = Options(
        router=router,
        init=init,
        key_source=file.key_source,
        key_stats=args.key_stats,
        seed=args.seed,
        materialize=args.materialize,
        overwrite=args.overwrite,
        shared_expert=args.shared_expert,
        layers=args.layers,
        config=args.config,
        megatron=file.megatron,
    )
    ready = convert.prepare(args.dense, args.out, options)
    note = None if args.allow_no_export else exporter.check_conversion(ready)
    if note and not args.quiet:
        print(note)
    if args.dry_run:
        print(describe.describe_plan(ready))
        return
    with progress_bar("convert", ready.bytes_to_write, args.quiet) as progress:
        record = convert.convert(ready, progress)
    if not args.quiet:
        print(describe.describe_result(ready, record, time.monotonic() - start))
    if warning := ties.warn(args.out):
        print(warning, file=sys.stderr)


def method(args: argparse.Namespace) -> tuple[Method, RouterConfig, InitConfig]:
    """The YAML file's method, and the router and its start as the flags above the file have them.

    Raises:
        UserError: an option does not exist, cannot have its value, or does not suit the router.
    """
    file = read_method(args.config)
    router = _router_to_make(args, file.router)
    given = {name: getattr(args, name) for name in ("head_key", "target_entropy")}
    given = {name: value for name, value in given.items() if value is not None}
    init = dataclasses.replace(file.init, **given)
    init.check(router)
    return file, router, init


def _router_to_make(args: argparse.Namespace, file: dict[str, Any]) -> RouterConfig:
    """The flags' options over the file's over the defaults.

    Flags count copies of the dense FFN, a file's ``num_experts`` and ``moe_router_topk`` Megatron's experts.
    """
    flags = {
        "router": args.router,
        "num_experts": args.num_experts and args.num_experts * args.granularity,
        "top_k": args.top_k and args.top_k * args.granularity,
        "num_routers": args.num_routers,
        "pooling": args.pooling,
        "grouping": args.grouping,
        "pre_softmax": args.moe_router_pre_softmax,
    }
    kind = kinds.get(args.router or file.get("router", "mixture"))
    for name in ("num_routers", "pooling", "grouping"):
        if flags[name] is not None and name not in kind.options:
            flag, suits = f"--{name.replace('_', '-')}", " or ".join(kinds.names_with(name))
            raise UserError(f"{flag} {flags[name]}: is for --router {suits}; leave it out for {kind.name}")
    given = file | {name: value for name, value in flags.items() if value is not None}
    defaults = {"num_experts": 8 * args.granularity, "top_k": kind.top_k * args.granularity}
    return RouterConfig(**(defaults | given), granularity=args.granularity)
