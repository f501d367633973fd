"""gpu_check.py's parts that measure: "transformer-engine", "steps" and "kernels"."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import candidates
from gpu_check_jobs import EAGER, GRAPHS, HERE, OVER, Check, Engine, Job, Part, at_once, engines, from_run
from gpu_check_training import Training, held

# Flags for a small step of bench_step.py: for the default model on a GPU (True), and on the CPU (False).
QUICK_STEPS = {
    True: "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4"
    " --num-query-groups 4 --kv-channels 64 --vocab-size 1024 --padded-vocab-size 1024"
    " --rehearse-seq-length 256 --rounds 2",
    False: "--num-layers 2 --vocab-size 256 --rehearse-seq-length 32 --gpus 4 --rounds 1",
}


SIZES = (4, 8)  # sequences of a micro-batch
START = 25  # seconds in which a process starts and builds the model


def steps(part: Part) -> None:
    """Before (eager) and after (in CUDA graphs, which a run gets by itself), in turns, twice if it can."""
    on_gpu, engine = part.machine["gpu"], engines(part.machine)[0]
    if not on_gpu:
        part.cannot("steps of micro-batch 8 and in CUDA graphs, utilisation, kernel time", "no GPU")
    kinds = {"eager": EAGER, "CUDA graphs": GRAPHS} if on_gpu else {"eager": EAGER}
    sizes = SIZES if on_gpu else SIZES[:1]
    variants = [Variant(f"{kind}, micro-batch {n}", engine, n, kinds[kind]) for n in sizes for kind in kinds]
    tried = []  # other kernels, each beside the first variant's
    for name in candidates.CANDIDATES if on_gpu else ():
        if package := candidates.missing(name):
            part.cannot(f"a step with {name}", f"{package} is not installed")
        elif name not in candidates.FOR_TESTS:
            flags = (*GRAPHS, "--try", name)
            tried.append(Variant(f"CUDA graphs and {name}, micro-batch 4", engine, 4, flags))
    again = [replace(variant, name=f"{variant.name}, again") for variant in variants]
    measure_steps(part, variants + tried + (again if on_gpu and not part.quick else []))
    found = {check.name: check.figures.get("mixture step ms") for check in part.checks}
    for name, ended in found.copy().items():
        before = found.get(name.replace("CUDA graphs", "eager"))
        if "CUDA graphs," in name and before and ended:
            part.add(Check(f"{name}: time over eager", figures={"ratio": ended / before}))


def transformer_engine(part: Part) -> None:
    """Training and a step with Transformer Engine, beside the same without, in one call."""
    if not part.machine["te"]:
        part.cannot("training and steps with Transformer Engine", part.machine["no_te"])
        return
    training = Training(part)
    if training.convert():
        kinds = engines(part.machine)
        jobs = {engine.name: training.job(f"train {engine.name}", engine) for engine in kinds}
        ran = at_once(jobs, training.workers)
        for engine in kinds:
            part.add(held(ran[engine.name], f"train {engine.name}", ran[kinds[0].name], "the plain run's"))
    plain, with_te = engines(part.machine)
    of = "micro-batch 4"
    variants = [
        Variant(f"{plain.name}, {of}", plain, 4, GRAPHS),
        Variant(f"{with_te.name}, {of}", with_te, 4, EAGER),
    ]
    measure_steps(part, [*variants, Variant(f"{with_te.name}, CUDA graphs, {of}", with_te, 4, GRAPHS)])


@dataclass(frozen=True)
class Variant:
    """A way to run a step: its engine, sequences in a micro-batch, and flags of bench_step.py."""

    name: str
    engine: Engine
    size: int
    flags: tuple[str, ...]


def measure_steps(part: Part, variants: list[Variant]) -> None:
    """Run bench_step.py for each variant, one after the other, for as long as the part has time."""
    on_gpu, jobs = part.machine["gpu"], []
    for variant in variants:
        output = part.work / f"{variant.name}.json"
        flags: list[object] = ["--output", output, "--micro-batch-size", variant.size, *variant.flags]
        flags += ["--ddp-average-in-collective"] if on_gpu else []
        flags += ["--routers", "mixture"] if variant.flags[:2] == GRAPHS else []
        flags += shlex.split(QUICK_STEPS[on_gpu]) if part.quick else []
        job = Job(
            part, f"step {variant.name}", HERE / "bench_step.py", *flags, hide_te=variant.engine.hide_te
        )
        jobs.append((variant.name, job, output))
    for number, (name, job, output) in enumerate(in_turn(jobs, hold=on_gpu)):
        if part.left() < START:
            part.cannot(f"step {name}", OVER)
            continue
        done = job.run(max(60.0, part.left() - START * (len(jobs) - number - 1)))  # time for those to come
        check = from_run(done, name)
        if check.ok:
            check.figures = step_figures(json.loads(output.read_text()))
        part.add(check)


def in_turn(jobs: list[tuple[str, Job, Path]], hold: bool) -> Iterator[tuple[str, Job, Path]]:
    """Yield jobs one by one, as they are timed; with ``hold`` the next one already imports its libraries."""
    try:
        for number, entry in enumerate(jobs):
            for _, soon, _ in jobs[number : number + 2] if hold else ():
                if soon.process is None:
                    soon.start(hold=True)
            yield entry
    finally:
        for _, job, _ in jobs:
            job.end()


def step_figures(found: dict[str, Any]) -> dict[str, Any]:
    """The figures that the page shows for a report of bench_step.py, and the report itself."""
    figures: dict[str, Any] = {}
    for kind, seconds in found["step_seconds"].items():
        profile, used = found["profiles"][kind], found["utilisation"][kind]
        parts = ", ".join(f"{part} {milliseconds:.2f}" for part, milliseconds in profile["parts"].items())
        figures |= {
            f"{kind} step ms": seconds * 1e3,
            f"{kind} kernels ms": profile["kernel_ms"],
            f"{kind} launches": profile["launches"],
            f"{kind} ms by part:": parts,
            f"{kind} gap": profile["gap"],
            f"{kind} utilisation": used,
            f"{kind} routers' share": found["router_share"][kind],
            f"{kind} peak GiB": found["peak_bytes"][kind] / 2**30,
        }
    if found["throughput_ratio"] is not None:
        figures["mixture over stock"] = found["throughput_ratio"]
    return figures | {"report": found}


def kernels(part: Part) -> None:
    on_gpu = part.machine["gpu"]
    place = "cuda" if on_gpu else "cpu"
    if "triton" in part.machine["why"]:
        part.cannot("kernels against their plain form", part.machine["why"]["triton"])
    else:
        if not on_gpu:
            part.cannot("compiled kernels", "no GPU; Triton's interpreter ran them")
        check_kernels(part, place)
    flags = ["--threads", 1] + (["--dtype", "bfloat16"] if on_gpu else [])
    few = ["--rounds", 5, "--tokens", 256, "--hidden-size", 256] if part.quick else []
    benchmark(part, "bench_router", router_figures, "--device", place, *flags, *few)
    few = ["--num-layers", 1, "--repeats", 3, "--warmup", 1] if part.quick else ["--repeats", 10]
    benchmark(part, "bench_collect_keys", key_figures, "--device", place, *few)


def check_kernels(part: Part, place: str) -> None:
    interpreter = {} if part.machine["gpu"] else {"TRITON_INTERPRET": "1"}
    done = Job(part, "kernel checks", "-m", "tests.layers.kernel_checks", place, **interpreter).run()
    check = from_run(done, "kernels against their plain form")
    lines = re.findall(r"^(\w+): (.+)$", done.output, re.MULTILINE)
    check.figures = {"equal": sum(said == "ok" for _, said in lines), "of": len(lines)}
    wrong = [f"{name}: {said}" for name, said in lines if said != "ok"]
    if check.ok and (wrong or not lines):
        check.fail("; ".join(wrong)[:1000] or "nothing was checked")
    part.add(check)


def benchmark(
    part: Part, name: str, figures: Callable[[dict[str, Any]], dict[str, Any]], *flags: object
) -> None:
    """Run a benchmark that prints one JSON object at its end."""
    done = Job(part, name, HERE / f"{name}.py", "--json", *flags).run()
    check, printed = from_run(done, name), re.search(r"^\{.*", done.output, re.MULTILINE | re.DOTALL)
    if check.ok and printed is None:
        check.fail("it printed no figures")
    elif check.ok and printed:
        found = json.loads(printed[0])
        check.figures = figures(found) | {"report": found}
    part.add(check)


def router_figures(found: dict[str, Any]) -> dict[str, Any]:
    result = next(iter(found["results"].values()))
    figures = {f"{name} ms": value * 1e3 for name, value in result["seconds"].items()}
    figures["folded over stock"] = result["ratio"]
    for name, profile in (result.get("kernels") or {}).items():
        figures |= {f"{name} kernels ms": profile["ms"], f"{name} launches": profile["launches"]}
    if "kernel_ratio" in result:
        figures["folded over stock, kernels"] = result["kernel_ratio"]
    return figures


def key_figures(found: dict[str, Any]) -> dict[str, Any]:
    return {"collecting over plain": found["ratio"], "plain s": found["plain_seconds"]}
