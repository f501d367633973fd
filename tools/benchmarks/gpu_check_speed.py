"""gpu_check.py's parts "steps" and "kernels": measure steps, and check and measure kernels."""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gpu_check_jobs import GRAPHS, HERE, Job, Part, engines, from_run

# Flags for a small step of bench_step.py: for the default model on a GPU (True), and on the CPU (False).
QUICK_STEPS = {
    True: "--num-layers 2 --hidden-size 256 --ffn-hidden-size 512 --num-attention-heads 4"
    " --num-query-groups 4 --kv-channels 64 --vocab-size 1024 --padded-vocab-size 1024"
    " --rehearse-seq-length 256 --rounds 2",
    False: "--num-layers 2 --vocab-size 256 --rehearse-seq-length 32 --gpus 4 --rounds 1",
}


def steps(part: Part) -> None:
    on_gpu = part.machine["gpu"]
    if not on_gpu:
        part.cannot("steps of micro-batch 8 and in CUDA graphs, utilisation, kernel time", "no GPU")
    if not part.machine["te"]:
        part.cannot("steps with Transformer Engine", part.machine["no_te"])
    jobs: list[tuple[str, Job, Path]] = []
    sizes = (4, 8) if on_gpu else (4,)
    for engine in engines(part.machine):
        for graphs in (False, True) if on_gpu else (False,):
            for size in sizes:
                name = f"{engine.name}{', CUDA graphs' if graphs else ''}, micro-batch {size}"
                output = part.work / f"{name}.json"
                flags: list[object] = ["--output", output, "--micro-batch-size", size]
                flags += ["--ddp-average-in-collective"] if on_gpu else []
                flags += [*GRAPHS, "--routers", "mixture"] if graphs else []
                flags += shlex.split(QUICK_STEPS[on_gpu]) if part.quick else []
                job = Job(part, f"step {name}", HERE / "bench_step.py", *flags, hide_te=engine.hide_te)
                jobs.append((name, job, output))
    for number, (name, job, output) in enumerate(in_turn(jobs, hold=on_gpu)):
        left = len(jobs) - number
        done = job.run(max(60.0, part.left() - 25 * (left - 1)))  # leave time for the jobs to come
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
