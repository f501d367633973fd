"""One conversion from end to end: check everything, write to a hidden folder, publish, record."""

import itertools
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint import beside
from megatron_router_upcycling.checkpoint.dense_model import Architecture, DenseModel
from megatron_router_upcycling.checkpoint.format.files import locate
from megatron_router_upcycling.checkpoint.names import LEFT_OUT, RELEASE, TRACKER, TRAINING_STATE
from megatron_router_upcycling.checkpoint.open import open_dense
from megatron_router_upcycling.checkpoint.publish import checks
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.read_model import query_key_digest, read_model
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import Plan, plan
from megatron_router_upcycling.conversion.sources import check_texts, open_sources, values_digest
from megatron_router_upcycling.conversion.steps import CopyExperts
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.files import existing, format_bytes, sha256, versions
from megatron_router_upcycling.initialisation.first_routers import choose_head_key, router_parameters
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.file import KeyStats

DATA_FILES = "__upcycled_"  # prefix of new data files' names; linked files keep the dense checkpoint's
EXPERT_FILE = f"{DATA_FILES}0.distcp"


@dataclass(frozen=True)
class Conversion:
    """A conversion that is ready to run: everything that is known before a byte is written."""

    plan: Plan
    stats: KeyStats | None
    out: Path
    sources: checks.Stamps

    @property
    def links(self) -> bool:
        """Whether unchanged data is hard-linked rather than copied."""
        plan = self.plan
        linkable = plan.kept_bytes > plan.changed_bytes and not plan.options.materialize
        disks = {
            path.stat().st_dev for path in (plan.dense.iteration_dir, existing(self.out.absolute().parent))
        }
        return linkable and len(disks) == 1

    @property
    def bytes_to_write(self) -> int:
        """The bytes that the disk must have room for, without the few that wrap each chunk."""
        plan = self.plan
        return plan.expert_bytes + plan.router_bytes + (plan.changed_bytes if self.links else plan.kept_bytes)


def prepare(root: str | Path, out: str | Path, options: Options) -> Conversion:
    """Read and check everything; write nothing."""
    options.router.check_trains(options.megatron)
    out = Path(out)
    named = {"DENSE": Path(root)} | {f"--experts {path}": path for path in options.experts}
    places = {name: locate(path) for name, path in named.items()}
    stamps = checks.Stamps(
        [*options.key_stats, *(path for _, folder in places.values() for path in folder.rglob("*"))]
    )
    dense = open_dense(root, options.config)
    for name, (source, _) in places.items():
        publish.check_target(out, source, options.overwrite, source_name=name, made_by=TRACKER)
    model = read_model(dense)
    experts = open_sources(dense, model, options)
    router_parameters(model, options.router)  # refuses a router that does not fit the model
    stats = _read_key_stats(options, dense, model)
    if stats is not None and options.init.of_heads(options.router):
        head_key = choose_head_key(options.init, stats, model)
        options = replace(options, init=replace(options.init, head_key=head_key))  # for the manifest
    conversion = Conversion(plan(dense, model, options, experts), stats, out, stamps)
    publish.check_space(out, conversion.bytes_to_write)
    return conversion


def convert(conversion: Conversion, progress: Callable[[int], None] = lambda count: None) -> dict[str, Any]:
    """Make the checkpoint and return its manifest, or leave nothing (``publish.folder``).

    ``progress`` is called with the number of bytes after each write. Also refuses a dense checkpoint that
    changes while it is read, or has a chunk that fails its checksum or is not finite.
    """
    plan, out, sources = conversion.plan, conversion.out, conversion.sources
    with publish.new_folder(out, plan.options.overwrite) as folder:
        try:
            contents = _write(conversion, folder / RELEASE, progress)
            record = _manifest(plan, conversion.stats, folder, contents)
            manifest.write(folder, record)
            if (beside_dense := plan.dense.root / beside.FOLDER).is_dir():
                beside.hand_on(beside_dense, folder)
            (folder / TRACKER).write_text(RELEASE, encoding="utf-8")
            sources.check()
        except OSError:
            sources.check()  # a source that is gone is the cause
            raise
        except (pickle.PicklingError, RecursionError) as error:
            why = f"its training arguments hold what cannot be carried over ({reason(error)})"
            raise UserError(f"DENSE {plan.dense.root}: {why}") from None
    return record


def _write(conversion: Conversion, folder: Path, progress: Callable[[int], None]) -> dict[str, str]:
    """Fill the iteration's folder, check all of its content, and return the digests of its data files."""
    plan = conversion.plan
    with (
        checks.intact_check(plan.values_taken_over()) as intact,
        CheckpointWriter(folder, DATA_FILES, progress) as writer,
    ):
        plan.run(conversion.stats, writer)
        tensors = writer.finish()
        intact.result()
    checks.check_whole(tensors, writer.objects, plan.makes())
    return checks.content_digests(checks.examine_all(folder, tensors, writer.objects))


