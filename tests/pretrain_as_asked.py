"""``pretrain`` on the CPU with flags that ``device.adapt`` turns off there: tests of what they do on a GPU.

Each rank prints which class its experts are of.
"""

import runpy
from argparse import Namespace
from typing import Any

import torch

from megatron_router_upcycling.training import device
from megatron_router_upcycling.training.patches import cpu_backend

KEPT = ("moe_grouped_gemm", "overlap_grad_reduce", "overlap_param_gather")


def main() -> None:
    adapt, install = device.adapt, cpu_backend.install

    def adapt_but_keep(args: Namespace, place: str) -> str | None:
        asked = {name: getattr(args, name) for name in KEPT}
        line = adapt(args, place)
        vars(args).update(asked)
        return line

    def install_and_tell() -> None:
        install()
        torch.cuda.get_device_capability = lambda *args: (9, 0)  # Megatron asks before it groups products
        from megatron.core.transformer.moe.moe_layer import MoELayer

        set_layer_number = MoELayer.set_layer_number

        def tell(self: Any, layer_number: int) -> None:
            set_layer_number(self, layer_number)
            print(f"experts of layer {layer_number}: {type(self.experts).__name__}", flush=True)

        MoELayer.set_layer_number = tell

    device.adapt, cpu_backend.install = adapt_but_keep, install_and_tell
    runpy.run_module("megatron_router_upcycling.pretrain", run_name="__main__")


if __name__ == "__main__":
    main()
