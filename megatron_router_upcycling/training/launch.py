"""Turn files and flags into a run that is ready to start: ``parse``, ``merge``, ``adapt`` and ``validate``.

A rehearsal (``planning.rehearsal``) takes the same steps and changes the arguments before they are validated.
"""

import gc
import os
import re
import socket
import sys
import traceback
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.names import TRACKER
from megatron_router_upcycling.config import agreement, manifest
from megatron_router_upcycling.config import flags as config_flags
from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import OneRankError, Parser, UserError, os_error_as, reason
from megatron_router_upcycling.files import blocked_by
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.training import arguments, data, device
from megatron_router_upcycling.training.patches import patching

# Tensor and context parallelism need CUDA_DEVICE_MAX_CONNECTIONS=1; with FSDP, Megatron refuses that value.
CUT = ("tensor_model_parallel_size", "context_parallel_size")
FSDP = ("use_megatron_fsdp", "use_torch_fsdp2")
PLAIN_TOKENIZERS = ("NullTokenizer", "SentencePieceTokenizer")  # which do not need transformers


@dataclass(frozen=True)
class Run:
    """A run that is ready to start: Megatron's validated arguments and the router to build."""

    args: Namespace
    router: RouterConfig | None
    load: str | None = None  # the checkpoint to start from


@dataclass(frozen=True)
class Request:
    """What is known of the requested run before Megatron is imported (which takes seconds)."""

    argv: list[str]
    flags: Namespace  # this package's, and those that name checkpoints; the YAML file's values are in them
    entries: dict[str, Any]  # the YAML file's values of flags, this package's among them
    start: dict[str, Any]  # the conversion options in its ``upcycling:`` section


@dataclass(frozen=True)
class Origin:
    """The checkpoint that a run starts from, and its manifest (or that of ``--pretrained-checkpoint``)."""

    load: str | None
    recorded: dict[str, Any] | None = None
    source: str | None = None  # the folder of the manifest
    router: RouterConfig | None = None  # the manifest's


def prepare(argv: list[str], *, needs_checkpoint: bool = False) -> Run:
    """Parse and validate everything, choose the device, and set Megatron's global arguments.

    With ``needs_checkpoint`` the run reads the checkpoint in ``--load`` and trains and saves nothing.
    """
    request = parse(argv)
    save = None if needs_checkpoint else request.flags.save
    if save:
        _check_writable("--save", save)
    origin = find_origin(request, save)
    if needs_checkpoint and origin.load is None:
        raise UserError("--load: name the dense checkpoint to read")
    if "RANK" not in os.environ:
        stand_alone()
    given = vars(request.flags)
    if any(given[name] not in (None, 1) for name in CUT) and not any(given[name] for name in FSDP):
        # They overlap communication with matrix products through the launch order, which needs a single
        # hardware queue. In other cases one queue would only serialise kernels that can run concurrently.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    place = device.choose(request.flags.device)
    args, router = merge(request, origin, place)
    args.save = save
    if needs_checkpoint or args.skip_train:
        args.cuda_graph_impl = "none"  # a replay would call no Python, and so find no key
    _say(args, data.choose_tokenizer(args, request.argv, origin.load))
    adapt(args, place)
    validate(args)
    if needs_checkpoint:
        set_global(args)
        return Run(args, router, origin.load)
    arguments.check(args)
    data.check_data(args)
    _say(args, data.check_validation(args))
    if origin.load:
        arguments.check_resuming(args, origin.load)
    set_global(args)
    if not args.skip_train:
        arguments.check_schedule(args)
    data.check_tokens(args, origin.load)
    folders = [save] if save and origin.load != save else []
    if args.ckpt_convert_format is not None:
        _check_writable("--ckpt-convert-save", args.ckpt_convert_save)
        folders.append(str(Path(args.ckpt_convert_save) / args.ckpt_convert_format))
    for folder in folders if args.rank == 0 else ():
        _hand_on(args, folder, origin, router)
    return Run(args, router, origin.load)


