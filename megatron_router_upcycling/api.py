"""The public functions. Each does what the command of the same name does; mistakes raise ``UserError``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_router_upcycling.conversion import convert
from megatron_router_upcycling.conversion.options import Options
from megatron_router_upcycling.diagnostics import checkpoint as description
from megatron_router_upcycling.diagnostics import routing_start
from megatron_router_upcycling.diagnostics.stored_router import Router as Router
from megatron_router_upcycling.diagnostics.stored_router import load_router as load_router
from megatron_router_upcycling.errors import UserError as UserError
from megatron_router_upcycling.growth import plan as growth
from megatron_router_upcycling.hf import exporter
from megatron_router_upcycling.routers.config import RouterConfig as RouterConfig
from megatron_router_upcycling.verify import proof
from megatron_router_upcycling.verify.findings import Findings

type Files = str | Path | Sequence[str | Path] | None


def convert_checkpoint(
    dense: str | Path,
    out: str | Path,
    router: RouterConfig | None = None,
    key_stats: Files = None,
    allow_no_export: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Make a Mixture-of-Experts checkpoint of a dense one, as ``router-upcycle convert`` does.

    Args:
        dense: root folder of the dense model's checkpoint.
        out: root folder to make; it appears whole or not at all.
        router: default: the paper's mixture of 8 routers over 8 experts, top 2.
        key_stats: the file that ``collect_keys`` wrote, or one of each text; a mixture needs it.
        allow_no_export: convert even if the result cannot be exported.
        options: fields of ``conversion.options.Options``: ``seed``, ``materialize``, ``overwrite``,
            ``experts``, ``average_rest``, ``shared_expert``, ``layers``, ``init``.

    Returns:
        The manifest, which is also in ``out``, in ``router_upcycling.json``.

    Example:
        >>> linear = RouterConfig(router="linear", num_experts=8, top_k=2)
        >>> convert_checkpoint("ckpt/dense", "ckpt/moe", linear, overwrite=True)
    """
    asked = Options(router=router or RouterConfig(), key_stats=_paths(key_stats), **options)
    ready = convert.prepare(dense, out, asked)
    if not allow_no_export:
        exporter.check_conversion(ready)
    return convert.convert(ready)


def add_experts(
    moe: str | Path, out: str | Path, num_experts: int, allow_no_export: bool = False, **options: Any
) -> dict[str, Any]:
    """Make a Mixture-of-Experts of ``num_experts`` of one with fewer, as ``router-upcycle convert`` does.

    Args:
        moe: root folder of its checkpoint, a conversion's, an import's or a run's.
        options: fields of ``growth.plan.MoreExperts``: ``top_k``, ``duplicate``, ``router_noise``,
            ``keep_function``; of ``conversion.options.Options``: ``seed``, ``materialize``, ``overwrite``.

    Example:
        >>> add_experts("ckpt/moe", "ckpt/more", 16, seed=1)
    """
    asked = {name: options.pop(name) for name in ("seed", "materialize", "overwrite") if name in options}
    ready = growth.prepare(moe, out, growth.MoreExperts(num_experts, **options), **asked)
    if not allow_no_export:
        exporter.check_conversion(ready)
    return convert.convert(ready)


def verify_checkpoint(dense: str | Path, moe: str | Path, key_stats: Files = None) -> Findings:
    """Recompute the conversion of the dense checkpoint and compare the upcycled one with it bit for bit.

    Args:
        key_stats: the file that the routers were made from; default: the one that the manifest names.

    Returns:
        All differences; falsy if there are none. ``table()`` describes them.

    Example:
        >>> findings = verify_checkpoint("ckpt/dense", "ckpt/moe")
        >>> assert not findings, findings.table()
    """
    return proof.run(proof.prepare(dense, moe, _paths(key_stats)))


def inspect_checkpoint(checkpoint: str | Path, key_stats: Files = None) -> str:
    """Describe a checkpoint and how its routers would start, as ``router-upcycle inspect`` does.

    Args:
        checkpoint: root folder of any checkpoint, dense or upcycled.
        key_stats: a file whose hidden states are routed; default: the manifest's, else random states.

    Example:
        >>> print(inspect_checkpoint("ckpt/moe"))
    """
    routing = routing_start.describe(Path(checkpoint), _paths(key_stats))
    return "\n\n".join(part for part in (description.describe(checkpoint), routing) if part)


def _paths(files: Files) -> tuple[Path, ...]:
    every = () if files is None else (files,) if isinstance(files, str | Path) else files
    return tuple(map(Path, every))
