"""Megatron on CPU over Gloo. (Which flags differ there is decided by ``training.device.adapt``.)

Megatron-Core asks for CUDA by name: ``device='cuda'``, streams, events, memory statistics, the CUDA
random state. ``install()`` answers each of those requests with the CPU, so that the unmodified
``megatron.training`` loop runs where there is no GPU.
"""

import contextlib
import functools
import os
import queue
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from megatron_router_upcycling.training import device
from megatron_router_upcycling.training.patches import patching

CPU = torch.device("cpu")
FACTORIES = (
    "arange as_tensor empty empty_like empty_strided eye full full_like linspace ones ones_like rand"
    " rand_like randint randint_like randn randn_like randperm scalar_tensor tensor zeros zeros_like"
)
TENSOR_FACTORIES = "new_empty new_full new_ones new_tensor new_zeros"
# Functions of torch.cuda that do nothing on the CPU, and those that count nothing.
DO_NOTHING = (
    "_lazy_init check_error empty_cache manual_seed_all reset_peak_memory_stats set_device set_stream"
    " synchronize"
)
COUNT_NOTHING = "max_memory_allocated max_memory_reserved memory_allocated memory_reserved device_memory_used"

_replace = functools.partial(patching.replace, "cpu_backend")
_wrap = functools.partial(patching.wrap, "cpu_backend")


def install() -> None:
    """Bridge torch.cuda and Megatron to the CPU, before it builds anything; a second call changes nothing."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU backend was asked for on a machine with a GPU; use --device cuda")
    # Dynamo traces the bridge's Python functions without gain, and compiles for minutes on CPU.
    os.environ["TORCHDYNAMO_DISABLE"] = "1"
    if "torch._dynamo" in sys.modules:  # it has read that variable already
        torch._dynamo.config.disable = True
    # Megatron compiles functions as it is imported; importing the compiler would take a third of that time.
    _replace(torch, "compile", _uncompiled)
    _bridge_devices()
    _bridge_torch_cuda()
    # Gloo takes no CUDA device to bind a process group or a barrier to.
    for name, argument in (("init_process_group", "device_id"), ("barrier", "device_ids")):
        _wrap(torch.distributed, name, functools.partial(_with, {argument: None}))
    _bridge_megatron()


def _uncompiled(function: Any = None, **_: Any) -> Any:
    return _uncompiled if function is None else function


def _with(changes: dict[str, Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return original(*args, **kwargs | changes)


def _on_cpu(device: Any) -> Any:
    """The CPU for any way of naming a CUDA device; anything else as it is."""
    if isinstance(device, str | torch.device):
        return CPU if str(device).startswith("cuda") else device
    # torch.cuda.current_device() gives an integer, and so may reach us as a device.
    return CPU if isinstance(device, int) and not isinstance(device, bool) else device


def _with_device_on_cpu(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if kwargs.get("device") is not None:
        kwargs["device"] = _on_cpu(kwargs["device"])
    return original(*args, **kwargs)


def _move_to_cpu(to: Callable[..., Any], self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    if args and isinstance(args[0], str | int | torch.device):
        args = (_on_cpu(args[0]), *args[1:])
    return _with_device_on_cpu(to, self, *args, **kwargs)


def _named_as_on_cuda(
    tensor_type: Callable[..., Any], self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if dtype is not None:
        return tensor_type(self, dtype, *args, **kwargs)
    # Megatron's optimizers and gradient clipping accept 'torch.cuda.FloatTensor' and its kin only.
    return tensor_type(self).replace("torch.", "torch.cuda.", 1)


def _bridge_devices() -> None:
    """Let every tensor factory and every move take 'cuda' for the CPU."""
    for owner, names in ((torch, FACTORIES), (torch.Tensor, TENSOR_FACTORIES)):
        for name in names.split():
            _wrap(owner, name, _with_device_on_cpu)
    _wrap(torch.Tensor, "to", _move_to_cpu)
    _wrap(torch.Tensor, "type", _named_as_on_cuda)
    for owner, name in ((torch.Tensor, "cuda"), (torch.Tensor, "pin_memory"), (torch.nn.Module, "cuda")):
        _replace(owner, name, lambda self, *args, **kwargs: self)
    _replace(torch.Tensor, "record_stream", _always(None))


class _Event(torch.cpu.Event):
    """Of a device that does things in order, by the host's clock: waiting is always over."""

    seconds = 0.0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def record(self, *args: Any) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: "_Event") -> float:
        return (end.seconds - self.seconds) * 1e3  # milliseconds


class _Stream(_Event):
    wait_stream = wait_event = _Event.wait

    def record_event(self, event: _Event | None = None) -> _Event:
        event = event or _Event()
        event.record()
        return event


def _always(value: Any) -> Callable[..., Any]:
    """A function that gives ``value``; a new one each time: Dynamo tells functions apart by identity."""
    return lambda *args, **kwargs: value


def _bridge_torch_cuda() -> None:
    # From generation 10 on Megatron does not ask for CUDA_DEVICE_MAX_CONNECTIONS, which it refuses with FSDP.
    properties = SimpleNamespace(name="CPU", major=10, minor=0, multi_processor_count=0, total_memory=0)
    stream = _Stream()
    answers: dict[str, Any] = {
        **{name: _always(None) for name in DO_NOTHING.split()},
        **{name: _always(0) for name in COUNT_NOTHING.split()},
        "memory_stats": lambda *args, **kwargs: defaultdict(int),
        "current_device": _always(0),
        "device_count": _always(1),
        "get_device_capability": _always((0, 0)),
        "get_device_properties": _always(properties),
        "is_current_stream_capturing": _always(False),
        "current_stream": _always(stream),
        "default_stream": _always(stream),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "device": contextlib.nullcontext,  # a class, as torch's own: code asks isinstance() of it
        "Stream": _Stream,
        "Event": _Event,
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "initial_seed": lambda: torch.initial_seed(),
    }
    for name, answer in answers.items():
        _replace(torch.cuda, name, answer)
    for owner in (torch.cuda, torch.cuda.random):
        _replace(owner, "get_rng_state", lambda *args, **kwargs: torch.get_rng_state())
        _replace(owner, "set_rng_state", _set_rng_state)


class _SplitSizes(list):
    """Split sizes as Gloo takes them, a list, with the one method of an array that Megatron calls."""

    def tolist(self) -> list[int]:
        return list(self)


def _set_rng_state(state: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    """Set the CPU's random state; one that a GPU left in a checkpoint is a seed and an offset, int64 [2]."""
    if state.numel() == torch.get_rng_state().numel():
        torch.set_rng_state(state)
    else:
        torch.manual_seed(state.view(torch.int64)[0].item())


def _bridge_megatron() -> None:
    """Replace what Megatron binds to CUDA by value, or does only with a GPU's libraries."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe import token_dispatcher
    from megatron.training import training

    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", _set_rng_state)

    # The dispatcher hands split sizes to all_to_all as numpy arrays; Gloo takes lists.
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return _SplitSizes(tensor.tolist()) if as_numpy and torch.is_tensor(tensor) else tensor

    _replace(token_dispatcher, "maybe_move_tensor_to_cpu", to_host)
    device.use_built_dataset_helper()
    # Megatron's queue is in a process of its own; no save is asynchronous here (device.ON_CPU).
    _replace(filesystem_async, "get_write_results_queue", _always(queue.Queue()))
    _wrap(training, "initialize_megatron", functools.partial(_with, {"allow_no_cuda": True}))
