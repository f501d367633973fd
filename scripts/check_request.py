"""Check a request for submit.sh before the first stage: it must be feasible, and match earlier ones for WORK.

    python scripts/check_request.py STAGES NODES GPUS DRY_RUN DATA_FLAGS IMPORT_FLAGS KEYS_FLAGS \\
        CONVERT_FLAGS EVALUATE_FLAGS [FLAGS of pretrain]

Paths come from submit.sh's environment variables; each FLAGS is one argument with one word a line. The checks
are those of the stages' own commands. Prints the number of processes a node, and writes WORK/request.yaml.
"""

import hashlib
import os
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import one_pass
import yaml

from megatron_router_upcycling import cli
from megatron_router_upcycling.checkpoint import beside, read_config_json
from megatron_router_upcycling.checkpoint.names import TRACKER
from megatron_router_upcycling.commands import convert, evaluate
from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.conversion.options import parse_layers
from megatron_router_upcycling.data import sources, tokenizer
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.evaluation import runner
from megatron_router_upcycling.files import write_whole
from megatron_router_upcycling.hf import architecture, files
from megatron_router_upcycling.planning import reading, setup
from megatron_router_upcycling.routers import kinds

WORK, HF, DENSE = (Path(os.environ[name]) for name in ("WORK", "HF", "DENSE"))
CONFIG, DENSE_CONFIG = os.environ["CONFIG"], os.environ["DENSE_CONFIG"]
DATA, TEXT = (os.environ[name].splitlines() for name in ("DATA", "TEXT"))
HAS_HF, OWN_LENGTH, LOCAL = (bool(os.environ[name]) for name in ("HF", "ONE_PASS", "LOCAL"))
REQUEST = WORK / "request.yaml"
IMPORTED = DENSE / TRACKER
MARKED = 1 << 20  # bytes at each end of a weights file that are hashed
TEXT_DATA = WORK / "data/text.json"
# Flag -> the first file that depends on it. The flag may change until that file exists.
DECIDES = {
    "--text": TEXT_DATA,
    "--data-flags": TEXT_DATA,
    "--hf": TEXT_DATA if TEXT else IMPORTED,
    "--import-flags": WORK / "dense" / TRACKER,
    "--dense": WORK / "key_stats.safetensors",
    "--data": WORK / "key_stats.safetensors",
    "--dense-config": WORK / "key_stats.safetensors",
    "--keys-flags": WORK / "key_stats.safetensors",
    "--convert-flags": WORK / "moe" / TRACKER,
    "--config": WORK / "run" / TRACKER,
    "--evaluate-flags": WORK / "evaluation/results.json",
    "the flags of pretrain": WORK / "run/run_state",
}


def main(stages: str, nodes: str, gpus: str, dry_run: str, *flags: str) -> None:
    data, imports, keys, converts, evaluates = (text.split("\n") if text else [] for text in flags[:5])
    pretrain, asked = list(flags[5:]), stages.split(",")
    found = _texts()
    given = _given(found, data, imports, keys, converts, evaluates, pretrain)
    _compare(given)
    import_args = cli.parse(["import-hf", str(HF), str(DENSE), *imports])
    convert_args = cli.parse(["convert", str(DENSE), str(WORK / "moe"), *converts])
    method, router, init = convert.method(convert_args)
    model, values = _model(import_args.make_vocab_size_divisible_by)
    _check_experts(convert_args, model, router, init)
    if OWN_LENGTH:
        made = [] if TEXT and not TEXT_DATA.is_file() else one_pass.records(DATA)
        values |= one_pass.settings(values, sum(one.tokens for one in made), 0)
    routing = {"num_experts": router.num_experts, "moe_router_topk": router.top_k}
    routing["moe_router_pre_softmax"] = router.pre_softmax
    moe = read_yaml(CONFIG) | values | reading.parse_flags(pretrain) | routing
    router.check_trains(dict(method.megatron) | moe)
    dense = read_yaml(DENSE_CONFIG) | values
    runs = [(moe, router.to_dict(), CONFIG), (dense, {}, DENSE_CONFIG)]
    processes, run = _processes(runs, int(nodes), int(gpus))
    if run and found and not TEXT_DATA.is_file() and not any(map(_is_packed, found)):
        most = sum(one.size for one in found) + len(found)  # a token has a byte or more, or ends a document
        one_pass.check_length("--text", most, run.seq_length, run.global_batch_size if OWN_LENGTH else 1)
    if "evaluate" in asked and HAS_HF:
        if not TEXT and not beside.is_tokenizer(HF):
            raise UserError(f"--hf {HF}: holds no tokenizer; put the files of the model's own one there")
        runner.check(HF, evaluate.options(cli.parse(["evaluate", str(HF), *evaluates])))
    if "data" in asked and TEXT and not TEXT_DATA.is_file():
        _check_tokenizer(data, values)
    if "import" in asked and HAS_HF and not IMPORTED.is_file():
        from megatron_router_upcycling.hf import importer

        multiple = import_args.make_vocab_size_divisible_by
        importer.prepare(HF, DENSE, None, multiple, import_args.overwrite)
    if not dry_run:
        try:
            WORK.mkdir(parents=True, exist_ok=True)
            write_whole(REQUEST, "# What submit.sh was asked for.\n" + yaml.safe_dump(given, sort_keys=False))
        except OSError as error:
            raise UserError(f"--work {WORK}: cannot be written ({error.strerror})") from None
    print(processes)


