"""One conversion from end to end: check everything, write aside, publish, keep a record.

``upcycle`` says what becomes of each tensor; here are the folders, the key statistics and the manifest.
"""

import functools
import hashlib
import importlib.metadata
import os
import pickle
import platform
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_router_upcycling import key_stats, manifest
from megatron_router_upcycling.checkpoint import ledger, publish
from megatron_router_upcycling.checkpoint.dense import DenseModel, open_dense, query_key_digest
from megatron_router_upcycling.checkpoint.intact import IntactCheck
from megatron_router_upcycling.checkpoint.publish import format_bytes
from megatron_router_upcycling.checkpoint.stamps import Stamps
from megatron_router_upcycling.checkpoint.torch_dist import TRACKER, Checkpoint, iteration_dir
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.initial_routers import router_parameters
from megatron_router_upcycling.key_stats import KeyStats
from megatron_router_upcycling.moe_arguments import model_flags
from megatron_router_upcycling.upcycle import (
    LEFT_OUT,
    TRAINING_STATE,
    Options,
    Plan,
    accounted,
    execute,
    plan,
    targets,
)
from megatron_router_upcycling.upcycle_steps import AlterExperts, CopyExperts, Draw, Keep, LeaveOut


def check_key_stats(stats: KeyStats, path: Path, dense: Checkpoint, model: DenseModel) -> None:
    """Refuse statistics of another model.

    Raises:
        UserError: sizes or the recorded digest of the checkpoint differ.
    """
    expected = (model.num_layers, model.num_query_groups, model.kv_channels)
    if tuple(stats.mean.shape) != expected:
        raise UserError(
            f"--key-stats {path}: of another model: keys {list(stats.mean.shape)} (layers, query groups,"
            f" head size) where {dense.root} has {list(expected)}; collect them from this checkpoint"
        )
    for name in ("num_attention_heads", "hidden_size"):
        recorded = stats.metadata.get(name)
        if recorded is not None and recorded != getattr(model, name):
            raise UserError(
                f"--key-stats {path}: of another model: {name} {recorded} where {dense.root} has"
                f" {getattr(model, name)}; collect them from this checkpoint"
            )
    # Files of older versions have one of the digests or none.
    digests = {"checkpoint_digest": dense.digest, "query_key_digest": lambda: query_key_digest(dense)}
    for name, digest in digests.items():
        recorded = stats.metadata.get(name)
        if recorded is not None and recorded != digest():
            raise UserError(
                f"--key-stats {path}: collected from another checkpoint ({stats.metadata.get('checkpoint')});"
                f" collect them from {dense.root}"
            )


DATA_FILES = "__upcycled_"  # begins the new data files' names, beside the dense checkpoint's own
EXPERT_FILE = f"{DATA_FILES}0.distcp"


@dataclass(frozen=True)
class Conversion:
    """Everything that is known before a byte is written."""

    dense: Checkpoint
    model: DenseModel
    options: Options
    stats: KeyStats | None
    plan: Plan
    out: Path
    sources: Stamps

    @property
    def bytes_to_write(self) -> int:
        """What the disk must have room for, but for the few bytes around each chunk."""
        plan = self.plan
        return plan.expert_bytes + plan.router_bytes + (plan.changed_bytes if self.links else plan.kept_bytes)

    @property
    def memory_bytes(self) -> int:
        """What the model itself takes of memory at most, whatever its number of layers.

        A chunk that is read; for a mixture, one layer's queries, keys and values twice (joined from chunks,
        then apart), its router, and that of the layer before.
        """
        model, plan = self.model, self.plan
        if self.options.router.router != "mixture":
            return plan.scratch_bytes
        heads = model.num_attention_heads + 2 * model.num_query_groups
        rows = heads * model.kv_channels * model.hidden_size * model.dtype.itemsize
        layers = model.num_layers if plan.layers is None else len(plan.layers)
        return plan.scratch_bytes + 2 * rows + 2 * plan.router_bytes // layers

    @property
    def links(self) -> bool:
        """Whether what does not change is linked rather than copied."""
        linkable = self.plan.kept_bytes > self.plan.changed_bytes
        return linkable and not self.options.materialize and _on_one_disk(self.dense.iteration_dir, self.out)


