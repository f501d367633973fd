"""All that is not values: which entries there are, where their bytes lie, the files, the arguments."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_router_upcycling.checkpoint.dense_model import ARCHITECTURE, NEGATED, DenseModel
from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE
from megatron_router_upcycling.checkpoint.format.metadata import Blob
from megatron_router_upcycling.checkpoint.format.torch_save_check import Damaged
from megatron_router_upcycling.checkpoint.layers import split_layers
from megatron_router_upcycling.checkpoint.names import (
    EXTRA_STATE,
    FC1,
    FC2,
    ROUTER,
    TRAINING_STATE,
    other_norm,
    split_key,
)
from megatron_router_upcycling.checkpoint.publish.completeness import content_digests
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.config.router import RouterConfig
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sha256
from megatron_router_upcycling.verify.findings import Findings
from megatron_router_upcycling.verify.layout import Layout
from megatron_router_upcycling.verify.pieces import ExpectedTensor
from megatron_router_upcycling.verify.sources import DataFiles

BALANCING = (f"{ROUTER}.expert_bias", f"{ROUTER}.local_tokens_per_expert")  # made by training, if at all
READ_BYTES = 8 << 20


def check_tensors(
    moe: Checkpoint, expected: Mapping[str, ExpectedTensor], trained: bool, findings: Findings
) -> set[str]:
    """Find tensors that are missing, unexplained or of another shape; return those that can be compared."""
    comparable = set()
    for key, wanted in expected.items():
        stored = moe.tensors.get(key)
        if stored is None:
            if not (trained and other_norm(key) in moe.tensors):  # training saves the name that it uses
                findings.add(wanted.check, key, "is missing")
        elif stored.shape != wanted.shape:
            findings.add(wanted.check, key, f"is {list(stored.shape)} where {list(wanted.shape)} is expected")
        elif stored.dtype != wanted.dtype and not trained:
            findings.add(wanted.check, key, f"is {stored.dtype} where {wanted.dtype} is expected")
        else:
            comparable.add(key)
    for key in moe.tensors:
        made_by_training = TRAINING_STATE.match(key) or split_key(key)[0] in BALANCING
        if key not in expected and not (trained and made_by_training):
            findings.add("metadata", key, "has no place in this Mixture-of-Experts")
    return comparable


def check_ranges(moe: Checkpoint, whole_files: Iterable[str], findings: Findings) -> None:
    """Bytes that two chunks hold in part, and bytes of ``whole_files`` that no chunk holds."""
    by_file: dict[str, dict[tuple[int, int], str]] = {name: {} for name in whole_files}
    for key in (*moe.tensors, *moe.objects):
        for blob in moe.blobs(key):
            by_file.setdefault(blob.file, {})[blob.offset, blob.offset + blob.length] = key
    for name, ranges in by_file.items():
        ordered = sorted(ranges)
        for (start, end), (following, _) in pairwise(ordered):
            if following < end:
                what = f"its bytes {start}-{end} of {name} are in part another chunk's"
                findings.add("metadata", ranges[start, end], what)
        path = moe.iteration_dir / name
        if name in whole_files and path.is_file():
            edges = [(0, 0), *ordered, (path.stat().st_size,) * 2]
            for (_, end), (start, _) in pairwise(edges):
                if end < start:
                    findings.add("metadata", name, f"bytes {end}-{start} belong to no chunk")


def check_objects(
    moe: Checkpoint,
    dense: Checkpoint,
    files: DataFiles,
    wanted: set[str],
    layout: Layout,
    trained: bool,
    findings: Findings,
) -> dict[Blob, bytes]:
    """Compare extra states with the dense model's; return the identities of all objects' bytes.

    Args:
        wanted: the entries that modules of the Mixture-of-Experts look for.
    """
    dense = dense if layout.layers is None else split_layers(dense)

    def is_ffn(key: str) -> bool:
        name, layer = split_key(key)
        return name.startswith((f"{FC1}{EXTRA_STATE}", f"{FC2}{EXTRA_STATE}")) and layout.has_experts(layer)

    kept = {
        key
        for key in dense.objects
        if not (TRAINING_STATE.match(key) or is_ffn(key) or key == COMMON_STATE) and dense.is_verbatim(key)
    }
    identities: dict[Blob, bytes] = {}
    for key, blob in moe.objects.items():
        try:
            if blob not in identities:
                identities[blob] = files.examine(blob).identity
            if trained or key == COMMON_STATE:
                continue
            if key in kept:
                if moe.read_blob(blob) != dense.read_blob(dense.objects[key]):
                    findings.add("states", key, "differs from the dense model's")
            elif key not in wanted:
                findings.add("states", key, "has no place in this Mixture-of-Experts")
            elif torch_save_file.load(moe.read_blob(blob), key) != [None]:
                findings.add("states", key, "is not empty")
        except (Damaged, UserError, OSError) as error:
            findings.add("damage", key, f"{blob.file}, {blob.length} bytes at {blob.offset}: {error}")
    if not trained:
        for key in sorted((kept | wanted) - set(moe.objects)):
            findings.add("states", key, "is missing")
    return identities


def check_files(
    moe: Checkpoint,
    record: dict[str, Any],
    identities: Mapping[Blob, bytes],
    findings: Findings,
) -> None:
    """Sizes and digests of the files that the manifest records, and files that it does not."""
    new, linked = recorded_files(moe, record, "files"), recorded_files(moe, record, "linked")
    folder = moe.iteration_dir
    digests = content_digests(identities)
    recorded = {moe.root / name: entry for name, entry in (new | linked).items()}
    for path, entry in recorded.items():
        name = path.name
        if not path.is_file():
            findings.add("files", name, "is missing")
            continue
        if path.stat().st_size != entry.get("bytes"):
            what = f"has {path.stat().st_size} bytes where the manifest says {entry.get('bytes')}"
            findings.add("files", name, what)
        elif "sha256" in entry:
            if sha256(path) != entry["sha256"]:
                findings.add("files", name, "is not the file whose SHA-256 the manifest records")
        elif digests.get(name) != entry.get("content"):
            findings.add("files", name, "its chunks are not those whose digest the manifest records")
    for path in sorted(folder.iterdir()):
        if path not in recorded:
            findings.add("files", path.name, "is not in the manifest")
    findings.looked_at["files"] = f"{len(new)} new, {len(linked)} linked"


def section(moe: Checkpoint, record: dict[str, Any], name: str) -> dict[str, Any]:
    """A part of the manifest. Raises: UserError, where there is none."""
    part = record.get(name)
    if not isinstance(part, dict):
        raise UserError(f"MOE {moe.root}: its manifest has no {name!r} section; convert the model again")
    return part


def recorded_files(moe: Checkpoint, record: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    """File -> what the manifest says of it. Raises: UserError, where it says something else."""
    files = section(moe, record, name)
    for path, entry in files.items():
        if not isinstance(entry, dict) or Path(path).is_absolute() or ".." in Path(path).parts:
            raise UserError(
                f"MOE {moe.root}: its manifest says {path!r} in {name!r}; convert the model again"
            )
    return files


# Arguments of the dense run that mean nothing to a Mixture-of-Experts that starts anew, and their values.
FRESH = {
    "ckpt_format": "torch_dist",
    "iteration": 0,
    "curr_iteration": 0,
    "consumed_train_samples": 0,
    "consumed_valid_samples": 0,
    "skipped_train_samples": 0,
    "num_floating_point_operations_so_far": 0,
}
UPCYCLED = {
    "moe_router_score_function": "softmax",
    "moe_router_topk_scaling_factor": None,
    "moe_router_enable_expert_bias": False,
    "moe_shared_expert_intermediate_size": None,
    "moe_latent_size": None,
    "moe_layer_freq": 1,
}
LEFT_TO_TRAINING = {"moe_grouped_gemm", "moe_single_grouped_weight", "moe_single_grouped_bias"}


def check_arguments(
    moe: Checkpoint,
    dense: Checkpoint,
    model: DenseModel,
    record: dict[str, Any],
    router: RouterConfig,
    layout: Layout,
    trained: bool,
    findings: Findings,
) -> None:
    """Compare the training arguments with the dense run's, and with the manifest."""
    try:
        args, dense_args = vars(moe.args), vars(dense.args)
    except UserError as error:
        findings.add("arguments", COMMON_STATE, str(error))
        return
    wanted = {
        "num_experts": router.num_experts,
        "moe_router_topk": router.top_k,
        "moe_router_pre_softmax": router.pre_softmax,
        **layout.arguments(model),
    }
    if trained:
        names = {*ARCHITECTURE.values(), *NEGATED.values(), "num_query_groups"}
        wanted |= {name: dense_args[name] for name in names if dense_args.get(name) is not None}
    else:
        unchanged = set(dense_args) - LEFT_TO_TRAINING - set(wanted) - set(FRESH) - set(UPCYCLED)
        wanted = FRESH | UPCYCLED | {name: dense_args[name] for name in unchanged} | wanted
        for name in sorted(set(args) - set(wanted)):
            findings.add("arguments", name, "has no place among the arguments")
        if moe.common.get("iteration") != 0:
            findings.add("arguments", "iteration", f"is {moe.common.get('iteration')} in the common state")
        known = {"args", "checkpoint_version", "content_metadata", *FRESH}
        for name in sorted(set(moe.common) - known):
            findings.add("arguments", name, "has no place in the common state")
    for name, value in wanted.items():
        if name not in args:
            findings.add("arguments", name, "is missing")
        elif repr(args[name]) != repr(value):
            findings.add("arguments", name, f"is {args[name]!r:.60} where {value!r:.60} is expected")
    recorded, flags = section(moe, record, "model"), model.flags | layout.flags(model)
    if recorded != flags:
        for flag in sorted({*recorded, *flags}):
            if recorded.get(flag) != flags.get(flag):
                what = f"manifest says {recorded.get(flag)!r:.60}, DENSE {flags.get(flag)!r:.60}"
                findings.add("arguments", flag, what)
    findings.looked_at["arguments"] = f"{len(wanted)} arguments"