def _manifest(plan: Plan, stats: KeyStats | None, folder: Path, contents: dict[str, str]) -> dict[str, Any]:
    """The record of a conversion; ``contents`` are the digests of the data files' chunks."""
    dense, options = plan.dense, plan.options
    left_out = Counter(found["kind"] for found in map(TRAINING_STATE.match, plan.left_out) if found)
    files: dict[str, dict[str, Any]] = {"files": {}, "linked": {}}  # linked: in both checkpoints
    for path in filter(Path.is_file, sorted(folder.rglob("*"))):
        is_linked = path.stat().st_nlink > 1
        # Linked data and the experts' values keep their stored checksums: take a digest of those.
        known = is_linked or path.name == EXPERT_FILE
        digest = {"content": contents[path.name]} if known else {"sha256": sha256(path)}
        entry = {"bytes": path.stat().st_size} | digest
        files["linked" if is_linked else "files"][str(path.relative_to(folder))] = entry
    key_stats = [
        {"path": str(text.path.absolute()), "sha256": sha256(text.path), "metadata": text.metadata}
        for text in (stats.texts if stats else ())
        if text.path
    ]
    experts = [
        {"path": str(one.root.absolute()), "digest": one.digest(), "values": values_digest(one)}
        for one in plan.experts
        if one is not None
    ]
    return {
        "format": manifest.FORMAT,
        "router": options.router.to_dict(),
        "init": options.init.to_dict(),
        "model": plan.flags,
        "seed": options.seed,
        "shared_storage": not options.materialize,
        "source": {
            "path": str(dense.root.absolute()),
            "iteration": dense.iteration_dir.name,
            "digest": dense.digest(),
        },
        "key_stats": key_stats if len(key_stats) > 1 else key_stats[0] if key_stats else None,
        "experts": experts or None,
        "average_rest": options.average_rest,
        **files,
        **plan.record,
        "left_out": {kind: {"entries": left_out[kind], "reason": LEFT_OUT[kind]} for kind in left_out},
        "versions": versions(),
    }


def _read_key_stats(options: Options, dense: Checkpoint, model: DenseModel) -> KeyStats | None:
    """Load and check the key statistics; None where the routers need none."""
    kind, init = options.router.kind, options.init
    if not init.needs_key_stats(options.router):
        return None
    if not options.key_stats:
        what = f"--router {kind.name}" if kind.of_heads else "this start of the routers"
        raise UserError(f"--key-stats: {what} needs the file that collect_keys wrote")
    check_texts(options)
    sizes = ("num_layers", "num_query_groups", "kv_channels", "num_attention_heads", "hidden_size")
    wanted: dict[str, Callable[[], Any]] = {size: partial(getattr, model, size) for size in sizes}
    wanted["checkpoint_digest"] = dense.digest
    wanted["query_key_digest"] = lambda: query_key_digest(dense)
    every = [key_stats_file.load(path) for path in options.key_stats]
    for stats, (name, value) in itertools.product(every, wanted.items()):
        recorded = stats.metadata.get(name)  # files of older versions lack some
        if recorded is not None and (needed := value()) != recorded:
            raise UserError(
                f"--key-stats {stats.path}: of another model or other keys: its {name} is {recorded}, and"
                f" {needed} is needed; collect them from {dense.root}"
            )
    stats = key_stats_file.pool(every)
    if init.needs_router_input:
        stats.samples(0)
    return stats


def describe_plan(conversion: Conversion) -> str:
    """What would be done, in a few lines."""
    plan = conversion.plan
    model, options = plan.model, plan.options
    experts = sum(isinstance(step, CopyExperts) for step in plan.steps)
    what = model.describe() if experts else Architecture.describe(model)  # not a dense one
    how = "linked, not written" if conversion.links else "copied"
    copies = f"{options.router.num_experts} times" if options.materialize else "once"
    copies += f" for each of {len(plan.experts)} models" * bool(plan.experts)
    written = f" of {experts} tensors, each written {copies}" if experts else ", all others named again"
    routers = "; ".join(f"{key} {list(shape)}" for key, shape in router_parameters(model, options.router))
    return (
        f"{plan.dense.iteration_dir}: {what}\n"
        f"  take over  {format_bytes(plan.kept_bytes)} in {len(plan.kept)} entries, {how}\n"
        f"  experts    {format_bytes(plan.expert_bytes)}{written}\n"
        f"  routers    {format_bytes(plan.router_bytes)}: {routers}\n"
        f"  leave out  {len(plan.left_out)} entries of training state\n"
        f"would write {format_bytes(conversion.bytes_to_write)} to {conversion.out},"
        f" with at most {format_bytes(plan.memory_bytes)} of the model in memory"
    )


def describe_result(conversion: Conversion, record: dict[str, Any], seconds: float) -> str:
    """What was made, what to expect of its first step, and what to run next."""
    plan, out = conversion.plan, conversion.out
    options, router = plan.options, plan.options.router
    written = sum(file["bytes"] for file in record["files"].values())
    cut = f" (copies cut {router.granularity} ways)" * (router.granularity > 1)
    cut += (
        f" of {len(plan.experts)} models" * bool(plan.experts) + ", a shared expert" * options.shared_expert
    )
    linked = plan.kept_bytes - plan.changed_bytes
    shared = f", {format_bytes(linked)} linked to {plan.dense.root}" if conversion.links else ""
    order = "top-k, then softmax (--no-moe-router-pre-softmax)"
    if router.pre_softmax:
        order = "softmax, then top-k (--moe-router-pre-softmax)"
    return (
        f"{out}: in each layer {router.num_experts} experts{cut} and {router.describe()},"
        f" {format_bytes(written)} written in {seconds:.1f} s{shared}\n"
        f"prepared for {order}; before training {plan.first_step}\n"
        "next: torchrun --nproc-per-node 2 -m megatron_router_upcycling.pretrain --config YAML"
        f" --load {out} --save RUN"
    )
