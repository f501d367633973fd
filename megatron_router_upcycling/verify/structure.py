"""Verify everything but the values: entries, their byte ranges, files, arguments, manifest."""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any

from megatron_router_upcycling.checkpoint import dense_model, names
from megatron_router_upcycling.checkpoint.format import torch_save_file
from megatron_router_upcycling.checkpoint.format.files import COMMON_STATE
from megatron_router_upcycling.checkpoint.format.metadata import Blob
from megatron_router_upcycling.checkpoint.publish.checks import content_digests
from megatron_router_upcycling.checkpoint.torch_dist import Checkpoint
from megatron_router_upcycling.conversion.moe_arguments import PLAIN, fresh_common_state
from megatron_router_upcycling.conversion.sources import values_digest
from megatron_router_upcycling.conversion.steps import Expected
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import sha256
from megatron_router_upcycling.verify.findings import Findings, Verification

VERSIONS = {"args", "checkpoint_version", "content_metadata"}  # of a common state: not compared with the rest


def check_tensors(verification: Verification, expected: Mapping[str, Expected]) -> set[str]:
    """Find tensors that are missing, unexplained or of another shape; return those that can be compared."""
    moe, trained, findings = verification.moe, verification.trained, verification.findings
    comparable: set[str] = set()
    for key, wanted in expected.items():
        stored = moe.tensors.get(key)
        if stored is None:
            if not (trained and names.other_norm(key) in moe.tensors):  # training saves one of them
                findings.add(wanted.check, key, "is missing")
        elif stored.shape != wanted.shape:
            what = f"is {list(stored.shape)} where {list(wanted.shape)} is expected"
            findings.add(wanted.check, key, what)
        elif stored.dtype != wanted.dtype and not trained:
            findings.add(wanted.check, key, f"is {stored.dtype} where {wanted.dtype} is expected")
        else:
            comparable.add(key)
    for key in moe.tensors:
        made_by_training = names.TRAINING_STATE.match(key) or names.split_key(key)[0] in names.BALANCING
        if key not in expected and not (trained and made_by_training):
            findings.add("metadata", key, "has no place in this Mixture-of-Experts")
    return comparable


def check_ranges(moe: Checkpoint, whole_files: Iterable[str], findings: Findings) -> None:
    """Find chunks that overlap in part, and bytes of ``whole_files`` that belong to no chunk."""
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


def check_objects(verification: Verification) -> dict[Blob, bytes]:
    """Compare extra states with the dense model's; return the identities of all objects' bytes."""
    moe, plan, findings = verification.moe, verification.plan, verification.findings
    dense = plan.source
    kept = {key for key in plan.kept if key in dense.objects}
    wanted = {key for key, target in plan.makes().items() if target is None} - {COMMON_STATE}

    def fault(key: str, blob: Blob) -> str | None:
        if key in kept:
            same = moe.read_blob(blob) == dense.read_blob(dense.objects[key])
            return None if same else "differs from the dense model's"
        if key not in wanted:
            return "has no place in this Mixture-of-Experts"
        return None if torch_save_file.load(moe.read_blob(blob), key) == [None] else "is not empty"

    identities: dict[Blob, bytes] = {}
    for key, blob in moe.objects.items():
        try:
            if blob not in identities:
                identities[blob] = torch_save_file.examine(moe.iteration_dir, blob).identity
            if key != COMMON_STATE and not verification.trained and (what := fault(key, blob)):
                findings.add("states", key, what)
        except (torch_save_file.Damaged, UserError, OSError) as error:
            findings.add("damage", key, f"{blob.file}, {blob.length} bytes at {blob.offset}: {error}")
    if not verification.trained:
        for key in sorted(wanted - set(moe.objects)):
            findings.add("states", key, "is missing")
    return identities