# Does it match earlier requests for WORK? ---------------------------------------------------------


def _given(found: list[sources.Source], *flags: list[str]) -> dict[str, str]:
    """The value of each flag of ``DECIDES`` as text, as it is saved in the request file."""
    data, imports, keys, converts, evaluates, pretrain = map(" ".join, flags)
    text = f"{', '.join(TEXT)} ({sum(source.size for source in found):,} bytes)" if TEXT else ""
    model = f"{HF} (contents {_mark()})" if HAS_HF else ""
    dense, tokens = ("" if HAS_HF else str(DENSE)), ("" if TEXT else " ".join(DATA))
    values = (text, data, model, imports, dense, tokens, DENSE_CONFIG, keys, converts, CONFIG)
    return dict(zip(DECIDES, (*values, evaluates, pretrain), strict=True))


def _mark() -> str:
    """A short digest of config.json and both ends of each weights file."""
    digest = hashlib.sha256((HF / "config.json").read_bytes())
    for path in sorted(HF.glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(f"{path.name} {path.stat().st_size}".encode() + file.read(MARKED))
            file.seek(-min(MARKED, path.stat().st_size), os.SEEK_END)
            digest.update(file.read())
    return digest.hexdigest()[:12]


def _compare(given: dict[str, str]) -> None:
    """Refuse a request that would reuse files in WORK which another request has made differently."""
    before = yaml.safe_load(REQUEST.read_text(encoding="utf-8")) if REQUEST.is_file() else {}
    for flag, now in given.items():
        made, was = DECIDES[flag], before.get(flag, now)
        is_there = made.is_file() and (made.name != "run_state" or made.read_text() == "finished\n")
        if was != now and is_there:
            raise UserError(
                f"{flag}: {made} was made with {was or 'none'}, and this command has {now or 'none'};"
                " name another --work"
            )


# Is it feasible? ----------------------------------------------------------------------------------


def _model(vocabulary_multiple: int) -> tuple[Any, dict[str, Any]]:
    """The dense model's architecture, and Megatron's arguments for it as far as they are known."""
    if HAS_HF:
        files.refuse_other_folders(HF, "--hf")
        path = HF / "config.json"
        flags = read_config_json.to_flags(files.read_json(path), path, vocabulary_multiple)
        if "num_experts" in flags:
            raise UserError(f"--hf {HF}: a Mixture-of-Experts already; name the folder of a dense model")
        return architecture.from_flags(flags), flags
    from megatron_router_upcycling.checkpoint.open import open_dense
    from megatron_router_upcycling.checkpoint.read_model import read_model

    own = DENSE / "model.yaml"
    return read_model(open_dense(DENSE)), read_yaml(own) if own.is_file() else {}


def _processes(
    runs: list[tuple[dict[str, Any], dict[str, Any], str]], nodes: int, gpus: int
) -> tuple[int, setup.Setup | None]:
    """The number of processes a node, and the plan of the training run; None if ``plan`` does not cover it.

    Args:
        runs: (Megatron's arguments, the router's options, the YAML file) for training and for keys.
    """

    def planned(processes: int) -> setup.Setup | None:
        """Raises UserError if the runs do not work with ``processes`` a node."""
        found = []
        for (values, router, source), world in zip(runs, (nodes * processes, processes), strict=True):
            # The vocabulary may be unknown without the tokenizer; its size does not matter here.
            known = {"vocab_size": 128} | values | {"world_size": world}
            try:
                found.append(reading.from_values(known, router, source))
            except reading.NotCovered:
                return None
            except UserError as error:
                flag = "--nproc" if LOCAL else "--nodes, --gpus-per-node"
                raise UserError(str(error).replace("--gpus", flag)) from None
        return found[0]

    def works(processes: int) -> bool:
        try:
            planned(processes)
        except UserError:
            return False
        return True

    asked = int(os.environ.get("NPROC_PER_NODE") or 0)
    each = (asked or gpus if LOCAL else gpus or asked) or 1
    if LOCAL and not asked and (most := next(filter(works, range(each, 0, -1)), each)) < each:
        print(f"training on {most} of {each} GPUs, a number that divides the batches", file=sys.stderr)
        each = most
    try:
        return each, planned(each)
    except UserError as error:
        usable = list(map(str, filter(works, range(1, 9)))) if LOCAL else []
        hint = f"; --nproc {', '.join(usable)} would do" if usable else ""
        raise UserError(f"{error}{hint}") from None


def _check_experts(args: Namespace, model: Any, router: Any, init: Any) -> None:
    """Raise what ``convert`` would refuse for this model; print a warning if experts would stay equal."""
    kinds.all_parameters(router, model, model.linear_bias)
    if args.layers is not None:
        parse_layers(args.layers, model.num_layers)
    if args.granularity > 1:
        from megatron_router_upcycling.conversion import fine_grained

        fine_grained.check_width(model, args.granularity)
    if args.shared_expert and HAS_HF and not args.allow_no_export:
        made = Namespace(num_experts=router.num_experts, moe_shared_expert_intermediate_size=1)
        architecture.check_exportable(made, model, HF)
    heads, groups, size = model.num_attention_heads, model.num_query_groups, model.kv_channels
    share_keys = init.head_key == "mean" and groups < heads
    may_tie = router.kind.of_heads and (share_keys or router.num_routers < router.num_copies)
    if not may_tie:
        return
    import torch

    from megatron_router_upcycling.initialisation.heads import init_mixture
    from megatron_router_upcycling.routers import likeness

    torch.manual_seed(0)  # random heads and keys: ties depend on the numbers of heads and keys only
    repeats = heads // groups if share_keys else 1
    keys = torch.randn(heads // repeats, size).repeat_interleave(repeats, 0)
    query, key = init_mixture(torch.randn(heads, size, 64), keys, router)
    gate = router.kind.gate({"query_weight": query, "expert_key": key}, router, 64, torch.float32)
    logits = router.kind.logits(gate, torch.randn(64, 64), router)
    if pairs := likeness.tied_experts(logits, router.granularity):
        tied = ", ".join(f"{a} and {b}" for a, b in pairs[:8])
        print(
            f"warning: --convert-flags: of each layer's experts {tied} would start with equal gates and"
            " weights, and training keeps them equal",
            file=sys.stderr,
        )


def _is_packed(source: sources.Source) -> bool:
    """Whether a file may hold more bytes of text than its size, because it is compressed."""
    return source.path.endswith(sources.COMPRESSED) or source.kind in ("parquet", "arrow")


def _texts() -> list[sources.Source]:
    try:
        found = sources.find(map(Path, TEXT))[0] if TEXT else []
    except UserError as error:
        raise UserError(str(error).replace("SOURCE", "--text", 1)) from None
    if TEXT and not sum(source.size for source in found):
        raise UserError(f"--text {TEXT[0]}: holds no text")
    return found


def _check_tokenizer(data: list[str], values: dict[str, Any]) -> None:
    args = cli.parse(["prepare-data", *TEXT, "--output", str(WORK / "data/text"), *data])
    if args.train_tokenizer is None:
        place = args.tokenizer or (HF if HAS_HF else DENSE / "tokenizer")
        has = tokenizer.load(place, "--data-flags --tokenizer" if args.tokenizer else "--hf").vocab_size
        rows = values.get("padded_vocab_size")
        if rows and has > rows:
            raise UserError(
                f"--hf {HF}: its tokenizer has {has} tokens and its model {rows}; name the model's own one"
            )


if __name__ == "__main__":
    one_pass.run(main)
