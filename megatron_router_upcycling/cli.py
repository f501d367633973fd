"""``router-upcycle``: the commands that run in one process, without Megatron.

Torch is imported only once a command's arguments are known to be right, so that ``--help`` and mistakes
answer at once.
"""

import argparse
import contextlib
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from megatron_router_upcycling import __version__
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.router_config import GROUPINGS, POOLINGS, ROUTERS, RouterConfig

DTYPES = ("bfloat16", "float16", "float32")

IMPORT_EXAMPLE = """\
example:
  router-upcycle import-hf Qwen1.5-0.5B ckpt/dense
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config ckpt/dense/model.yaml \\
      --load ckpt/dense --output ckpt/key_stats.safetensors [flags for data]

OUT/model.yaml holds the model's Megatron flags: give it as --config, or build a configuration on it with
base: in YAML. OUT/tokenizer is the model's tokenizer, which model.yaml names.
"""

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}

EXPORT_EXAMPLE = """\
example:
  router-upcycle export-hf runs/moe Qwen1.5-0.5B-8x --dtype bfloat16

A mixture of routers with sum pooling and one key an expert is exactly one linear gate, and so is a linear
router: stock classes hold them. Max pooling, several keys an expert or an MLP need --modelling-code, and
trust_remote_code where the folder is loaded.

Qwen2-MoE has a shared expert beside the routed ones. It is written as zeros and adds exactly nothing. Its
width should be a multiple of the tensor parallel sizes that the model is served at. With
--shared-expert-width 0 there is none, which transformers reports as missing weights.
"""

CONVERT_EXAMPLE = """\
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

what to expect of the first step:
  --moe-router-pre-softmax      softmax over all experts, then top-k (the paper): the k weights sum to less
                                than 1, the FFN's output shrinks by that sum and the loss jumps; the router
                                learns from the first step
  --no-moe-router-pre-softmax   top-k, then softmax: exactly the dense model; the LM loss gives the router no
                                gradient until the experts differ
"""

VERIFY_EXAMPLE = """\
example:
  router-upcycle verify ckpt/dense ckpt/moe

Exit status 0 when everything is as it must be, 1 with a table of what differs, 2 after a mistake (one of
the two is no checkpoint, the key statistics are gone). Every byte of every value in MOE is read, the bytes
that it shares with DENSE too: there, a value that changed in both is found by the checksum beside it. Of a
checkpoint that has trained since, structure, checksums and arguments are checked; its values have changed.
"""

PLAN_EXAMPLE = """\
examples:
  router-upcycle plan moe.yaml --load ckpt/moe --gpus 64
  router-upcycle plan dense.yaml --gpus 64 --num-experts 8 --moe-router-topk 2 --expert-model-parallel-size 8

CONFIG is what pretrain takes as --config. A converted checkpoint brings the architecture and the router with
it (--load); without one, the YAML file and flags must hold them. Any Megatron flag stands above both.
Parameters are exact; activations, communication and time are estimates, which pretrain --rehearse holds
against one real rank. What cannot work, too little memory among it, is one line and exit status 2; doubts are
warnings.
"""

REPORT_EXAMPLE = """\
example:
  router-upcycle report runs/mixture runs/linear --output report
"""

EVALUATE_EXAMPLE = """\
tasks, by the paper's groups:
  understanding   openbookqa, openbookqa_fact
  reasoning       arc_challenge, arc_easy, hellaswag, winogrande
  knowledge       boolq, copa, nq_open, triviaqa
and stdlib, which is made of Python's own docstrings and needs no data.

examples:
  router-upcycle evaluate hf/moe --device cuda --batch-size 32
  router-upcycle evaluate hf/moe --tasks reasoning,copa --limit 100 --data-dir data
  router-upcycle evaluate hf/moe --tasks stdlib

FOLDER holds TASK/SPLIT.jsonl, TASK/SPLIT.parquet, the Hub's TASK/SPLIT-00000-of-00001.parquet or a data set
that was saved with save_to_disk. Without --data-dir data comes from the Hugging Face Hub or its local cache
(HF_HUB_OFFLINE=1 for the cache alone). Code of data sets is never run.
"""


