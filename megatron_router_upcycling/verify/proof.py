"""Prove that an upcycled checkpoint is correct, by comparing it with the dense checkpoint it came from.

``prepare`` opens both and plans the conversion again, with the options that the manifest records; ``run``
compares. If the checkpoint has trained since, its values are checked only for damage and NaN.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_router_upcycling import expert_layers
from megatron_router_upcycling.checkpoint.dense_model import DenseModel
from megatron_router_upcycling.checkpoint.format.files import COMMON_FILE, CONFIG
from megatron_router_upcycling.checkpoint.format.metadata import METADATA
from megatron_router_upcycling.checkpoint.names import RELEASE
from megatron_router_upcycling.checkpoint.open import open_checkpoint, open_dense
from megatron_router_upcycling.checkpoint.read_model import read_model
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config import manifest
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.conversion.plan import plan
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import format_bytes, sha256
from megatron_router_upcycling.growth import plan as growth
from megatron_router_upcycling.initialisation.first_routers import router_parameters
from megatron_router_upcycling.key_statistics import file as key_stats_file
from megatron_router_upcycling.verify import structure
from megatron_router_upcycling.verify.findings import Findings, Verification
from megatron_router_upcycling.verify.values import Comparison, Progress, Sources

TRAINED = "the checkpoint has trained"


def prepare(
    dense_root: str | Path,
    moe_root: str | Path,
    key_stats: Sequence[Path] = (),
    config: Path | None = None,
) -> Verification:
    """Open everything; ``key_stats`` are by default those that the manifest names, ``config`` describes the
    dense model where its checkpoint does not."""
    findings = Findings()
    moe = open_checkpoint(moe_root, lambda name, what: findings.add("metadata", name, what))
    record = manifest.read(moe.root)
    if record is None:
        which = "name a checkpoint that convert made, or that pretrain trained from one"
        raise UserError(f"MOE {moe.root}: has no {manifest.NAME}; {which}")
    if (more := record.get("more_experts")) is not None:
        made = growth.MoreExperts.recorded(more, moe.root / manifest.NAME)
        grown = growth.plan(open_checkpoint(dense_root), made, seed=_seed(record, moe.root))
        return Verification(moe, record, grown, None, findings)
    dense = open_dense(dense_root, config)
    model = read_model(dense)
    options = recorded_options(moe.root, record, model.num_layers)
    options.init.check(options.router)
    router_parameters(model, options.router)  # refuses a router that does not fit the model
    stats = None
    if moe.iteration_dir.name == RELEASE and options.init.needs_key_stats(options.router):
        made_from = manifest.entries(record, "key_stats", moe.root)
        if not made_from:
            raise UserError(f"MOE {moe.root}: its manifest names no 'key_stats'; convert the model again")
        stats = _key_stats(model, made_from, key_stats, findings)
    experts = [_expert_source(one, config) for one in manifest.entries(record, "experts", moe.root)]
    return Verification(moe, record, plan(dense, model, options, experts), stats, findings)


def _expert_source(recorded: dict[str, Any], config: Path | None) -> Checkpoint | None:
    """A model of --experts, or None if it is gone or not the one of the conversion any more."""
    try:
        source = open_dense(str(recorded.get("path")), config)
        return source if source.digest() == recorded.get("digest") else None
    except (UserError, OSError):
        return None


def recorded_options(root: Path, record: dict[str, Any], num_layers: int) -> Options:
    """The conversion options that a manifest records, for a model of ``num_layers`` layers."""
    source = root / manifest.NAME
    seed, layers = _seed(record, root), None
    flags = manifest.section(record, "model", f"{source}:")
    if (text := flags.get("moe_layer_freq")) is not None:
        frequencies = expert_layers.layer_frequency(text, f"{source}: its moe_layer_freq")
        if not isinstance(frequencies, list) or len(frequencies) != num_layers:
            raise UserError(f"{source}: its moe_layer_freq is no list of 0 and 1 for each layer of DENSE")
        layers = ",".join(str(layer) for layer, one in enumerate(frequencies) if one)
    return Options(
        router=manifest.router_config(record, source),
        seed=seed,
        average_rest=record.get("average_rest") is True,
        shared_expert=flags.get("moe_shared_expert_intermediate_size") is not None,
        layers=layers,
        init=manifest.init_config(record, source),
    )


def _seed(record: dict[str, Any], root: Path) -> int:
    if not isinstance(seed := record.get("seed"), int):
        raise UserError(f"{root / manifest.NAME}: has no 'seed'; convert the model again")
    return seed


def _key_stats(
    model: DenseModel, recorded: list[dict[str, Any]], paths: Sequence[Path], findings: Findings
) -> key_stats_file.KeyStats:
    if not paths:
        paths = [Path(str(one.get("path"))) for one in recorded]
        if gone := [path for path in paths if not path.is_file()]:
            raise UserError(
                f"--key-stats: {gone[0]}, which the routers were made from, is gone; name its path"
            )
    if len(paths) != len(recorded):
        raise UserError(f"--key-stats: {len(paths)} files, where the routers were made from {len(recorded)}")
    every = [key_stats_file.load(path) for path in paths]
    expected = (model.num_layers, model.num_query_groups, model.kv_channels)
    for path, stats, made_from in zip(paths, every, recorded, strict=True):
        if tuple(stats.mean.shape) != expected:
            found = f"keys {list(stats.mean.shape)} where DENSE has {list(expected)}"
            raise UserError(f"--key-stats {path}: of another model: {found}")
        if sha256(path) != made_from.get("sha256"):
            what = "is not the file of key statistics whose SHA-256 the manifest records"
            findings.add("files", str(path), what)
    return key_stats_file.pool(every)


def run(verification: Verification, progress: Progress = lambda count: None) -> Findings:
    """Read both checkpoints and return all findings; ``progress`` is called with numbers of bytes."""
    moe, trained, findings = verification.moe, verification.trained, verification.findings
    comparison = Comparison(moe, Sources(verification.plan.source), findings, progress)
    expected = verification.plan.expects(verification.stats)
    comparable = structure.check_tensors(verification, expected)
    identities = structure.check_objects(verification)
    structure.check_arguments(verification)
    structure.check_manifest(verification)
    for key in moe.tensors:
        comparison.compare(key, expected[key] if key in comparable and not trained else None)
    whole_files: set[str] = set()
    if not trained:
        small = {METADATA, CONFIG, COMMON_FILE}
        whole_files = {Path(name).name for name in verification.recorded_files("files")} - small
        structure.check_files(verification, identities | comparison.identities)
    structure.check_ranges(moe, whole_files, findings)
    _say_what_was_seen(verification, comparison)
    structure.check_gone_experts(verification)
    return findings


def _say_what_was_seen(verification: Verification, comparison: Comparison) -> None:
    findings, moe = verification.findings, verification.moe
    chunks = sum(len(stored.chunks) for stored in moe.tensors.values())
    findings.looked_at["metadata"] = f"{len(moe.tensors)} tensors, {chunks} chunks"
    stored = len(comparison.identities)
    findings.looked_at["damage"] = f"{stored} of them stored, {format_bytes(comparison.read)}"
    findings.looked_at["states"] = f"{len(moe.objects)} objects"
    for check in ("experts", "untouched", "norms", "routers"):
        if verification.trained:
            findings.skipped[check] = f"but for names and shapes: {TRAINED}"
        else:
            findings.looked_at[check] = format_bytes(comparison.compared.get(check, 0))
    if verification.trained:
        findings.skipped["states"] = findings.skipped["files"] = TRAINED
    elif not verification.plan.options.init.of_heads(
        verification.plan.options.router
    ) and comparison.compared.get("routers"):
        findings.looked_at["routers"] += f", drawn again from seed {verification.plan.options.seed}"


def describe(verification: Verification, seconds: float) -> str:
    """What was proved and what differs, for a screen."""
    findings, moe, router = verification.findings, verification.moe, verification.plan.options.router
    since = f", trained to {moe.iteration_dir.name}: values not compared" if verification.trained else ""
    verdict = f"{len(findings.found)} DIFFERENCES" if findings else "as it must be"
    return (
        f"{moe.root}: {router.num_experts} experts, {router.describe()}{since}\n{findings.table()}\n"
        f"{verdict}; {format_bytes(verification.bytes_to_read)} of values read in {seconds:.1f} s"
    )
