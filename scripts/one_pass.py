"""Write how long a model trains on this machine where no configuration says it: one pass over its data.

    python scripts/one_pass.py DENSE OUT.yaml PREFIX...

Sequences are as long as the dense model takes, up to 1024 tokens; a step has about a 500th of the data.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from megatron_router_upcycling.checkpoint.open import open_checkpoint
from megatron_router_upcycling.data import record
from megatron_router_upcycling.files import write_whole

LONGEST = 1024
STEPS = 500
BATCHES = (32, 512)  # sequences a step; multiples of 32, so that 8 processes can share a step in fours
FEWEST_DOCUMENTS = 200  # from which on a hundredth of them is left for validation


def settings(longest: int, tokens: int, documents: int) -> dict[str, Any]:
    """Flags of Megatron for a model that takes ``longest`` tokens a sequence."""
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


def main(dense: str, out: str, *prefixes: str) -> None:
    known = [record.read(Path(prefix)) for prefix in prefixes if not prefix.replace(".", "").isdigit()]
    longest = int(open_checkpoint(dense).args.max_position_embeddings)
    found = [entry for entry in known if entry]
    if len(found) < len(known):
        print("error: --config: is needed for data that prepare-data has not made", file=sys.stderr)
        sys.exit(2)
    chosen = settings(longest, sum(one.tokens for one in found), sum(one.documents for one in found))
    write_whole(
        Path(out),
        f"# One pass over the data, as {Path(__file__).name} reckons it.\n" + yaml.safe_dump(chosen),
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
