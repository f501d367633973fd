"""Compare an exported model's loss with that of its Megatron checkpoint, and generate some text with it.

    python -m tools.experiments.check_export HF_DIR --config configs/demo/moe.yaml --load MOE \\
        --valid-data-path DIR/text_held_out --tokenizer-model DIR/text.tokenizer.model --output check.json

Megatron evaluates MOE over ``--eval-iters`` batches in this process; then transformers loads HF_DIR, without
trust_remote_code, and evaluates the same batches. Prints both losses (nats a token, float32) and a few lines
with the exported model's continuations.
"""

import json
import multiprocessing
import sys
from pathlib import Path
from typing import Any

import torch

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import write_whole
from megatron_router_upcycling.training import launch, train

NUM_PROMPTS, PROMPT_TOKENS, NEW_TOKENS = 3, 12, 24

Batch = dict[str, torch.Tensor]


def megatron_loss(argv: list[str]) -> tuple[float, list[Batch], Any]:
    """Evaluate in this process; return the mean loss, the evaluated batches and Megatron's arguments."""
    run = launch.prepare([*argv, "--skip-train", "--expert-model-parallel-size", "1"], needs_checkpoint=True)
    if not run.args.output:
        raise UserError("--output: name the JSON file to write")
    from megatron_router_upcycling.training import language_model

    batches: list[Batch] = []
    sums = torch.zeros(2, dtype=torch.float64)
    get_batch, loss_func = language_model.get_batch, language_model.loss_func

    def keep_batch(*args: Any, **kwargs: Any) -> dict[str, Any]:
        batch = get_batch(*args, **kwargs)
        batches.append({name: batch[name].cpu() for name in ("tokens", "labels", "loss_mask")})
        return batch

    def add_loss(*args: Any, **kwargs: Any) -> Any:
        loss, num_tokens, report = loss_func(*args, **kwargs)
        sums.add_(torch.stack((loss.detach().double(), num_tokens.double())).cpu())
        return loss, num_tokens, report

    language_model.get_batch, language_model.loss_func = keep_batch, add_loss
    train.train(run)
    return float(sums[0] / sums[1]), batches, run.args


@torch.no_grad()
def exported_loss(model: torch.nn.Module, batches: list[Batch]) -> float:
    """Mean loss of a transformers model over ``batches``, in nats a token."""
    total, count = 0.0, 0.0
    for batch in batches:
        logits = model(batch["tokens"]).logits.float().transpose(1, 2)  # [batch, vocabulary, sequence]
        losses = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="none")
        total += float((losses.double() * batch["loss_mask"]).sum())
        count += float(batch["loss_mask"].sum())
    return total / count


@torch.no_grad()
def continuations(model: Any, batches: list[Batch], tokenizer_model: str | None) -> list[dict[str, str]]:
    """The model's continuations of the first tokens of a few held-out samples (sampled, seed 0).

    Empty without a tokenizer, as for mock data.
    """
    if tokenizer_model is None:
        return []
    import sentencepiece

    tokenizer = sentencepiece.SentencePieceProcessor(model_file=tokenizer_model)
    torch.manual_seed(0)
    written = []
    for prompt in batches[0]["tokens"][:NUM_PROMPTS, :PROMPT_TOKENS]:
        tokens = prompt[None]
        for _ in range(NEW_TOKENS):
            scores = model(tokens).logits[:, -1].float() / 0.7
            tokens = torch.cat((tokens, torch.multinomial(scores.softmax(dim=-1), 1)), dim=1)
        new = [token for token in tokens[0, PROMPT_TOKENS:].tolist() if token < tokenizer.vocab_size()]
        written.append({"prompt": tokenizer.decode(prompt.tolist()), "continuation": tokenizer.decode(new)})
    return written


def in_fresh_process(folder: str, batches: list[Batch], tokenizer_model: str | None) -> tuple[float, Any]:
    """Loss and continuations of the model in ``folder``, as transformers loads it."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return exported_loss(model, batches), continuations(model, batches, tokenizer_model)


def check(argv: list[str]) -> None:
    if not argv or argv[0].startswith("-"):
        raise UserError("HF_DIR: name the exported folder first")
    folder, *argv = argv
    if not (Path(folder) / "config.json").is_file():
        raise UserError(f"HF_DIR {folder}: no config.json there; name what export-hf wrote")
    in_megatron, batches, args = megatron_loss(argv)

    # In a separate process, since torch may be patched for Megatron on the CPU in this one (cpu_backend).
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        in_transformers, samples = pool.apply(in_fresh_process, (folder, batches, args.tokenizer_model))
    print(f"held-out loss: Megatron {in_megatron:.6f}, transformers {in_transformers:.6f}")
    for sample in samples:
        print(f"  {sample['prompt']!r} -> {sample['continuation']!r}")
    found = {"megatron": in_megatron, "transformers": in_transformers, "samples": samples}
    write_whole(Path(args.output), json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    launch.exit_on_user_error(lambda: check(sys.argv[1:]))