def check_files(verification: Verification, identities: Mapping[Blob, bytes]) -> None:
    """Check sizes and digests of the files that the manifest records, and find files that it does not."""
    moe, findings = verification.moe, verification.findings
    new, linked = verification.recorded_files("files"), verification.recorded_files("linked")
    digests = content_digests(identities)
    recorded = {moe.root / name: entry for name, entry in (new | linked).items()}
    for path, entry in recorded.items():
        name = path.name
        if not path.is_file():
            findings.add("files", name, "is missing")
        elif path.stat().st_size != entry.get("bytes"):
            what = f"has {path.stat().st_size} bytes where the manifest says {entry.get('bytes')}"
            findings.add("files", name, what)
        elif "sha256" in entry:
            if sha256(path) != entry["sha256"]:
                findings.add("files", name, "is not the file whose SHA-256 the manifest records")
        elif digests.get(name) != entry.get("content"):
            findings.add("files", name, "its chunks are not those whose digest the manifest records")
    for path in sorted(moe.iteration_dir.iterdir()):
        if path not in recorded:
            findings.add("files", path.name, "is not in the manifest")
    findings.looked_at["files"] = f"{len(new)} new, {len(linked)} linked"


def check_arguments(verification: Verification) -> None:
    """Compare the common state with the one that convert writes; after training, only the architecture."""
    moe, plan, findings = verification.moe, verification.plan, verification.findings
    try:
        args = vars(moe.args)
        fresh = fresh_common_state(plan.dense, plan.arguments)
    except UserError as error:
        findings.add("arguments", COMMON_STATE, str(error))
        return
    if verification.trained:  # training does not change these
        dense = vars(plan.dense.args)
        kept = [*(dense_model.ARCHITECTURE | dense_model.NEGATED).values(), "num_query_groups"]
        wanted = {name: dense[name] for name in kept if dense.get(name) is not None}
        wanted |= {name: value for name, value in plan.arguments.items() if name not in PLAIN}
        args = {name: value for name, value in args.items() if name in wanted}
    else:
        # Defaults that convert adds where the dense run recorded nothing; older conversions lack them.
        defaults = dense_model.MODEL_DEFAULTS | dense_model.BUILD_DEFAULTS
        added = defaults.keys() - vars(plan.dense.args).keys() - args.keys()
        wanted = {name: value for name, value in vars(fresh["args"]).items() if name not in added}
        states = ({name: state[name] for name in state.keys() - VERSIONS} for state in (moe.common, fresh))
        _compare(findings, *states)
    _compare(findings, args, wanted)
    findings.looked_at["arguments"] = f"{len(wanted)} arguments"


def _compare(findings: Findings, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in sorted(found.keys() | wanted.keys(), key=str):
        if name not in found:
            findings.add("arguments", name, "is missing")
        elif name not in wanted:
            findings.add("arguments", name, "has no place there")
        elif repr(found[name]) != repr(wanted[name]):
            what = f"is {found[name]!r:.60} where {wanted[name]!r:.60} is expected"
            findings.add("arguments", name, what)


def check_gone_experts(verification: Verification) -> None:
    """Hold the experts of a model that is gone, or changed since, against the digest of its values."""
    moe, plan, findings = verification.moe, verification.plan, verification.findings
    recorded = verification.record.get("experts") or []
    gone = [number for number, source in enumerate(plan.experts) if source is None]
    if not gone or verification.trained:
        return
    said = f"{len(gone)} of {len(recorded)} models of --experts are gone or have changed"
    if plan.options.average_rest:
        findings.skipped["untouched"] = findings.skipped["norms"] = said
    if plan.options.router.granularity > 1:
        findings.skipped["experts"] = f"{said}, and the digests are of whole FFNs"
        return
    for expert in range(plan.options.router.num_experts):
        number = expert % len(recorded)
        if number in gone and values_digest(moe, expert) != recorded[number].get("values"):
            what = f"is not the FFN of {recorded[number].get('path')}, whose digest the manifest records"
            findings.add("experts", names.EXPERTS, what, expert=expert)
    findings.looked_at["experts"] += f"; {said}: held against the recorded digests"


def check_manifest(verification: Verification) -> None:
    """Compare the manifest's architecture and digest with the dense checkpoint."""
    plan, findings = verification.plan, verification.findings
    recorded, flags = verification.section("model"), plan.flags
    for flag in sorted({*recorded, *flags}):
        if recorded.get(flag) != flags.get(flag):
            what = f"manifest says {recorded.get(flag)!r:.60}, DENSE {flags.get(flag)!r:.60}"
            findings.add("arguments", flag, what)
    if verification.section("source").get("digest") != plan.dense.digest():
        what = "is not the checkpoint whose digest the manifest records"
        findings.add("arguments", f"DENSE {plan.dense.root}", what)