def parse(argv: list[str]) -> Request:
    """Read the YAML file and the flags that are not Megatron's; ``--help`` explains them and exits."""
    door = sys.modules["__main__"]
    parser = Parser(
        prog=f"python -m {door.__spec__.name}" if door.__spec__ else None,
        usage="%(prog)s [--config YAML] [--load CHECKPOINT] [flags below] [Megatron's flags]",
        description=door.__doc__,
        epilog="Every flag of Megatron (--lr, --train-iters ...) is taken too; --help-megatron lists them.",
        allow_abbrev=False,
    )
    config_flags.add_arguments(parser)
    add = parser.add_argument_group("checkpoints (Megatron's flags)").add_argument
    add("--load", metavar="CHECKPOINT", help="start from this checkpoint's root folder")
    add("--save", metavar="FOLDER", help="save there, and resume from the last checkpoint there")
    add("--pretrained-checkpoint", metavar="CHECKPOINT", help="weights to start from if --load has none")
    add("--ckpt-step", metavar="ITERATION", type=int, help="of --load (default: the newest)")
    parser.add_argument("--wandb-project", help=SUPPRESS)
    for name in CUT:
        parser.add_argument(config_flags.flag_of(name), type=int, help=SUPPRESS)
    for name in FSDP:
        parser.add_argument(config_flags.flag_of(name), action="store_true", help=SUPPRESS)
    path = parser.parse_known_args(argv)[0].config
    entries = read_yaml(path) if path else {"upcycling": {}}
    values, start = config_flags.split_section(entries.pop("upcycling"), path)
    entries |= values
    known = config_flags.options(parser)
    config_flags.set_defaults(parser, {name: value for name, value in entries.items() if name in known}, path)
    return Request(argv, parser.parse_known_args(argv)[0], entries, start)


def find_origin(request: Request, save: str | None) -> Origin:
    """Where a run starts from: the last checkpoint in ``save``, else ``--load``, else nowhere."""

    def holds_checkpoint(root: str) -> bool:
        return (Path(root) / TRACKER).is_file()

    flags, load = request.flags, request.flags.load
    if save and holds_checkpoint(save):
        load = save
    elif load and not holds_checkpoint(load) and (not save or Path(load).resolve() != Path(save).resolve()):
        raise UserError(f"--load {load}: no checkpoint there (no {TRACKER}); name its root folder")
    from megatron_router_upcycling.checkpoint.open import check_whole

    roots = [root for root in (load, flags.pretrained_checkpoint) if root]
    recorded, source = agreement.find_manifest(roots)
    agreement.check_start(request.start, recorded, source)
    for root in roots:
        if holds_checkpoint(root):
            check_whole(root, flags.ckpt_step if root == load else None)
    router = manifest.router_config(recorded, str(source)) if recorded else None
    return Origin(load, recorded, source, router)


def merge(request: Request, origin: Origin, place: str) -> tuple[Namespace, RouterConfig | None]:
    """Megatron's arguments and the router: manifest, YAML file and flags in rising precedence."""
    # Megatron imports wandb in every run; only one that logs there needs it.
    with patching.without(wandb=not request.flags.wandb_project):
        if place == "cpu":
            from megatron_router_upcycling.training.patches import cpu_backend

            cpu_backend.install()
        from megatron.training.arguments import parse_args

    from megatron_router_upcycling.training import schedule

    schedule.install()
    parsers: list[ArgumentParser] = []

    def extend(parser: ArgumentParser) -> ArgumentParser:
        parsers.append(parser)
        return _extend(parser, request, origin)

    sys.argv = [sys.argv[0], *request.argv]  # which Megatron parses
    args = parse_args(extend)
    data.choose_source(args, request.argv)
    args.load = origin.load
    router = agreement.router_config(args, origin.router, origin.source)
    if origin.recorded:
        agreement.check_architecture(parsers[0], args, origin.recorded["model"], str(origin.source))
    return args, router


def _extend(parser: ArgumentParser, request: Request, origin: Origin) -> ArgumentParser:
    """Add this package's flags to Megatron's parser, and set defaults from the manifest and the YAML file."""
    arguments.refuse_what_is_not_taken(parser)
    parser.error = partial(Parser.error, parser)  # type: ignore[method-assign, arg-type]
    for action in parser._actions:  # some of Megatron's texts have a bare %, which argparse stumbles over
        action.help = re.sub(r"(?<!%)%(?![%(])", "%%", action.help or "")
    parser.add_argument("--help-megatron", action="help", help="list all flags, Megatron's included")
    config_flags.add_arguments(parser)
    # Checkpoints that any other TP, PP and EP can resume; no dropout, as in Qwen and the paper (section 4.1).
    parser.set_defaults(dist_ckpt_optim_fully_reshardable=True, attention_dropout=0.0, hidden_dropout=0.0)
    parser.set_defaults(cuda_graph_impl=None)  # not given: ``device.adapt`` decides
    if origin.recorded:
        config_flags.set_defaults(parser, origin.recorded["model"], str(origin.source))
        shared = config_flags.SHARED_WITH_MEGATRON.items()
        parser.set_defaults(**{name: getattr(origin.router, field) for name, field in shared})
    config_flags.set_defaults(parser, request.entries, str(request.flags.config))
    return parser


