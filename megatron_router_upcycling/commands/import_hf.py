"""Make a Megatron checkpoint of a Hugging Face folder.

Make a Megatron checkpoint (torch_dist) of a Hugging Face folder with Qwen1.5, Qwen2, Qwen2.5 or Qwen3, dense
or a Mixture-of-Experts (Qwen2-MoE, Qwen3-MoE), in safetensors. Any tensor, pipeline and expert parallel size
loads it. An export of export-hf comes back bit for bit, its routers as linear ones.

example:
  router-upcycle import-hf Qwen1.5-0.5B ckpt/dense
  torchrun --nproc-per-node 2 -m megatron_router_upcycling.collect_keys --config ckpt/dense/model.yaml \\
      --load ckpt/dense --output ckpt/key_stats.safetensors [flags for data]

OUT/model.yaml holds the model's Megatron flags: give it as --config, or inherit from it with base: in YAML.
OUT/tokenizer is the model's tokenizer, which model.yaml names.
"""

import argparse
import time
from pathlib import Path

from megatron_router_upcycling.commands.shared import DTYPES, progress_bar
from megatron_router_upcycling.config.flags import add_output


def add_flags(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("folder", metavar="HF_DIR", type=Path, help="the folder of config.json")
    add("out", metavar="OUT", type=Path, help="the checkpoint to make")
    add("--dtype", choices=DTYPES, help="of the checkpoint (default: as in HF_DIR)")
    add("--make-vocab-size-divisible-by", metavar="N", type=int, default=128, help="of the padded embedding")
    add_output(command)


def run(args: argparse.Namespace) -> None:
    import torch

    from megatron_router_upcycling.hf import importer

    torch.set_num_threads(1)  # the work is moving bytes
    start = time.monotonic()
    dtype = args.dtype and getattr(torch, args.dtype)
    job = importer.prepare(args.folder, args.out, dtype, args.make_vocab_size_divisible_by, args.overwrite)
    with progress_bar("import-hf", job.bytes_to_write, args.quiet) as progress:
        record = importer.run(job, progress)
    if not args.quiet:
        print(importer.describe_result(job, record, time.monotonic() - start))
