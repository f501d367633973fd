"""Files and flags into a run that is ready to start."""

import contextlib
import os
import socket
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from megatron_router_upcycling.config import agreement, manifest, yaml_files
from megatron_router_upcycling.config import flags as config_flags
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.errors import Parser, UserError, reason
from megatron_router_upcycling.planning.setup import Setup
from megatron_router_upcycling.training import device

TRACKER = "latest_checkpointed_iteration.txt"


@dataclass(frozen=True)
class Run:
    """A run that is ready to start: Megatron's validated arguments and the router to build."""

    args: Namespace
    router: RouterConfig | None
    load: str | None = None  # the checkpoint to start from
    rehearsed: Setup | None = None  # with --rehearse: the run as it is configured


@dataclass(frozen=True)
class Early:
    """What is known before Megatron is imported, which takes seconds and prints warnings."""

    flags: Namespace  # this package's, and those that name checkpoints, the YAML file's among them
    entries: dict[str, Any]  # the YAML file's Megatron arguments
    section: dict[str, Any]  # of its ``upcycling:`` section what stands as flags' defaults
    start: dict[str, Any]  # that section whole


def read_early(argv: list[str]) -> Early:
    """Read the YAML file and the flags that are not Megatron's.

    Raises:
        UserError: the file, or a value of such a flag, is not what it should be.
    """
    parser = Parser(add_help=False, allow_abbrev=False)
    config_flags.add_arguments(parser)
    for flag in ("--load", "--save", "--pretrained-checkpoint", "--ckpt-step"):
        parser.add_argument(flag)
    path = parser.parse_known_args(argv)[0].config
    entries = yaml_files.read_yaml(path) if path else {"upcycling": {}}
    start = entries.pop("upcycling")
    section = config_flags.section_defaults(start, path)
    known = {
        name: value
        for name, value in (entries | section).items()
        if f"--{name.replace('_', '-')}" in parser._option_string_actions
    }
    config_flags.set_defaults(parser, known, path)
    return Early(parser.parse_known_args(argv)[0], entries, section, start)


def prepare(argv: list[str], *, needs_checkpoint: bool = False) -> Run:
    """Parse and validate everything, choose the device, and set Megatron's global arguments.

    Manifest, YAML file and flags are merged in that order; flags that this platform needs are set; one
    line on rank 0 says which.

    Raises:
        UserError: anything in the flags, the YAML file or the checkpoint that cannot work.
    """
    early = read_early(argv)
    flags, entries, section = early.flags, early.entries, early.section
    _start_alone(flags)
    # A reader of checkpoints takes the one that is named.
    reads = needs_checkpoint or flags.rehearse is not None
    if flags.save and not reads:
        _check_writable(flags.save)
    load = _resume_or_load(flags.load, None if reads else flags.save)
    if needs_checkpoint and load is None:
        raise UserError("--load: name the dense checkpoint to read")
    recorded, source = agreement.find_manifest((load, flags.pretrained_checkpoint))
    agreement.check_start(early.start, recorded, source)

    chosen = device.choose(flags.device)
    from megatron_router_upcycling.checkpoint import open

    for root in (load, flags.pretrained_checkpoint):
        if root and (Path(root) / TRACKER).is_file() and flags.ckpt_step is None:
            open.check_whole(root)
    if chosen == "cpu":
        from megatron_router_upcycling.training.patches import cpu_backend

        cpu_backend.install()
    from megatron.training.arguments import parse_args, validate_args
    from megatron.training.global_vars import set_global_variables

    from megatron_router_upcycling.training import language_model

    parsers: list[ArgumentParser] = []

    def extend(parser: ArgumentParser) -> ArgumentParser:
        from megatron_router_upcycling.training import schedule

        def refuse(message: str) -> NoReturn:
            raise UserError(message)

        parser.error = refuse  # type: ignore[method-assign]
        config_flags.add_arguments(parser)
        schedule.install(parser)
        # A checkpoint that any other TP, PP and EP can resume.
        parser.set_defaults(dist_ckpt_optim_fully_reshardable=True)
        # As Qwen and the paper (section 4.1) train; Megatron's own default is 0.1.
        parser.set_defaults(attention_dropout=0.0, hidden_dropout=0.0)
        if recorded:
            config_flags.set_defaults(parser, recorded["model"], str(source))
            router = manifest.router_config(recorded, str(source))
            parser.set_defaults(
                **{name: getattr(router, field) for name, field in config_flags.SHARED_WITH_MEGATRON.items()}
            )
        config_flags.set_defaults(parser, entries | section, str(flags.config))
        parsers.append(parser)
        return parser

    sys.argv = [sys.argv[0], *argv]
    args = parse_args(extend)
    args.load = load
    if needs_checkpoint:
        args.save = None
    router = agreement.router_config(
        args, manifest.router_config(recorded, str(source)) if recorded else None, source
    )
    if recorded:
        agreement.check_architecture(parsers[0], args, recorded["model"], str(source))
    configured = dict(vars(args))
    device.use_built_dataset_helper()
    changes = device.adapt(args, chosen)
    if changes and args.rank == 0:
        print(changes, flush=True)
    if chosen == "cuda" and device.has_transformer_engine():
        from megatron_router_upcycling.training.patches import with_te

        with_te.install()
    else:
        from megatron_router_upcycling.training.patches import without_te

        without_te.install()
    planned = None
    if args.rehearse is not None:
        from megatron_router_upcycling.planning.rehearsal import run as rehearsal

        with _tokenizer_named(args):
            planned = rehearsal.adapt(args, configured, router, chosen == "cpu")
    if not (args.num_layers or args.encoder_num_layers or args.hybrid_layer_pattern):
        raise UserError(
            "--num-layers: is missing; give the architecture, or --load a checkpoint that brings it"
        )
    try:
        validate_args(args)
    except (AssertionError, ValueError) as error:
        raise megatron_refuses(error) from None
    if not needs_checkpoint and planned is None:
        language_model.check_data(args)
    with _tokenizer_named(args):
        set_global_variables(args)
    if recorded and args.save and args.rank == 0 and load != args.save:
        record = recorded | {"router": router.to_dict() if router else None}
        try:
            Path(args.save).mkdir(parents=True, exist_ok=True)
            manifest.write(args.save, record)
        except OSError as error:
            raise UserError(f"--save {args.save}: cannot be written ({error.strerror})") from None
    return Run(args, router, load, planned)


