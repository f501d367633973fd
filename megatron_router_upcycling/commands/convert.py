"""Make a Mixture-of-Experts checkpoint of a dense one, of several, or of one with fewer experts.

DENSE is in torch_dist or in the legacy format (mp_rank_XX/model_optim_rng.pt), saved at any tensor and
pipeline parallel size. OUT is in torch_dist, which any tensor, pipeline and expert parallel size loads.

example:
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config dense.yaml \\
      --load ckpt/dense --output ckpt/key_stats.safetensors
  router-upcycle convert ckpt/dense ckpt/moe --key-stats ckpt/key_stats.safetensors --num-experts 8 --top-k 2
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config moe.yaml \\
      --load ckpt/moe --save runs/moe

DENSE and OUT are checkpoint roots: the folder of latest_checkpointed_iteration.txt. OUT stores equal experts
once, whatever --num-experts, and hard-links files that do not change: DENSE may be deleted, but its files
must not be overwritten in place (by training that saves the same iteration again). --materialize makes a
checkpoint that shares nothing. The legacy format is copied instead, and so is most with --layers.

--config names the file that pretrain will be given. Its entries num_experts, moe_router_topk and
moe_router_pre_softmax and its upcycling: section are the conversion's options, so that one file is one
method: see configs/methods and configs/ablations. Flags override it.

--granularity G cuts each of the --num-experts copies into G experts of 1/G the width, which start with equal
router keys, so that a token goes to all G of each of its --top-k copies. --shared-expert keeps the dense FFN
for every token: half of the output comes from it, half from the chosen experts.

--router linear --gate heads folds the mixture of attention heads into one linear gate. --center takes the
direction of the mean token out of a gate, so that no expert starts ahead for all tokens; --equalize gives it
equal singular values, so that all directions which tell experts apart count alike. Both are for mixtures and
linear gates, of heads or random; configs/methods/balanced.yaml has both.

--experts A B C makes experts of several dense models of one architecture and tokenizer: expert i is the FFN
of model i, in turn. All else is DENSE's, or with --average-rest the mean of A, B and C. --router linear with
--gate domain (rows: the mean input of a model's text less the mean of all) or --gate ridge (rows by least
squares) sends each model's text to its experts: give DENSE's statistics of each text as --key-stats K1 K2 K3.

--target-entropy E scales each layer's logits so that the routing distribution over all experts has a mean
entropy of E nats (uniform over n experts: ln n, 2.08 for 8) on the hidden states that collect_keys keeps
(--router-samples): inspect shows each layer's entropy and suggests the flag where it would help. For mixture,
linear, switch and mlp routers; configs/methods/calibrated.yaml uses 1.5; docs/comparison.md has results.

more experts:
  A Mixture-of-Experts in place of DENSE (which convert, import-hf or Megatron's training made) gets more
  experts: convert MOE OUT --num-experts 16. Each expert is stored under several numbers, with nothing of it
  written; --duplicate load gives the busiest experts of MOE/routing.jsonl more copies. Rows of the router are
  copied with --router-noise. Copies of one expert are then often chosen together, so that the model changes.
  --keep-function keeps it exactly by Megatron's group-limited routing, which no Qwen class has
  (--allow-no-export); so does --top-k twice as large with --router-noise 0.

what to expect of the first step:
  --moe-router-pre-softmax      softmax over all experts, then top-k (the paper): the k weights sum to less
                                than 1, the FFN's output shrinks by that sum and the loss jumps; the router
                                learns from the first step
  --no-moe-router-pre-softmax   top-k, then softmax: exactly the dense model; the LM loss gives the router no
                                gradient until the experts differ (those of --granularity do from the start)

where the model can be served (export-hf): transformers, vLLM and SGLang compute either order. llama.cpp has
one for each family: for it, give a Qwen3 --no-moe-router-pre-softmax and a Qwen1.5, 2 or 2.5
--moe-router-pre-softmax, and no --layers. No class of transformers holds a Qwen3 with --shared-expert, which
needs --allow-no-export.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_router_upcycling.commands.shared import PATHS, progress_bar
from megatron_router_upcycling.config.flags import add_output, add_router
from megatron_router_upcycling.config.start import GATES, HEAD_KEYS, InitConfig
from megatron_router_upcycling.conversion.options import Method, read_method
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers import kinds
from megatron_router_upcycling.routers.config import RouterConfig

if TYPE_CHECKING:
    from megatron_router_upcycling.conversion.convert import Conversion

OF_MOE = ("duplicate", "router_noise", "keep_function")  # flags for a Mixture-of-Experts as DENSE
OF_DENSE = (
    *("key_stats", "experts", "average_rest", "config", "granularity", "layers", "shared_expert", "router"),
    *("num_routers", "pooling", "head_key", "gate", "center", "equalize", "target_entropy", "pre_softmax"),
)


def add_flags(convert: argparse.ArgumentParser) -> None:
    add = convert.add_argument
    add("dense", metavar="DENSE", type=Path, help="a dense model's checkpoint, or a MOE's")
    add("out", metavar="OUT", type=Path, help="the checkpoint to make")
    what = "what collect_keys wrote for DENSE, one file or one for each text; see below"
    add("--key-stats", metavar="FILE", **PATHS, help=what)
    add("--experts", metavar="MODEL", **PATHS, help="make the experts of these; see below")
    add("--average-rest", action="store_true", help="take the mean of --experts for all but the experts")
    add("--config", metavar="YAML", type=Path, help="the method, as in configs/methods")
    add("--num-experts", type=int, help="experts a layer (default: 8)")
    add("--top-k", type=int, help="experts a token goes to (default: 2; 1 for switch)")
    add("--granularity", metavar="G", type=int, default=1, help="cut each expert into G")
    add("--layers", metavar="LIST", help="with experts, as 1,3,5-7 or 1-23:2 (default: all)")
    add("--shared-expert", action="store_true", help="keep the dense FFN for every token")
    add_router(convert)
    add(
        "--head-key",
        choices=HEAD_KEYS,
        help="a head's key: the mean of its query group (the paper's default), or what the head attends to"
        " (default where heads share groups)",
    )
    add("--gate", choices=GATES, help="of a linear router (default: random); see below")
    add("--center", action="store_true", default=None, help="no expert ahead for all tokens; see below")
    add("--equalize", action="store_true", default=None, help="equal singular values; see below")
    add("--target-entropy", metavar="E", type=float, help="scale the logits to this mean entropy, in nats")
    add("--seed", type=int, default=1234, help="of all random numbers")
    add(
        "--moe-router-pre-softmax",
        dest="pre_softmax",
        action=argparse.BooleanOptionalAction,
        help="softmax before top-k (default), or after; see below",
    )
    add(
        "--duplicate", choices=("even", "load"), help="of a MOE: each expert alike, or the busiest more often"
    )
    add("--router-noise", metavar="R", type=float, help="of a MOE: on the copies' rows, over their size")
    add(
        "--keep-function",
        action="store_true",
        default=None,
        help="of a MOE: group-limited routing, with which the first step is exactly MOE's",
    )
    add("--materialize", action="store_true", help="share no bytes with DENSE")
    add("--allow-no-export", action="store_true", help="even if export-hf would refuse OUT")
    add("--dry-run", action="store_true", help="print what would be done and stop")
    add_output(convert)


def run(args: argparse.Namespace) -> None:
    import torch

    from megatron_router_upcycling.conversion import convert
    from megatron_router_upcycling.diagnostics import routing_start
    from megatron_router_upcycling.hf import exporter

    torch.set_num_threads(1)  # the work is moving bytes; more threads only wait for each other
    start = time.monotonic()
    ready = _prepare(args)
    note = None if args.allow_no_export else exporter.check_conversion(ready)
    if note and not args.quiet:
        print(note)
    if args.dry_run:
        print(convert.describe_plan(ready))
        return
    with progress_bar("convert", ready.bytes_to_write, args.quiet) as progress:
        record = convert.convert(ready, progress)
    if not args.quiet:
        print(convert.describe_result(ready, record, time.monotonic() - start))
    if warning := routing_start.warn_of_ties(args.out):
        print(warning, file=sys.stderr)


def _prepare(args: argparse.Namespace) -> "Conversion":
    from megatron_router_upcycling.checkpoint.open import names_experts
    from megatron_router_upcycling.conversion import convert
    from megatron_router_upcycling.conversion.options import Options
    from megatron_router_upcycling.growth import plan as growth

    is_moe = names_experts(args.dense)
    _refuse(args, OF_DENSE if is_moe else OF_MOE, f"{args.dense}: {'has' if is_moe else 'has no'} experts")
    if is_moe:
        if args.num_experts is None:
            raise UserError(f"{args.dense}: has experts; give a larger number of them as --num-experts")
        more = growth.MoreExperts(**_given(args, ("num_experts", "top_k", *OF_MOE)))
        return growth.prepare(
            args.dense, args.out, more, **_given(args, ("seed", "materialize", "overwrite"))
        )
    file, router, init = method(args)
    taken = ("seed", "materialize", "overwrite", "average_rest", "shared_expert", "layers", "config")
    options = Options(
        router=router,
        init=init,
        megatron=file.megatron,
        key_stats=tuple(args.key_stats),
        experts=tuple(args.experts),
        **_given(args, taken),
    )
    return convert.prepare(args.dense, args.out, options)


def _refuse(args: argparse.Namespace, flags: Collection[str], why: str) -> None:
    """Refuse ``flags`` that were given."""
    parser = argparse.ArgumentParser()
    add_flags(parser)
    for name in flags:
        if getattr(args, name) != parser.get_default(name):
            raise UserError(f"--{name.replace('_', '-')}: {why}; leave it out")


def method(args: argparse.Namespace) -> tuple[Method, RouterConfig, InitConfig]:
    """The YAML file's method, and the router and its start with the flags' values over the file's.

    Flags count copies of the dense FFN, a file's ``num_experts`` and ``moe_router_topk`` Megatron's experts.
    """
    file = read_method(args.config)
    flags = _given(args, ("router", "num_routers", "pooling", "pre_softmax"))
    flags |= {name: n * args.granularity for name, n in _given(args, ("num_experts", "top_k")).items()}
    kind = kinds.get(flags.get("router") or file.router.get("router", "mixture"))
    for name, value in flags.items():
        kind.check_has(name, f"--{name.replace('_', '-')} {value}")
    defaults = {"num_experts": 8 * args.granularity, "top_k": kind.top_k * args.granularity}
    router = RouterConfig(**(defaults | file.router | flags), granularity=args.granularity)
    init = dataclasses.replace(
        file.init, **_given(args, ("head_key", "gate", "center", "equalize", "target_entropy"))
    )
    init.check(router)
    return file, router, init


def _given(args: argparse.Namespace, names: Collection[str]) -> dict[str, Any]:
    return {name: getattr(args, name) for name in names if getattr(args, name) is not None}
