"""One conversion from end to end: check everything, write aside, publish, keep a record.

``upcycle`` says what becomes of each tensor; here are the folders, the key statistics and the manifest.
"""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.files import TRACKER, iteration_dir
from megatron_router_upcycling.checkpoint.open import open_dense
from megatron_router_upcycling.checkpoint.publish import completeness
from megatron_router_upcycling.checkpoint.publish import folder as publish
from megatron_router_upcycling.checkpoint.publish.source_guard import Stamps
from megatron_router_upcycling.checkpoint.publish.value_check import IntactCheck
from megatron_router_upcycling.checkpoint.read_model import query_key_digest, read_model
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.checkpoint.writer import CheckpointWriter
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.execute import execute
from megatron_router_upcycling.conversion.job import Conversion
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import Plan, plan, targets
from megatron_router_upcycling.conversion.record import DATA_FILES, make_manifest
from megatron_router_upcycling.conversion.steps import Draw, LeaveOut, accounted
from megatron_router_upcycling.errors import UserError, reason
from megatron_router_upcycling.initialisation.first_routers import router_parameters
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.key_statistics.file import KeyStats


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
    model = read_model(dense)
    if options.init.weights == "random":
        options = replace(options, materialize=True)  # there is nothing to share
    stats = None
    router_parameters(model, options.router)  # whether the router fits the model
    kind = options.router.kind
    if kind.of_heads or options.init.needs_router_input:
        if options.key_stats is None:
            what = f"--router {kind.name}" if kind.of_heads else "this --config"
            raise UserError(f"--key-stats: {what} needs the file that collect_keys wrote")
        stats = key_stats_file.load(options.key_stats)
        check_key_stats(stats, options.key_stats, dense, model)
        found = stats.metadata["key_source"]
        if options.key_source not in (None, found):
            raise UserError(
                f"--key-stats {options.key_stats}: holds {found} keys, and --config asks for key_source"
                f" {options.key_source}; collect them with --key-source {options.key_source}"
            )
        if options.init.needs_router_input:
            key_stats_file.read_router_input(options.key_stats, 0)
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
            completeness.check_whole(tensors, writer.objects, made)
            contents = completeness.content_digests(
                completeness.examine_all(writer.folder, tensors, writer.objects)
            )
            record = make_manifest(conversion, folder, contents)
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
