"""gpu_check.py's part "parallel": two ranks, held against one, over NCCL where it lets ranks share a GPU."""

import socket
from concurrent.futures import ThreadPoolExecutor, as_completed

from gpu_check_jobs import Done, Engine, Job, Part, at_once, from_run
from gpu_check_training import HALF, STEPS, Training, held

LAYOUTS = {
    "EP 2": ("--expert-model-parallel-size", 2),
    "DP 2": (),
    "TP 2": ("--tensor-model-parallel-size", 2, "--sequence-parallel"),
}
# NCCL from 2.30 on lets several ranks share a GPU when asked to: through its memory or, where processes may
# not share that, the host's, or sockets.
SHARED = {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
WAYS = {
    "NCCL": {},
    "NCCL without P2P": {"NCCL_P2P_DISABLE": "1"},
    "NCCL without P2P and shared memory": {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
}
# What Megatron asks of a backend: sums, gathers, scatters and all-to-all.
PROBE = """
import os, sys, torch
from torch import distributed
if (device := sys.argv[2]) == "cuda":
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
distributed.init_process_group(sys.argv[1])
rank = distributed.get_rank()
mine = torch.full((2,), 1.0 + rank, device=device)
other, both = mine.new_empty(2), mine.new_empty(4)
distributed.all_to_all_single(other, mine)
distributed.all_gather_into_tensor(both, mine)
distributed.reduce_scatter_tensor(mine, both)
distributed.all_reduce(mine)
assert (other.tolist(), both.tolist(), mine.tolist()) == ([1, 2], [1, 1, 2, 2], [6, 6]), (other, both, mine)
distributed.destroy_process_group()
"""
# Seconds on a GPU for a probe and for a run, since ranks that do not find each other wait for good.
PROBING, RUNNING = 25, 90


class Ranks:
    """A job in two processes, which share a GPU where there is one only; the last rank logs the losses."""

    def __init__(self, jobs: list[Job], limit: float | None) -> None:
        self.jobs, self.limit = jobs, limit

    @classmethod
    def of(
        cls, part: Part, name: str, environment: dict[str, str], *arguments: object, hide_te: bool = False
    ) -> "Ranks":
        own_gpu = not part.machine["gpu"] or part.machine["count"] > 1
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        jobs = []
        for rank in (0, 1):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank * own_gpu), "WORLD_SIZE": "2"}
            place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} | environment
            jobs.append(Job(part, f"{name} rank {rank}", *arguments, hide_te=hide_te, **place))
        return cls(jobs, RUNNING if part.machine["gpu"] else None)

    def run(self, limit: float | None = None) -> Done:
        failed = None
        with ThreadPoolExecutor(len(self.jobs)) as pool:
            running = [pool.submit(job.run, limit or self.limit) for job in self.jobs]
            for future in as_completed(running):
                if future.result().returncode != 0 and failed is None:
                    failed = future.result()
                    self.end()  # the other waits for it
        return failed or running[-1].result()

    def end(self) -> None:
        for job in self.jobs:
            job.end()


def find_way(part: Part) -> tuple[dict[str, str], tuple[str, ...]]:
    """The environment and the flags with which two ranks can talk; the page says which way that is."""
    device = "cuda" if part.machine["gpu"] else "cpu"
    shared = SHARED if device == "cuda" and part.machine["count"] == 1 else {}
    ways = {way: shared | own for way, own in WAYS.items()} if device == "cuda" else {}
    refusals = []
    for way, environment in (ways | {"Gloo": {}}).items():
        backend = "gloo" if way == "Gloo" else "nccl"
        pair = Ranks.of(part, f"probe {way}", environment, "-c", PROBE, backend, device)
        done = pair.run(PROBING if backend == "nccl" else None)
        if done.returncode == 0:
            break
        refusals.append(f"{way}: {done.reason()}")
    check = from_run(done, "two ranks that share one GPU" if shared else "two ranks", over=way)
    check.figures |= {"with": " ".join(environment)} if environment else {}
    check.figures |= {"refused": "; ".join(refusals)} if refusals else {}
    part.add(check)
    return environment, ("--distributed-backend", "gloo") if backend == "gloo" else ()


def parallel(part: Part) -> None:
    training = Training(part)
    if not training.convert():
        part.cannot("ranks that work together", "there is no converted model")
        return
    environment, backend = find_way(part)
    if not part.checks[-1].ok:
        part.cannot("ranks that work together", "no backend lets two ranks talk here")
        return
    plain = Engine("without TE", hide_te=part.machine["te"])
    saved = part.work / "EP 2"
    jobs: dict[str, Job | Ranks] = {}
    dtypes = ("bfloat16", "float32") if part.machine["gpu"] else ("float32",)  # the stricter one
    for dtype in dtypes:
        alone = jobs[f"one rank, {dtype}"] = training.job(f"one rank {dtype}", plain, *backend, dtype=dtype)
        for layout, own in LAYOUTS.items():
            name = f"{layout}, {dtype}"
            save = ("--save", saved, "--save-interval", HALF) if name == f"EP 2, {dtypes[0]}" else ()
            given = (*alone.arguments, *own, *save)
            jobs[name] = Ranks.of(part, name, environment, *given, hide_te=plain.hide_te)

    def tell(name: str, ran: dict[str, Done]) -> None:
        layout, dtype = name.split(", ")
        if layout == "one rank":
            part.add(from_run(ran[name], name, losses=list(ran[name].losses.values())))
        else:
            part.add(held(ran[name], name, ran[f"one rank, {dtype}"], f"one rank's, {dtype}"))

    ran = at_once(jobs, max(1, training.workers // 2), tell)
    # What was saved half-way at EP 2 goes on at EP 1.
    name, flags = "saved at EP 2, resumed at EP 1", (*backend, "--ckpt-step", HALF)
    done = training.job(name, plain, *flags, load=saved, dtype=dtypes[0]).run()
    whole, steps = ran[f"one rank, {dtypes[0]}"], range(HALF + 1, STEPS + 1)
    part.add(held(done, name, whole, f"one rank's, {dtypes[0]}", steps))
    if not part.machine["gpu"]:
        part.cannot(
            "two ranks on a GPU, NCCL, and communication that overlaps", "no GPU; Gloo on the CPU ran"
        )
