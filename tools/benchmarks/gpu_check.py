"""Check in a few minutes that training on a GPU is correct, and measure a step and its parts.

    python tools/benchmarks/gpu_check.py [--parts parallel transformer-engine steps train kernels]
                                         [--output DIR] [--quick]

Only this project and its dependencies must be importable (PYTHONPATH); no data or virtual environment is
needed. The parts run in the order of their worth, nine minutes in all, each with a time limit of its own. As
each check ends a line is printed and the page is written; a failure does not stop the others.

parallel  A small upcycled model trains at EP 2, DP 2 and TP 2, in bfloat16 and float32, with overlapped
          communication, held against one rank's losses; saved at EP 2, it resumes at EP 1. Both ranks share a
          GPU where there is one only, by NCCL 2.30 or later (preload it where torch brings an older one:
          LD_PRELOAD); failing that they talk over Gloo, and the page says which.
transformer-engine
          Training and a step with it, beside the same without, where it is installed.
steps     bench_step.py eager and in CUDA graphs, in turns, with micro-batches of 4 and 8, and with
          other kernels that are installed, each by itself (bench_step.py --try).
train     The small model trains for 12 steps: with and without CUDA graphs, which must have equal losses
          and routing statistics, and with and without Transformer Engine. Losses are compared with the CPU's.
          Runs that are saved during training and stopped at step 6 must resume with the same losses, also
          when they switch to or from Transformer Engine. Exports must have the same loss in transformers.
kernels   Each kernel of this project against its plain form, then bench_router.py and bench_collect_keys.py.

DIR gets report.json, report.md (one page), and logs/ with the output of each process. A later call with the
same DIR keeps the parts that were ok there (with --anew none of them) and runs the others, so that two short
calls make one page. Without a GPU all sizes are small (--quick), and the page lists what could not be run.
"""

import json
import platform
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import measuring
from gpu_check_jobs import FAILED, NOT_RUN, OK, OVER, ROOT, Check, Part, shown
from gpu_check_parallel import parallel
from gpu_check_speed import kernels, steps, transformer_engine
from gpu_check_training import AGREE, train

# Seconds: of all parts together, and of each at most, in the order in which they run.
WHOLE = 540
LIMITS = {"parallel": 170, "transformer-engine": 110, "steps": 200, "train": 150, "kernels": 150}
PROBE = """
import importlib, importlib.metadata, json, os, torch
found = {"gpu": torch.cuda.is_available(), "torch": torch.__version__, "cuda": torch.version.cuda, "why": {}}
if found["gpu"]:
    properties = torch.cuda.get_device_properties(0)
    found["hardware"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    found["count"] = torch.cuda.device_count()
    found["cudnn"] = torch.backends.cudnn.version()
    found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
for name in ("transformer_engine.pytorch", "transformers", "triton"):
    try:
        importlib.import_module(name)
    except Exception as error:
        found["why"][name.partition(".")[0]] = f"{type(error).__name__}: {str(error)[:200]}"
for name in ("megatron-core", "transformer-engine", "transformers", "triton"):
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        found[name] = None
print(json.dumps(found))
"""
VERSIONS = (
    *("python", "torch", "cuda", "cudnn", "nccl", "megatron-core", "transformer-engine", "transformers"),
    "triton",
)
PARTS: dict[str, Callable[[Part], None]] = dict(
    zip(LIMITS, (parallel, transformer_engine, steps, train, kernels), strict=True)
)