def _resume_or_load(load: str | None, save: str | None) -> str | None:
    """Where this run starts from: its own last checkpoint, else ``--load``, else nowhere.

    Raises:
        UserError: ``--load`` names a folder that holds no checkpoint and is not where this run saves.
    """
    if save and (Path(save) / TRACKER).is_file():
        return save
    if load and not (Path(load) / TRACKER).is_file():
        if save and Path(load).resolve() == Path(save).resolve():
            return load  # a run's first start
        raise UserError(f"--load {load}: no checkpoint there (no {TRACKER}); name a checkpoint's root folder")
    return load


@contextlib.contextmanager
def _tokenizer_named(args: Namespace) -> Iterator[None]:
    """What goes wrong where Megatron builds the tokenizer, in one line: its libraries raise anything."""
    try:
        yield
    except Exception as error:
        if not any(frame.name == "build_tokenizer" for frame in traceback.extract_tb(error.__traceback__)):
            raise
        raise UserError(
            f"--tokenizer-model {args.tokenizer_model}: --tokenizer-type {args.tokenizer_type} finds no"
            f" tokenizer there ({reason(error)})"
        ) from None


def megatron_refuses(error: Exception) -> UserError:
    """Megatron's objection to its arguments in one line; an assertion without a message shows its source."""
    said = " ".join(str(error).split())
    frames = traceback.extract_tb(error.__traceback__)
    if not said and frames:
        said = frames[-1].line or ""
    return UserError(f"Megatron refuses these arguments: {said}")


def _check_writable(save: str) -> None:
    from megatron_router_upcycling.files import existing

    folder = existing(Path(save).absolute())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise UserError(f"--save {save}: cannot write in {folder}; name a folder in a writable one")


def _start_alone(flags: Namespace) -> None:
    """Without torchrun, be the only rank; in a rehearsal one of many, of which the others are not there.

    Raises:
        UserError: what a rehearsal is asked for cannot be.
    """
    size, rank, tokens = flags.rehearse, flags.rehearse_rank, flags.rehearse_seq_length
    if size is None:
        if rank or tokens is not None:
            raise UserError("--rehearse-rank, --rehearse-seq-length: need --rehearse WORLD_SIZE")
    elif size < 1:
        raise UserError(f"--rehearse {size}: must be the number of GPUs of the run, at least 1")
    elif int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"--rehearse {size}: is one process; start it with python -m, not torchrun")
    elif not 0 <= rank < size:
        raise UserError(f"--rehearse-rank {rank}: must be between 0 and {size - 1}")
    elif tokens is not None and tokens < 1:
        raise UserError(f"--rehearse-seq-length {tokens}: must be at least 1")
    elif flags.output and not (folder := Path(flags.output).absolute().parent).is_dir():
        raise UserError(f"--output {flags.output}: there is no folder {folder}; make it first")
    if size is not None or "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(size or 1)}
        os.environ.update(alone | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)})


def exit_on_user_error(command: Any) -> None:
    """Run ``command``; a UserError ends with one line, from rank 0 or a rehearsed one, and exit status 2."""
    try:
        command()
    except UserError as error:
        if os.environ.get("RANK", "0") == "0" or any(a.startswith("--rehearse") for a in sys.argv):
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
