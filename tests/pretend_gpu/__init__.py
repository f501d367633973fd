"""Megatron's CUDA path where there is no GPU: PyTorch's own CUDA build over a pretended device.

``cuda.c`` stands for CUDA's runtime: its GPUs are host memory, and a kernel that is launched does nothing.
PyTorch's allocator, streams, events and handles between processes are the real ones, ``torch.cuda`` says that
a GPU is there, and no bridge to the CPU is laid. ``Pretended`` computes aten's operations on that memory with
PyTorch's CPU kernels. It refuses what a GPU refuses: tensors of different devices, and waiting for a value
inside a CUDA graph. A graph holds those operations (``tests.tape``), and its replay computes them again.
What this cannot show: kernels, speed, NCCL, and libraries with kernels of their own, such as Transformer
Engine.

In the environment of ``environment``::

    python -m tests.pretend_gpu -m megatron_router_upcycling.pretrain ...
"""

import ctypes
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch._decomp import decomposition_table
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from megatron_router_upcycling.layers.kernels import routing
from tests.tape import Tape, is_view, written_by

HERE = Path(__file__).parent
TORCH = Path(torch.__file__).parent / "lib"
USES_CUDA = ("libc10_cuda.so", "libtorch_cuda.so", "libtorch_cuda_linalg.so", "libtorch_python.so")


def missing() -> str | None:
    """Why there can be no pretended GPU here; None where there can."""
    for program in ("cc", "nm"):
        if not shutil.which(program):
            return f"needs {program}"
    if torch.cuda.is_available():
        return "there is a real GPU"
    return None if (TORCH / USES_CUDA[0]).exists() else "needs PyTorch built for CUDA"


def environment(folder: Path) -> dict[str, str]:
    """Compile the runtime into ``folder``; what a process needs in its environment to find it."""
    own = (HERE / "cuda.c").read_text()
    libraries = [TORCH / name for name in USES_CUDA if (TORCH / name).exists()]
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", *libraries], check=True, text=True, capture_output=True
    ).stdout
    asked = set(re.findall(r" ((?:__)?cuda\w+|cublas\w+)", listed))
    # The driver's functions are looked up by name at run time.
    driver = {name.decode() for name in re.findall(rb"\bcu[A-Z]\w+", libraries[0].read_bytes())}
    defined = set(re.findall(r"^[\w *]*?\b(\w+)\(", own, flags=re.M))
    stubs = "".join(f"int {name}() {{ return 0; }}\n" for name in sorted((asked | driver) - defined))
    (folder / "all.c").write_text(own + stubs)
    library = folder / "libcuda.so.1"  # runtime and driver in one
    subprocess.run(["cc", "-w", "-O1", "-shared", "-fPIC", "-o", library, folder / "all.c"], check=True)
    return {
        "LD_PRELOAD": str(library),
        "LD_LIBRARY_PATH": str(folder),
        "CUDA_VISIBLE_DEVICES": "0,1,2,3,4,5,6,7",
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "MEGATRON_ROUTER_UPCYCLING_KERNELS": "off",  # Triton finds no device to compile for
        "TORCHDYNAMO_DISABLE": "1",  # it would compile kernels
    }


# What takes memory or looks at a tensor, and launches no kernel.
NATIVE = re.compile(
    r"empty|new_empty|detach|alias|set_|resize_|record_stream|is_pinned|_pin_memory|lift_fresh"
)
# Operations that take tensors of two devices.
ACROSS = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_", "_foreach_copy_"}


class Graph(torch.cuda.CUDAGraph):
    """A graph whose replay computes what ``Pretended`` saw in its capture."""

    capturing: Tape | None = None  # of the graph that is being captured

    def capture_begin(self, *args: Any, **kwargs: Any) -> None:
        super().capture_begin(*args, **kwargs)
        Graph.capturing = self.tape = Tape()

    def capture_end(self) -> None:
        super().capture_end()
        Graph.capturing = None

    def replay(self) -> None:
        self.tape.replay()


class Pretended(TorchDispatchMode):
    """Operations on CUDA tensors, computed by the CPU's kernels on the same memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        takes = any(tensor.is_cuda for tensor in tensors)
        device = kwargs.get("device")
        gives = torch.device(device).type == "cuda" if device is not None else takes
        name, tape = func._schema.name.partition("::")[2], Graph.capturing
        if func.namespace == "c10d" and takes:
            return func(*tree_map_only(torch.Tensor, on_host, args), **kwargs)  # over Gloo
        if not (takes or gives) or is_view(func) or NATIVE.match(name):
            result = func(*args, **kwargs)
            if tape and gives and NATIVE.match(name):
                tape.made(*tree_leaves(result))
            return result
        if takes and name not in ACROSS and any(not t.is_cuda and t.dim() for t in tensors):
            raise RuntimeError(f"{func}: tensors on {[str(tensor.device) for tensor in tensors]}")
        # What the host waits for cannot be in a CUDA graph.
        waits = name in ("_local_scalar_dense", "nonzero") or not (gives or kwargs.get("non_blocking"))
        if takes and waits and tape:
            raise RuntimeError(f"{func} waits for the GPU inside a CUDA graph")
        if gives and device is not None:
            kwargs["device"] = torch.device("cpu")
        host_args, host_kwargs = tree_map_only(torch.Tensor, on_host, (args, kwargs))
        compute = func
        if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(func.name(), "CPU"):
            compute = decomposition_table.get(func, func)
        written = written_by(func, args, kwargs)
        if tape:
            tape.held += tensors
            result = tape.call(compute, host_args, host_kwargs, written_by(func, host_args, host_kwargs))
        else:
            result = compute(*host_args, **host_kwargs)
        if written:  # in place, or out=
            return {0: None, 1: written[0]}.get(len(func._schema.returns), tuple(written))
        return tree_map_only(torch.Tensor, on_gpu, result) if gives else result


def on_host(tensor: torch.Tensor) -> torch.Tensor:
    """A CPU tensor of the same memory."""
    if not tensor.is_cuda:
        return tensor
    storage = tensor.untyped_storage()
    if not tensor.numel():
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
    memory = (ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr())
    host = torch.frombuffer(memory, dtype=torch.uint8).untyped_storage()
    alias = torch.empty(0, dtype=tensor.dtype)
    return alias.set_(host, tensor.storage_offset(), tensor.shape, tensor.stride())


def on_gpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the current device."""
    if tensor.is_cuda:
        return tensor
    copy = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cuda")
    host = on_host(copy)
    if Graph.capturing:
        Graph.capturing.made(copy, host)
        Graph.capturing.call(host.copy_, (tensor,), {}, [host])
    elif tensor.numel():
        host.copy_(tensor)
    return copy


def enter() -> None:
    """Pretend from here on, to the end of the process."""
    # The CPU has none of the fused attention kernels.
    for kind in ("flash", "mem_efficient", "cudnn"):
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)
    torch.cuda.CUDAGraph = torch.cuda.graphs.CUDAGraph = Graph  # type: ignore[misc, attr-defined]
    # Without kernels a router's routing would be Megatron's; here it is the kernel's plain form.
    routing.usable, routing.route = (lambda logits: logits.is_cuda), routing.plain
    Pretended().__enter__()


def main() -> None:
    """Go on as ``python ARGUMENTS``, -m MODULE or a file, on the pretended GPU."""
    enter()
    sys.argv = sys.argv[1:]
    if sys.argv[0] == "-m":
        del sys.argv[0]
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")