def adapt(args: Namespace, place: str) -> None:
    """Set the flags and patch the parts of Megatron that must differ on this machine; rank 0 prints which."""
    device.use_built_dataset_helper()
    _say(args, device.adapt(args, place))
    from megatron_router_upcycling.training.patches import added_state, gradients, graphs, layers, optimizer

    added_state.install()
    has_te = place == "cuda" and device.has_transformer_engine()
    with_te = has_te and args.transformer_impl == "transformer_engine"
    attention = device.choose_attention(args, with_te)
    optimizer.install(has_te)
    if args.cuda_graph_impl == "local":
        graphs.install()
    if not has_te:
        layers.install_without_te(attention)
    if place == "cuda":
        gradients.install(args)
        _say(args, f"GPU: {'; '.join(layers.install_on_gpu(args, with_te, attention))}")
    if args.attention_backend.name == "local":
        # The module is already chosen; Megatron's check of this value would read --spec, which is not set.
        args.attention_backend = type(args.attention_backend).unfused


def _say(args: Namespace, line: str | None) -> None:
    if line and args.rank == 0:
        print(line, flush=True)


def validate(args: Namespace) -> None:
    """Let Megatron check its arguments and derive the missing ones."""
    from megatron.training import arguments as megatrons

    from megatron_router_upcycling.training import objections

    megatrons._print_args = lambda title, args: None  # 500 lines: see run_log.files
    for line in arguments.complete(args):
        _say(args, line)
    with objections.megatrons_objection(args):
        megatrons.validate_args(args)
    gc.freeze()  # what was imported stays
    gc.enable()  # see ``exit_on_user_error``


def set_global(args: Namespace) -> None:
    """Make ``args`` Megatron's global arguments. This builds the tokenizer, which may raise any exception."""
    from megatron.training.global_vars import set_global_variables

    try:
        with patching.without(transformers=args.tokenizer_type in PLAIN_TOKENIZERS):
            set_global_variables(args)
    except Exception as error:
        if not any(frame.name == "build_tokenizer" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model}: --tokenizer-type {args.tokenizer_type} finds no"
            f" tokenizer there ({reason(error)})"
        ) from None


def _hand_on(args: Namespace, save: str, origin: Origin, router: RouterConfig | None) -> None:
    """Write the manifest to ``save``, and link the tokenizer and other files stored with the weights."""
    with os_error_as(f"--save {save}: cannot be written"):
        if origin.recorded is not None:
            Path(save).mkdir(parents=True, exist_ok=True)
            manifest.write(save, origin.recorded | {"router": router.to_dict() if router else None})
        data.hand_on_tokenizer(args, origin.load, save)


def _check_writable(flag: str, save: str) -> None:
    if folder := blocked_by(Path(save)):
        raise UserError(f"{flag} {save}: cannot write in {folder}; name a folder in a writable one")


def stand_alone(rank: int = 0, world_size: int = 1) -> None:
    """Set the environment that torchrun would give this process as ``rank`` of ``world_size``."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    place = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    os.environ.update(place | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def _first_to_say() -> bool:
    """Whether this rank is the first of the run to ask, so that one rank prints the error."""
    from torch.distributed.distributed_c10d import _get_default_store

    try:
        return int(_get_default_store().add("megatron_router_upcycling error", 1)) == 1
    except (RuntimeError, ValueError):  # not connected yet, or the process that held the store has gone
        return True


def exit_on_user_error(command: Callable[[], object]) -> None:
    """Run ``command``; after a UserError, one rank prints it in one line, and the exit status is 2."""
    gc.disable()  # importing torch and Megatron makes no garbage; looking for it takes a seventh of the time
    is_first = os.environ.get("RANK", "0") == "0"  # read now: a rehearsal sets RANK to the rank it plays
    try:
        command()
    except UserError as error:
        if _first_to_say() if isinstance(error, OneRankError) else is_first:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
