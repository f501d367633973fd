"""Break down a training step's time: kernel time by part of the model, launches, and the gap to wall time.

In the forward pass a kernel belongs to the innermost labelled module that runs; in the backward pass to the
module of the forward operation with the same sequence number in PyTorch's profiler. Other kernels are
classified by name. On the CPU, which has no kernels, an operation's own time is used instead.
"""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch

LABEL = "part: "
# Part -> names of its modules (the last component).
MODULES = {
    "attention": ("core_attention",),
    "attention's projections": ("self_attention", "linear_qkv", "linear_proj"),
    "experts": ("experts",),
    "routers": ("router",),
    "dispatch": ("mlp",),
    "norms": ("input_layernorm", "pre_mlp_layernorm", "final_layernorm", "q_layernorm", "k_layernorm"),
    "head and loss": ("output_layer",),
    "embedding": ("embedding",),
}
# Part -> words in the names of kernels or operations, for those outside of the modules above.
WORDS = {
    "head and loss": ("_loss", "cross_entropy", "CrossEntropy", "nll"),
    "norms": ("rms_norm", "RMSNorm"),
    "rotary embedding": ("_rotary", "rope", "Rotate"),
    "gradients and optimizer": (
        "AccumulateGrad",
        "Optimizer",
        "c10d",
        "nccl",
        "multi_tensor",
        "_vector_norm",
    ),
}
KERNEL_WORDS = {"rotary embedding": ("_rotary", "rope")}
OTHER = "residuals, gradient buffers and other"
IN_GRAPHS = "layers in CUDA graphs, and other"  # kernels of a replay cannot be attributed to modules


def label(model: list[torch.nn.Module]) -> list[Any]:
    """Mark each module of ``MODULES`` in profiles; returns the hooks, which the caller must remove."""
    part_of = {name: part for part, names in MODULES.items() for name in names}
    hooks: list[Any] = []
    for chunk in model:
        for path, module in chunk.named_modules():
            if (part := part_of.get(path.rpartition(".")[2])) is None:
                continue
            ranges: list[Any] = []

            def begin(module: Any, inputs: Any, part: str = part, ranges: list[Any] = ranges) -> None:
                ranges.append(torch.autograd.profiler.record_function(LABEL + part).__enter__())

            def end(module: Any, inputs: Any, output: Any, ranges: list[Any] = ranges) -> None:
                ranges.pop().__exit__(None, None, None)

            hooks += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
    return hooks


def measure(
    step: Callable[[], object], model: list[torch.nn.Module], runs: int = 3, labelled: bool = True
) -> dict[str, Any]:
    """Profile one step; time ``runs`` more without the profiler.

    Args:
        labelled: False for a model in CUDA graphs, whose layers are reported as one part.

    Returns:
        ``wall_ms``, ``kernel_ms`` (their sum), ``launches``, ``gap`` (wall time over kernel time, less 1;
        None on the CPU) and ``parts`` in ms, the largest first.
    """
    on_gpu = torch.cuda.is_available()
    wall = []
    for _ in range(runs):
        start = _now()
        step()
        wall.append((_now() - start) * 1e3)
    hooks = label(model) if labelled else []
    activities = [torch.profiler.ProfilerActivity.CPU]
    if on_gpu:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    try:
        with torch.profiler.profile(activities=activities, acc_events=True) as profile:
            step()
            _now()
    finally:
        for hook in hooks:
            hook.remove()
    parts, times, counts = _attribute(profile.events(), on_gpu)
    if not labelled:
        parts[IN_GRAPHS] = parts[OTHER]
        del parts[OTHER]
    total = sum(parts.values())
    middle = sorted(wall)[len(wall) // 2]
    return {
        "wall_ms": middle,
        "kernel_ms": total,
        "launches": counts.total(),
        "gap": middle / total - 1 if on_gpu and total else None,
        "parts": dict(parts.most_common()),
        "kernels": {name: [milliseconds, counts[name]] for name, milliseconds in times.most_common(40)},
    }


def _now() -> float:
    """The time in seconds, after waiting for the GPU if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def _attribute(events: Any, on_gpu: bool) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Milliseconds by part of the model and by kernel, and how often each kernel was launched."""
    forward: dict[int, str] = {}  # an operation's number -> its part
    for event in events:
        if event.sequence_nr >= 0 and not _is_backward(event) and (part := _label_of(event)):
            forward.setdefault(event.sequence_nr, part)
    parts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for event in events:
        if not str(event.device_type).endswith("CPU"):
            continue
        own = [(kernel.name, kernel.duration / 1e3) for kernel in event.kernels]
        if not on_gpu:
            own = [] if event.name.startswith(LABEL) else [(event.name, event.self_cpu_time_total / 1e3)]
        for name, milliseconds in own:
            parts[_part(event, name, forward)] += milliseconds
            times[name] += milliseconds
            counts[name] += 1
    return parts, times, counts


def _ancestors(event: Any) -> Any:
    while event is not None:
        yield event
        event = event.cpu_parent


def _label_of(event: Any) -> str | None:
    return next((e.name[len(LABEL) :] for e in _ancestors(event) if e.name.startswith(LABEL)), None)


def _is_backward(event: Any) -> bool:
    return any("evaluate_function" in e.name for e in _ancestors(event))


def _part(event: Any, kernel: str, forward: dict[int, str]) -> str:
    for part, own_words in KERNEL_WORDS.items():
        if any(word in kernel for word in own_words):
            return part
    names = [kernel]
    for ancestor in _ancestors(event):
        if ancestor.name.startswith(LABEL):
            return ancestor.name[len(LABEL) :]
        names.append(ancestor.name)
        if "evaluate_function" in ancestor.name and ancestor.sequence_nr in forward:
            return forward[ancestor.sequence_nr]
    for part, words in WORDS.items():
        if any(word in name for word in words for name in names):
            return part
    return OTHER


def report(found: dict[str, Any]) -> str:
    gap = "" if found["gap"] is None else f", gap {found['gap']:.1%}"
    wall, kernels, launches = found["wall_ms"], found["kernel_ms"], found["launches"]
    lines = [f"step {wall:.1f} ms, kernels {kernels:.1f} ms in {launches} launches{gap}"]
    for part, milliseconds in found["parts"].items():
        lines.append(f"{milliseconds:10.2f} ms {milliseconds / max(found['kernel_ms'], 1e-9):7.2%}  {part}")
    return "\n".join(lines)
