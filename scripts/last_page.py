"""Summarise a run: where the model is, its losses, which files to look at, which commands come next.

    python scripts/last_page.py WORK PREFIX...

Writes WORK/result.txt. Losses on held-out data are read from WORK/logs/held_out_{dense,run}.log.
"""

import json
import math
import re
import sys
from pathlib import Path

import one_pass

from megatron_router_upcycling.files import write_whole
from megatron_router_upcycling.training.run_log import files

HELD_OUT = re.compile(r"validation loss at iteration .*? lm loss value: (\S+)")


def held_out(work: Path, model: str) -> float | None:
    log = work / "logs" / f"held_out_{model}.log"
    found = HELD_OUT.findall(log.read_text(errors="replace")) if log.is_file() else []
    return float(found[-1]) if found else None


def losses(work: Path, vocabulary: int, prefixes: list[str]) -> list[str]:
    """The losses as lines: on held-out text, or else in training, with the reason for no held-out loss."""
    lines = files.read(work / "run" / files.RUN)
    last = {line["kind"]: line["lm_loss"] for line in lines}
    model = held_out(work, "run") or last.get("held_out")
    rows = {"this model": model, "the dense model": held_out(work, "dense")}
    where, why = "on held-out text", []
    if model is None:
        rows, where = {"this model": last["train"]}, "in training, at its end"
        known = [made for prefix in prefixes if (made := one_pass.record.read(Path(prefix)))]
        documents = sum(made.documents for made in known)
        few = known and documents < one_pass.FEWEST_DOCUMENTS
        why = [f"  {one_pass.NO_VALIDATION.format(documents) if few else 'no validation: eval_iters is 0'}"]
    rows["chance"] = math.log(vocabulary)  # a uniform distribution over tokens
    shown = [f"  {name:<16} {loss:.4f}" for name, loss in rows.items() if loss is not None]
    return [f"loss {where} (nats a token; lower is better):", *shown, *why]


def page(work: Path, prefixes: list[str]) -> str:
    config = json.loads((work / "hf/config.json").read_text())
    experts = f"{config['num_experts']} experts, {config['num_experts_per_tok']} a token"
    return f"""
the model: {work}/hf ({config["architectures"][0]}, {experts})

{"\n".join(losses(work, config["vocab_size"], prefixes))}

to look at:
  {work}/report/report.html      losses, and where the routers send tokens
  {work}/evaluation/results.md   scores on the tasks, compared with chance and the dense model

next:
  vllm serve '{work}/hf'
  router-upcycle report '{work}/run'
"""


def main(work: str, *prefixes: str) -> None:
    text = page(Path(work), list(prefixes))
    write_whole(Path(work) / "result.txt", text)
    print(text)


if __name__ == "__main__":
    main(*sys.argv[1:])