class _Parser(argparse.ArgumentParser):
    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.register("type", Path, _local_path)

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _local_path(text: str) -> Path:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise argparse.ArgumentTypeError(
            f"{text}: object stores and other URLs are not supported; name a folder on a disk of this machine"
            " (copy it there, or mount it)"
        )
    return Path(text)


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="router-upcycle",
        description="Turn a dense Megatron checkpoint into a Mixture-of-Experts by Router Upcycling.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_import_hf(commands)
    _add_convert(commands)
    _add_export_hf(commands)
    _add_verify(commands)
    _add_inspect(commands)
    _add_report(commands)
    _add_evaluate(commands)
    _add_plan(commands)
    return parser


def _add_import_hf(commands: Any) -> None:
    command = commands.add_parser(
        "import-hf",
        help="make a dense Megatron checkpoint of a Hugging Face folder",
        description="Make a dense Megatron checkpoint (torch_dist) of a Hugging Face folder with Qwen1.5,"
        " Qwen2, Qwen2.5 or Qwen3 in safetensors. Any tensor and pipeline parallel size loads it.",
        epilog=IMPORT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("folder", metavar="HF_DIR", type=Path, help="the folder of config.json")
    command.add_argument("out", metavar="OUT", type=Path, help="the checkpoint to make")
    command.add_argument("--dtype", choices=DTYPES, help="of the checkpoint (default: as in HF_DIR)")
    command.add_argument(
        "--make-vocab-size-divisible-by",
        metavar="N",
        type=int,
        default=128,
        help="pad the embedding with zeros to a multiple of N (default: 128)",
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT once its successor is whole")
    command.add_argument("--quiet", action="store_true", help="print errors only")
    command.set_defaults(run=_import_hf)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="make a Mixture-of-Experts checkpoint of a dense one",
        description="Make a Mixture-of-Experts checkpoint (torch_dist) of a dense one (torch_dist or legacy)."
        " Any tensor, pipeline and expert parallel size loads it.",
        epilog=CONVERT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
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
    convert.add_argument("--router", choices=ROUTERS, help="(default: mixture; linear is vanilla upcycling)")
    convert.add_argument("--num-routers", type=int, help="routers in the mixture (default: --num-experts)")
    convert.add_argument("--pooling", choices=POOLINGS, help="how scores combine (default: sum)")
    convert.add_argument("--grouping", choices=GROUPINGS, help="how heads are paired (default: greedy)")
    convert.add_argument("--seed", type=int, default=1234, help="of all that is drawn (default: 1234)")
    convert.add_argument(
        "--moe-router-pre-softmax",
        action=argparse.BooleanOptionalAction,
        help="softmax before top-k (default), or after; see below",
    )
    convert.add_argument("--materialize", action="store_true", help="real copies; share no bytes with DENSE")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT once its successor is whole")
    convert.add_argument("--dry-run", action="store_true", help="say what would be done and stop")
    convert.add_argument("--quiet", action="store_true", help="print errors only")
    convert.set_defaults(run=_convert)


def _add_export_hf(commands: Any) -> None:
    command = commands.add_parser(
        "export-hf",
        help="make a Hugging Face folder of a Megatron checkpoint",
        description="Make a Hugging Face folder of a converted or trained Mixture-of-Experts (Qwen2-MoE or"
        " Qwen3-MoE) or of a dense model (Qwen2 or Qwen3), which stock transformers, vLLM and SGLang load.",
        epilog=EXPORT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_argument("checkpoint", metavar="MOE", type=Path, help="the Megatron checkpoint (torch_dist)")
    command.add_argument("out", metavar="OUT", type=Path, help="the folder to make")
    command.add_argument("--dtype", choices=DTYPES, help="of the weights (default: as in MOE)")
    command.add_argument(
        "--tokenizer", metavar="DIR", type=Path, help="its folder (default: the one that training used)"
    )
    command.add_argument(
        "--max-shard-size", metavar="SIZE", type=_size, default="5GB", help="of a file (default: 5GB)"
    )
    command.add_argument(
        "--shared-expert-width",
        metavar="N",
        type=int,
        default=128,
        help="of the shared expert of zeros in Qwen2-MoE (default: 128); see below",
    )
    command.add_argument(
        "--modelling-code",
        action="store_true",
        help="where stock classes cannot hold the router: write a modelling file beside the weights",
    )
    command.add_argument("--overwrite", action="store_true", help="replace OUT once its successor is whole")
    command.add_argument("--quiet", action="store_true", help="print errors only")
    command.set_defaults(run=_export_hf)


def _size(text: str) -> int:
    """Bytes in a text such as 5GB or 200MB."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in SIZES or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB or 200MB")
    return int(number) * SIZES[unit]


def _add_verify(commands: Any) -> None:
    verify = commands.add_parser(
        "verify",
        help="prove that an upcycled checkpoint is what it must be",
        description="Prove that an upcycled checkpoint is what it must be, by reading it and the dense one.",
        epilog=VERIFY_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    verify.add_argument("dense", metavar="DENSE", type=Path, help="the dense model's checkpoint")
    verify.add_argument("moe", metavar="MOE", type=Path, help="what convert made of it, or training since")
    verify.add_argument(
        "--key-stats", metavar="FILE", type=Path, help="what the routers were made from (default: recorded)"
    )
    verify.add_argument("--json", metavar="FILE", type=Path, help="write all that was found there as well")
    verify.add_argument("--quiet", action="store_true", help="print what differs only")
    verify.set_defaults(run=_verify)


def _add_inspect(commands: Any) -> None:
    inspect = commands.add_parser(
        "inspect",
        help="say what a checkpoint is, list its tensors, and show how its routers would start",
        description="Say what a checkpoint (torch_dist, or dense in the legacy format) is and list its"
        " tensors. Nothing in it is executed. Of a Mixture-of-Experts: how like its experts' keys are, how"
        " its routers would spread tokens, how far the first step scales the output, and a warning where"
        " routing would start collapsed or experts are tied.",
        allow_abbrev=False,
    )
    inspect.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a checkpoint's root folder")
    inspect.add_argument("--all", action="store_true", help="list optimizer state and extra states as well")
    inspect.add_argument(
        "--key-stats",
        metavar="FILE",
        type=Path,
        help="route its samples of hidden states (default: those recorded, else random ones)",
    )
    inspect.set_defaults(run=_inspect)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="one page over training runs: losses, routing, experts",
        description="Draw what training runs wrote beside their checkpoints (run.jsonl and routing.jsonl):"
        " losses, load of the experts by layer and over time, how sure the routers are, how far routers and"
        " experts have moved. Runs may still be training. The page needs neither network nor scripts.",
        epilog=REPORT_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    report.add_argument("runs", metavar="RUN", type=Path, nargs="+", help="a folder that pretrain saves to")
    report.add_argument(
        "--output",
        metavar="DIR",
        type=Path,
        default=Path("report"),
        help="for report.html and its pictures; those of an earlier report are replaced (default: report)",
    )
    report.set_defaults(run=_report)


def _add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="ask a Hugging Face model the paper's ten tasks",
        description="Ask a model in Hugging Face format the paper's ten zero-shot tasks, and print its scores"
        " beside the paper's. Needs the eval extra.",
        epilog=EVALUATE_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    evaluate.add_argument("model", metavar="HF_DIR", type=Path, help="the model's folder, tokenizer included")
    evaluate.add_argument(
        "--tasks", metavar="LIST", help="names of tasks or groups, comma between (default: the paper's ten)"
    )
    evaluate.add_argument("--limit", metavar="N", type=int, help="the first N questions of each task only")
    evaluate.add_argument(
        "--num-fewshot", metavar="N", type=int, default=0, help="examples before each question (default: 0)"
    )
    evaluate.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: auto)")
    evaluate.add_argument("--batch-size", type=int, default=8, help="questions at a time (default: 8)")
    evaluate.add_argument(
        "--data-dir", metavar="FOLDER", type=Path, help="read the tasks' data from here and download nothing"
    )
    evaluate.add_argument(
        "--output", metavar="DIR", type=Path, help="for the results (default: evaluation/NAME of HF_DIR)"
    )
    evaluate.add_argument("--overwrite", action="store_true", help="replace results that --output holds")
    evaluate.add_argument(
        "--trust-remote-code", action="store_true", help="run modelling code that HF_DIR brings with it"
    )
    evaluate.set_defaults(run=_evaluate)


def _add_plan(commands: Any) -> None:
    plan = commands.add_parser(
        "plan",
        help="say what a run needs: parameters, memory, time, communication",
        usage="router-upcycle plan [CONFIG] --gpus N [--load CHECKPOINT] [options] [Megatron flags]",
        description="Say on paper what a run needs on N GPUs and what is wrong with its layout.",
        epilog=PLAN_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    plan.add_argument(
        "config", metavar="CONFIG", type=Path, nargs="?", help="a YAML file as pretrain takes it"
    )
    plan.add_argument("--gpus", metavar="N", type=int, required=True, help="all GPUs of the run")
    plan.add_argument(
        "--load",
        metavar="CHECKPOINT",
        type=Path,
        help="the converted checkpoint: its architecture and router",
    )
    plan.add_argument(
        "--gpu-memory-gib", metavar="GIB", type=float, default=80, help="of one GPU (default: 80)"
    )
    plan.add_argument(
        "--peak-tflops",
        metavar="TFLOPS",
        type=float,
        default=989,
        help="of one GPU, dense, in the training dtype (default: 989, an H100's in bfloat16)",
    )
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.set_defaults(run=_plan, takes_megatron_flags=True)


def _plan(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.planning import command

    print(
        command.run(
            args.config,
            args.load,
            args.megatron_flags,
            args.gpus,
            args.gpu_memory_gib,
            args.peak_tflops,
            args.json,
        )
    )


def _import_hf(args: argparse.Namespace) -> None:
    import torch

    from megatron_router_upcycling.hf import importer

    torch.set_num_threads(1)  # the work is moving bytes
    start = time.monotonic()
    dtype = args.dtype and getattr(torch, args.dtype)
    options = importer.Options(dtype, args.make_vocab_size_divisible_by, args.overwrite)
    job = importer.prepare(args.folder, args.out, options)
    with _progress("import-hf", job.bytes_to_write, args.quiet) as progress:
        record = importer.run(job, progress)
    if not args.quiet:
        print(importer.describe_result(job, record, time.monotonic() - start))


def _export_hf(args: argparse.Namespace) -> None:
    import torch

    from megatron_router_upcycling.hf import exporter

    torch.set_num_threads(1)  # the work is moving bytes
    start = time.monotonic()
    options = exporter.Options(
        dtype=args.dtype and getattr(torch, args.dtype),
        tokenizer=args.tokenizer,
        max_shard_bytes=args.max_shard_size,
        shared_expert_width=args.shared_expert_width,
        modelling_code=args.modelling_code,
        overwrite=args.overwrite,
    )
    job = exporter.prepare(args.checkpoint, args.out, options)
    with _progress("export-hf", job.bytes_to_write, args.quiet) as progress:
        record = exporter.run(job, progress)
    if not args.quiet:
        print(exporter.describe_result(job, record, time.monotonic() - start))


@contextlib.contextmanager
def _progress(name: str, total: int, quiet: bool) -> Iterator[Callable[[int], None]]:
    """A progress bar over bytes, as the function to call after each write."""
    from tqdm import tqdm

    with tqdm(total=total, unit="B", unit_scale=True, desc=name, leave=False, disable=quiet or None) as bar:
        # The few bytes around the values are not in the total.
        yield lambda count: bar.update(min(count, bar.total - bar.n)) and None


def _convert(args: argparse.Namespace) -> None:
    from megatron_router_upcycling import config

    file = config.read_conversion(args.config)
    router = _router_to_make(args, file.router)
    file.init.check(router)
    import torch

    from megatron_router_upcycling import conversion
    from megatron_router_upcycling.upcycle import Options

    torch.set_num_threads(1)  # the work is moving bytes; more threads only wait for each other
    start = time.monotonic()
    options = Options(
        router=router,
        init=file.init,
        key_source=file.key_source,
        key_stats=args.key_stats,
        seed=args.seed,
        materialize=args.materialize,
        overwrite=args.overwrite,
        shared_expert=args.shared_expert,
        layers=args.layers,
    )
    ready = conversion.prepare(args.dense, args.out, options)
    if args.dry_run:
        print(conversion.describe_plan(ready))
        return
    with _progress("convert", ready.bytes_to_write, args.quiet) as progress:
        record = conversion.convert(ready, progress)
    if not args.quiet:
        print(conversion.describe_result(ready, record, time.monotonic() - start))


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
    given = file | {name: value for name, value in flags.items() if value is not None}
    top_k = 1 if given.get("router") == "switch" else 2
    defaults = {"num_experts": 8 * args.granularity, "top_k": top_k * args.granularity}
    return RouterConfig(**(defaults | given), granularity=args.granularity)


def _verify(args: argparse.Namespace) -> int:
    import torch

    from megatron_router_upcycling import verify

    if args.json and (args.json.is_dir() or not args.json.absolute().parent.is_dir()):
        raise UserError(f"--json {args.json}: a folder, or in none; name a file to write")
    torch.set_num_threads(1)
    start = time.monotonic()
    ready = verify.prepare(args.dense, args.moe, args.key_stats)
    with _progress("verify", ready.bytes_to_read, args.quiet) as advance:
        findings = verify.run(ready, advance)
    if args.json:
        try:
            args.json.write_text(findings.to_json(dense=str(args.dense), moe=str(args.moe)) + "\n", "utf-8")
        except OSError as error:
            raise UserError(f"--json {args.json}: cannot be written ({error.strerror})") from None
    if findings or not args.quiet:
        print(verify.describe(ready, time.monotonic() - start))
    return 1 if findings else 0


def _inspect(args: argparse.Namespace) -> None:
    from megatron_router_upcycling import inspection
    from megatron_router_upcycling.diagnostics import start

    print(inspection.describe(args.checkpoint, everything=args.all))
    routing = start.describe(args.checkpoint, args.key_stats)
    if routing:
        print(f"\n{routing}")


def _report(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.diagnostics import report

    runs = report.read_runs(args.runs)
    page = report.write(runs, args.output)
    print(*report.summary_lines(runs), f"saved as {page}", sep="\n")


def _evaluate(args: argparse.Namespace) -> None:
    from megatron_router_upcycling.evaluation import report, runner

    options = runner.Options(
        runner.parse_tasks(args.tasks),
        args.limit,
        args.num_fewshot,
        args.device,
        args.batch_size,
        args.data_dir,
        args.trust_remote_code,
    )
    output = args.output or Path("evaluation") / args.model.resolve().name
    report.check_output(output, args.overwrite)
    last: dict[str, Any] = {}

    def done(result: dict[str, Any]) -> None:
        report.write(output, result)  # after every task: what was measured survives an interruption
        last.update(result)

    try:
        runner.evaluate(args.model, options, done)
    except KeyboardInterrupt:
        kept = (
            f"{len(last['tasks'])} of {len(options.tasks)} tasks are in {output}"
            if last
            else "no task was complete"
        )
        print(f"interrupted; {kept}", file=sys.stderr)
        raise SystemExit(130) from None
    print(report.markdown(last))
    print(f"saved as {output / report.JSON_NAME} and {output / report.MARKDOWN_NAME}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; exit status 0, 2 after a user's mistake, 130 or 143 when interrupted.

    ``verify`` has 1 where something differs.
    """

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)  # unwinds, so that half-made folders are removed

    signal.signal(signal.SIGTERM, stop)
    try:
        parser = build_parser()
        args, rest = parser.parse_known_args(argv)
        if rest and not getattr(args, "takes_megatron_flags", False):
            parser.error(f"unrecognized arguments: {' '.join(rest)}")
        args.megatron_flags = rest
        status = args.run(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupted:
        print(f"interrupted; {str(interrupted) or 'nothing was left behind'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `router-upcycle inspect … | head`
        sys.stderr.close()
        return 141
    return status or 0


if __name__ == "__main__":
    sys.exit(main())
