"""Write the length of a training run on this machine, if no configuration sets it: one pass over the data.

    python scripts/one_pass.py DENSE OUT.yaml PREFIX...

Sequences have the dense model's maximum length, up to 1024 tokens; a step takes about 1/500 of the data.
"""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import yaml

from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.data import record
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.files import write_whole

LONGEST = 1024
STEPS = 500
BATCHES = (32, 512)  # sequences a step; multiples of 32, so that 8 processes can share a step in fours
FEWEST_DOCUMENTS = 200  # with at least this many, 1% of the documents is kept for validation
NO_VALIDATION = (
    f"no validation: the data has {{}} documents, and validation needs at least {FEWEST_DOCUMENTS}"
)


def settings(model: dict[str, Any], tokens: int, documents: int) -> dict[str, Any]:
    """Flags of Megatron for the model that the flags ``model`` build.

    Raises:
        UserError: if they do not say how many tokens a sequence may have.
    """
    longest = model.get("max_position_embeddings")
    if type(longest) is not int:
        raise UserError(
            "--dense: its model.yaml has no number max_position_embeddings; give that, or --config"
        )
    length = min(LONGEST, longest)
    batch = min(max(tokens // (length * STEPS) // 32 * 32, BATCHES[0]), BATCHES[1])
    steps = max(tokens // (length * batch), 1)
    validates = documents >= FEWEST_DOCUMENTS
    return {
        "seq_length": length,
        "global_batch_size": batch,
        "train_iters": steps,
        "save_interval": min(max(steps // 5, 1), 100),
        "split": "99,1,0" if validates else "100,0,0",
        "eval_interval": max(steps // 5, 1),
        "eval_iters": 8 if validates else 0,
    }


def check_length(flag: str, tokens: int, length: int, batch: int) -> None:
    """Refuse less than ``batch`` sequences of ``length`` tokens.

    Raises:
        UserError: with the amount that is needed.
    """
    if tokens < (needed := length * batch):
        raise UserError(
            f"{flag}: gives at most {tokens:,} tokens, and one step of training takes {batch} sequences of"
            f" {length:,}, {needed:,} tokens (of English text, about {4 * needed:,} bytes); give more text,"
            " or a --config with smaller steps"
        )


def records(prefixes: Iterable[str]) -> list[record.Record]:
    """The records of data that is given as weights and prefixes.

    Raises:
        UserError: if ``prepare-data`` has not made the data.
    """
    known = [record.read(Path(prefix)) for prefix in prefixes if not prefix.replace(".", "").isdigit()]
    found = [entry for entry in known if entry]
    if len(found) < len(known):
        raise UserError("--config: is needed for data that prepare-data has not made")
    return found


def main(dense: str, out: str, *prefixes: str) -> None:
    made = records(prefixes)
    tokens, documents = sum(one.tokens for one in made), sum(one.documents for one in made)
    chosen = settings(read_yaml(Path(dense) / "model.yaml"), tokens, documents)
    check_length("--text", tokens, chosen["seq_length"], chosen["global_batch_size"])
    head = f"# One pass over the data, as {Path(__file__).name} reckons it.\n"
    if not chosen["eval_iters"]:
        head += f"# There is {NO_VALIDATION.format(documents)}.\n"
    write_whole(Path(out), head + yaml.safe_dump(chosen))


def run(command: Callable[..., None]) -> None:
    """Run ``command`` with the script's arguments; a UserError ends it with one line and exit status 2."""
    try:
        command(*sys.argv[1:])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    run(main)