def prepare(root: str | Path, out: str | Path, options: Options) -> Conversion:
    """Read and check everything; write nothing.

    Raises:
        UserError: whatever would make the conversion fail and can be known beforehand.
    """
    out = Path(out)
    read = [path for path in (options.key_stats,) if path] + list(iteration_dir(Path(root)).rglob("*"))
    sources = Stamps(read)  # before anything is read
    dense = open_dense(root)
    publish.check_target(out, dense.root, options.overwrite)
    model = DenseModel.of(dense)
    if options.init.weights == "random":
        options = replace(options, materialize=True)  # there is nothing to share
    stats = None
    options.router.check_hidden_size(model.hidden_size)
    kind = options.router.router
    if kind == "mixture" or options.init.needs_router_input:
        if options.key_stats is None:
            what = f"--router {kind}" if kind == "mixture" else "this --config"
            raise UserError(f"--key-stats: {what} needs the file that collect_keys wrote")
        if kind == "mixture":
            options.router.shape(model.num_attention_heads, model.kv_channels)
        stats = key_stats.load(options.key_stats)
        check_key_stats(stats, options.key_stats, dense, model)
        found = stats.metadata["key_source"]
        if options.key_source not in (None, found):
            raise UserError(
                f"--key-stats {options.key_stats}: holds {found} keys, and --config asks for key_source"
                f" {options.key_source}; collect them with --key-source {options.key_source}"
            )
        if options.init.needs_router_input:
            key_stats.read_router_input(options.key_stats, 0)
    conversion = Conversion(dense, model, options, stats, plan(dense, model, options), out, sources)
    publish.check_space(out, conversion.bytes_to_write)
    return conversion


