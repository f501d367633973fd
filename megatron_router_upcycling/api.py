"""What a Python script needs: a few calls that do what the commands of the same names do.

``megatron_router_upcycling`` itself offers all of this, and imports it when it is first asked for.
"""

from pathlib import Path
from typing import Any

from megatron_router_upcycling.conversion import convert
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.diagnostics import checkpoint as description
from megatron_router_upcycling.diagnostics import routing_start
from megatron_router_upcycling.diagnostics.stored_router import Router, load_router
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.hf import exporter
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.verify import proof
from megatron_router_upcycling.verify.findings import Findings

__all__ = [
    "Router",
    "RouterConfig",
    "UserError",
    "convert_checkpoint",
    "inspect_checkpoint",
    "load_router",
    "verify_checkpoint",
]


def convert_checkpoint(
    dense: str | Path,
    out: str | Path,
    router: RouterConfig | None = None,
    key_stats: str | Path | None = None,
    allow_no_export: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Make a Mixture-of-Experts checkpoint of a dense one, as ``router-upcycle convert`` does.

    Args:
        dense: root folder of the dense model's checkpoint.
        out: root folder to make; it is there whole or not at all.
        router: default: the paper's mixture of 8 routers over 8 experts, 2 of them a token.
        key_stats: the file that ``collect_keys`` wrote; a mixture needs it.
        allow_no_export: convert what options make impossible to export as well.
        options: fields of ``conversion.options.Options``: ``seed``, ``materialize``, ``overwrite``,
            ``shared_expert``, ``layers``, ``init``.

    Returns:
        The manifest, which ``router_upcycling.json`` in ``out`` holds too.

    Raises:
        UserError: an input is not what it must be, or ``out`` cannot be written.

    Example:
        >>> linear = RouterConfig(router="linear", num_experts=8, top_k=2)
        >>> convert_checkpoint("ckpt/dense", "ckpt/moe", linear, overwrite=True)
    """
    file = None if key_stats is None else Path(key_stats)
    asked = Options(router=router or RouterConfig(), key_stats=file, **options)
    ready = convert.prepare(dense, out, asked)
    if not allow_no_export:
        exporter.check_conversion(ready)
    return convert.convert(ready)


def verify_checkpoint(dense: str | Path, moe: str | Path, key_stats: str | Path | None = None) -> Findings:
    """Read both checkpoints and find all in which the second is not what the first makes of it.

    Args:
        key_stats: what the routers were made from; default: the file that the manifest names.

    Returns:
        All differences; false where there are none. ``table()`` says them in words.

    Raises:
        UserError: not a dense checkpoint and an upcycled one, or the key statistics are gone.

    Example:
        >>> findings = verify_checkpoint("ckpt/dense", "ckpt/moe")
        >>> assert not findings, findings.table()
    """
    return proof.run(proof.prepare(dense, moe, None if key_stats is None else Path(key_stats)))


def inspect_checkpoint(checkpoint: str | Path, key_stats: str | Path | None = None) -> str:
    """Say what a checkpoint is and how its routers would start, as ``router-upcycle inspect`` does.

    Args:
        checkpoint: root folder of any checkpoint, dense or upcycled.
        key_stats: a file whose samples of hidden states are routed; default: the one that is recorded,
            else random ones.

    Raises:
        UserError: no whole checkpoint there, or ``key_stats`` does not fit.

    Example:
        >>> print(inspect_checkpoint("ckpt/moe"))
    """
    routing = routing_start.describe(Path(checkpoint), None if key_stats is None else Path(key_stats))
    return "\n\n".join(part for part in (description.describe(checkpoint), routing) if part)
