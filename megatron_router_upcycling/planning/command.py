"""``router-upcycle plan``: a run on paper."""

import json
from pathlib import Path

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.planning import reading, report, setup
from megatron_router_upcycling.planning.figures import Plan


def run(
    config: Path | None,
    load: Path | None,
    flags: list[str],
    gpus: int,
    gpu_memory_gib: float,
    peak_tflops: float,
    as_json: bool,
) -> str:
    """The plan as text or JSON.

    Raises:
        UserError: the files or flags cannot be read, or the layout cannot work or does not fit.
    """
    described = reading.read(config, load, flags, gpus)
    setup.check(described)
    plan = Plan(described)
    if problem := report.too_large(plan, gpu_memory_gib):
        raise UserError(problem)
    if as_json:
        return json.dumps(report.as_json(plan, gpu_memory_gib, peak_tflops), indent=2)
    return report.describe(plan, gpu_memory_gib, peak_tflops)
