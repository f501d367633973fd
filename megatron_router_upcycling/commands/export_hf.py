"""Make a Hugging Face folder of a Megatron checkpoint.

Make a Hugging Face folder of a converted or trained Mixture-of-Experts (Qwen2-MoE or Qwen3-MoE) or of a dense
model (Qwen2 or Qwen3), which stock transformers, vLLM and SGLang load.

example:
  router-upcycle export-hf runs/moe Qwen1.5-0.5B-8x --dtype bfloat16

A mixture of routers with sum pooling and one key an expert is exactly one linear gate, and so is a linear
router: stock classes hold them. Max pooling, several keys an expert or an MLP need --modelling-code, and
trust_remote_code where the folder is loaded.

Qwen2-MoE has a shared expert. Where MOE has none (convert --shared-expert), one of zeros is written, which
adds exactly nothing. Its width should be a multiple of the tensor parallel sizes that the model is served
at. --shared-expert-width 0 leaves it out, which transformers reports as missing weights.
"""

import argparse
import dataclasses
import time
from pathlib import Path

from megatron_router_upcycling.commands.shared import DTYPES, progress_bar
from megatron_router_upcycling.config.flags import add_output

SIZES = {"KB": 10**3, "MB": 10**6, "GB": 10**9}


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("checkpoint", metavar="MOE", type=Path, help="the Megatron checkpoint (torch_dist)")
    add("out", metavar="OUT", type=Path, help="the folder to make")
    add("--dtype", choices=DTYPES, help="of the weights (default: as in MOE)")
    add("--tokenizer", metavar="DIR", type=Path, help="(default: the one of the training)")
    add("--max-shard-size", metavar="SIZE", type=_size, default="5GB", help="of a file")
    add("--shared-expert-width", metavar="N", type=int, help="of a shared expert of zeros (default: 128)")
    add(
        "--modelling-code", action="store_true", help="write a modelling file where stock classes do not suit"
    )
    add_output(command)


def _size(text: str) -> int:
    """Bytes in a text such as 5GB or 200MB."""
    number, unit = text[:-2], text[-2:].upper()
    if unit not in SIZES or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB or 200MB")
    return int(number) * SIZES[unit]


def run(args: argparse.Namespace) -> None:
    import torch

    from megatron_router_upcycling.hf import export_job, exporter

    torch.set_num_threads(1)  # the work is moving bytes
    start = time.monotonic()
    asked = {field.name: getattr(args, field.name) for field in dataclasses.fields(export_job.Options)}
    options = export_job.Options(**asked | {"dtype": args.dtype and getattr(torch, args.dtype)})
    job = exporter.prepare(args.checkpoint, args.out, options)
    with progress_bar("export-hf", job.bytes_to_write, args.quiet) as progress:
        record = exporter.run(job, progress)
    if not args.quiet:
        print(exporter.describe_result(job, record, time.monotonic() - start))