def probe() -> dict[str, Any]:
    """Hardware and versions of this machine, found in a separate process."""
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:
        raise SystemExit(f"error: PyTorch cannot be imported here: {done.stderr.strip()[-500:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    why = found["why"].get("transformer_engine")
    found["te"] = found["gpu"] and why is None
    found["no_te"] = f"cannot be imported ({why})" if found["gpu"] else "no GPU"
    found.setdefault("hardware", measuring.processor())
    found["python"] = platform.python_version()
    return found


def page(found: dict[str, Any]) -> str:
    """The report as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items() if version)
    limits = ", ".join(f"{limit:.0e} from {name}" for name, limit in found["tolerances"].items())
    lines = [
        *("# GPU check", "", f"- Hardware: {found['hardware']}", f"- Versions: {versions}"),
        *(f"- Commit: {found['commit']}", f"- Command: `{found['command']}`"),
        f"- Size: {found['size']}; {found['seconds']:.0f} s in all",
        f"- Losses agree where they differ by no more than (relative, any step): {limits}",
    ]
    for name, part in found["parts"].items():
        took = f"{part['seconds']:.0f} of {part['limit']:.0f} s" + ("" if part["ended"] else ", not ended")
        took += f", by an earlier `{part['command']}`" if "command" in part else ""
        lines += ["", f"## {name}: {part['outcome']} ({took})", ""]
        lines += ["| what | outcome | s | figures |", "|---|---|---|---|"]
        for check in part["checks"]:
            figures = shown(check["figures"])
            if losses := check["figures"].get("losses"):
                figures.append(f"loss {losses[0]:.4f} to {losses[-1]:.4f}")
            said = "; ".join(filter(None, [*figures, check["note"]])).replace("|", "\\|")
            lines.append(f"| {check['name']} | {check['outcome']} | {check['seconds']:.0f} | {said} |")
    lines += ["", "## Not run", ""]
    lines += [f"- {entry['what']}: {entry['why']}" for entry in found["not_run"]] or ["Everything was run."]
    return "\n".join(lines) + "\n"


def run(options: Namespace) -> dict[str, Any]:
    begin = time.monotonic()
    machine = probe()
    options.quick = options.quick or not machine["gpu"]
    print(f"{machine['hardware']}; {'small' if options.quick else 'full'} size", flush=True)
    found: dict[str, Any] = {
        "hardware": machine["hardware"],
        "versions": {name: machine.get(name) for name in VERSIONS},
        "commit": options.commit or measuring.commit(),
        "command": shlex.join(["python", *sys.argv]),
        "size": "small" if options.quick else "full",
        "tolerances": AGREE,
    }
    kept = {} if options.anew else earlier(options.output, found)
    found |= {"parts": kept, "seconds": 0.0}
    limits = LIMITS | {name: float(seconds) for name, seconds in options.limit}
    (options.output / "logs").mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=options.work) as work:
        for name in (name for name in PARTS if name in options.parts and name not in kept):
            if (left := options.seconds - (time.monotonic() - begin)) <= 0:
                print(f"{name}: no time is left for it (--seconds)", flush=True)
                continue
            part = Part(name, min(limits[name], left), options, machine, Path(work))
            part.tell = partial(write, options.output, found, part, begin)
            try:
                PARTS[name](part)
            except Exception as error:  # any error; the other parts still run
                part.add(Check("this part's own steps", FAILED, note=f"{type(error).__name__}: {error}"))
            part.missing += [(check.name, check.note) for check in part.checks if check.outcome == NOT_RUN]
            result = write(options.output, found, part, begin, ended=True)
            print(f"{name}: {result['outcome']}, {result['seconds']:.0f} s", flush=True)
    return found


def earlier(output: Path, found: dict[str, Any]) -> dict[str, Any]:
    """The parts that an earlier call in ``output`` ended well, at the same size and commit."""
    try:
        before = json.loads((output / "report.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    if any(before.get(name) != found[name] for name in ("hardware", "versions", "commit", "size")):
        print(f"{output}: of another machine, version or commit; all parts are run", flush=True)
        return {}
    kept = {
        name: part
        for name, part in before["parts"].items()
        if part["outcome"] == OK and part["ended"] and OVER not in [entry["why"] for entry in part["missing"]]
    }
    for name, part in kept.items():
        part.setdefault("command", before["command"])
        print(f"{name}: ok in an earlier call", flush=True)
    return kept


def write(
    output: Path, found: dict[str, Any], part: Part, begin: float, ended: bool = False
) -> dict[str, Any]:
    """Write the report with ``part`` as it stands, in case the machine is taken away."""
    result: dict[str, Any] = part.result() | {"ended": ended}
    found["parts"] = {
        n: {**found["parts"], part.name: result}[n] for n in PARTS if n in {*found["parts"], part.name}
    }
    found["seconds"] = time.monotonic() - begin
    absent = [
        {"what": name, "why": "not asked for (--parts), or not yet"}
        for name in PARTS
        if name not in found["parts"]
    ]
    found["not_run"] = absent + [entry for each in found["parts"].values() for entry in each["missing"]]
    measuring.write_json(output / "report.json", found)
    (output / "report.md").write_text(page(found), encoding="utf-8")
    return result


def main() -> int:
    parser = measuring.Parser(__doc__)
    add = parser.add_argument
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--output", metavar="DIR", type=Path, default=Path("bench/gpu_check"))
    add("--anew", action="store_true", help="run parts again that were ok in an earlier call with this DIR")
    add("--seconds", type=float, default=WHOLE, help=f"of all parts together (default: {WHOLE})")
    add("--quick", action="store_true", help="small sizes (always without a GPU)")
    limits = f"of a part (default: {', '.join(f'{name} {seconds}' for name, seconds in LIMITS.items())})"
    add("--limit", nargs=2, action="append", default=[], metavar=("PART", "SECONDS"), help=limits)
    add("--commit", help="the commit to name in the report, if there is no git")
    add("--work", type=Path, metavar="DIR", help="for checkpoints (default: a temporary folder)")
    options = parser.parse_args()
    options.output = options.output.absolute()
    if unknown := [name for name, _ in options.limit if name not in PARTS]:
        parser.error(f"--limit {unknown[0]}: the parts are {', '.join(PARTS)}")
    if wrong := [one for _, one in options.limit if not re.fullmatch(r"\d+(\.\d+)?", one)]:
        parser.error(f"--limit {wrong[0]}: give a number of seconds")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    found = run(options)
    print(f"wrote {options.output / 'report.md'} and report.json")
    return int(any(part["outcome"] == FAILED for part in found["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