def convert(conversion: Conversion, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the checkpoint and return its manifest. On any exception nothing is left behind.

    Args:
        progress: called with the number of bytes after each write.

    Raises:
        UserError: it cannot be written; a chunk of the dense checkpoint cannot be read, is not what was
            saved or holds NaN; or a file that was read has changed meanwhile.
    """
    out, options = conversion.out, conversion.options
    try:
        with publish.new_folder(out, options.overwrite, f"release/{DATA_FILES}*") as folder:
            with (
                IntactCheck(conversion.plan.source, used(conversion.plan)) as intact,
                CheckpointWriter(folder / "release", DATA_FILES, progress) as writer,
            ):
                execute(
                    conversion.plan, conversion.dense, conversion.model, options, conversion.stats, writer
                )
                tensors = writer.finish()
                intact.wait()
            made = targets(conversion.plan, conversion.model)
            ledger.check_whole(tensors, writer.objects, made)
            contents = ledger.content_digests(ledger.examine_all(writer.folder, tensors, writer.objects))
            record = _manifest(conversion, folder, contents)
            manifest.write(folder, record)
            (folder / TRACKER).write_text("release", encoding="utf-8")
            conversion.sources.check()
    except OSError as error:
        conversion.sources.check()  # one that has gone is the cause
        raise UserError(f"OUT {out}: cannot be written ({error.strerror}); nothing was left behind") from None
    except (pickle.PicklingError, RecursionError) as error:
        raise UserError(
            f"DENSE {conversion.dense.root}: its training arguments hold what cannot be carried over"
            f" ({reason(error)})"
        ) from None
    return record


def used(plan: Plan) -> list[str]:
    """The tensors of ``plan.source`` whose values are taken over."""
    steps = [step for step in plan.steps if not isinstance(step, LeaveOut | Draw)]
    return [key for step in steps for key in accounted(step) if key in plan.source.tensors]


def _manifest(conversion: Conversion, folder: Path, contents: dict[str, str]) -> dict[str, Any]:
    """The record of a conversion; ``contents`` are the digests of the data files' chunks."""
    dense, options, stats = conversion.dense, conversion.options, conversion.stats
    left_out = Counter(
        found["kind"]
        for step in conversion.plan.steps
        for key in (step.keys if isinstance(step, LeaveOut) else ())
        if (found := TRAINING_STATE.match(key))
    )
    record = {
        "format": manifest.FORMAT,
        "router": options.router.to_dict(),
        "init": options.init.to_dict(),
        "model": conversion.model.flags
        | model_flags(conversion.model, options.router, options.shared_expert, conversion.plan.layers),
        "seed": options.seed,
        "shared_storage": not options.materialize,
        "source": {
            "path": str(dense.root.absolute()),
            "iteration": dense.iteration_dir.name,
            "digest": dense.digest(),
        },
        "key_stats": None,
        "files": {str(path.relative_to(folder)): _file_record(path, contents) for path in new_files(folder)},
        "linked": {
            str(path.relative_to(folder)): {"bytes": path.stat().st_size, "content": contents[path.name]}
            for path in linked_files(folder)
        },
        "left_out": {kind: {"entries": left_out[kind], "reason": LEFT_OUT[kind]} for kind in left_out},
        "versions": versions(),
    }
    if stats is not None and options.key_stats is not None:
        record["key_stats"] = {
            "path": str(options.key_stats.absolute()),
            "sha256": _sha256(options.key_stats),
            "metadata": stats.metadata,
        }
    return record


def new_files(folder: Path) -> list[Path]:
    """The files of a checkpoint that the dense one does not share."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in files if path.stat().st_nlink == 1)


def linked_files(folder: Path) -> list[Path]:
    """The data files of a checkpoint that are the dense one's as well."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_nlink > 1)


def _file_record(path: Path, contents: dict[str, str]) -> dict[str, Any]:
    """Size and SHA-256; for the experts, whose values keep the checksums they had, a digest of those."""
    digest = {"content": contents[path.name]} if path.name == EXPERT_FILE else {"sha256": _sha256(path)}
    return {"bytes": path.stat().st_size} | digest


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_plan(conversion: Conversion) -> str:
    """What would be done, in a few lines."""
    model, options, plan, dense = conversion.model, conversion.options, conversion.plan, conversion.dense
    entries = {type(step): accounted(step) for step in plan.steps}
    experts = [step for step in plan.steps if isinstance(step, CopyExperts | AlterExperts)]
    drawn = sum(isinstance(step, Draw) for step in plan.steps)
    how = "linked, not written" if conversion.links else "copied"
    all_bytes = plan.kept_bytes + plan.expert_bytes
    apart = options.materialize or options.init.alters_experts
    copies = f"{options.router.num_experts} times" if apart else "once"
    routers = "; ".join(f"{key} {list(shape)}" for key, shape in router_parameters(model, options.router))
    lines = [
        f"{dense.iteration_dir}: {model.describe()}",
        *(
            [f"  draw       {format_bytes(all_bytes)} of {drawn} tensors, from seed {options.seed}"]
            if drawn
            else [
                f"  take over  {format_bytes(plan.kept_bytes)} in {len(entries[Keep])} entries, {how}",
                f"  experts    {format_bytes(plan.expert_bytes)} of {len(experts)} tensors, each written"
                f" {copies}",
            ]
        ),
        f"  routers    {format_bytes(plan.router_bytes)}: {routers}",
        f"  leave out  {len(entries[LeaveOut])} entries of training state",
        f"would write {format_bytes(conversion.bytes_to_write)} to {conversion.out},"
        f" with at most {format_bytes(conversion.memory_bytes)} of the model in memory",
    ]
    return "\n".join(lines)


def describe_result(conversion: Conversion, record: dict[str, Any], seconds: float) -> str:
    """What was made, what to expect of its first step, and what to run next."""
    options, out = conversion.options, conversion.out
    router = options.router
    written = sum(file["bytes"] for file in record["files"].values())
    cut = f" (copies cut {router.granularity} ways)" * (router.granularity > 1) + (
        ", a shared expert" * options.shared_expert
    )
    kind = router.describe()
    linked = conversion.plan.kept_bytes - conversion.plan.changed_bytes
    shared = f", {format_bytes(linked)} linked to {conversion.dense.root}" if conversion.links else ""
    if router.pre_softmax:
        order = "softmax, then top-k (--moe-router-pre-softmax)"
    else:
        order = "top-k, then softmax (--no-moe-router-pre-softmax)"
    if options.init.weights == "random":
        first = "a model from scratch"
    elif router.pre_softmax:
        first = (
            f"an FFN's output shrinks by the sum of the {router.top_k} largest of {router.num_experts}"
            " weights, so the loss starts above the dense model's"
        )
    elif options.init.alters_experts:
        first = "near the dense model, as far as its experts still are its FFN"
    else:
        first = "exactly the dense model"
        if router.granularity == 1:
            first += "; its loss gives the router no gradient until the experts differ"
    return (
        f"{out}: {router.num_experts} experts{cut} and {kind}, {format_bytes(written)} written"
        f" in {seconds:.1f} s{shared}\n"
        f"prepared for {order}; at step 0: {first}\n"
        "next: torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config YAML"
        f" --load {out} --save RUN"
    )


@functools.cache
def versions() -> dict[str, str]:
    names = ("megatron-router-upcycling", "megatron-core", "torch")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def _on_one_disk(source: Path, out: Path) -> bool:
    return os.stat(source).st_dev == os.stat(publish.existing(out.absolute().parent)).st_dev
