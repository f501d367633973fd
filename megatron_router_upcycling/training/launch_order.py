"""Whether a run cuts tensors or sequences over GPUs: exit status 0 where it does, for scripts/launch.sh.

    python -m megatron_router_upcycling.training.launch_order CONFIG [Megatron flags]

What is wrong with the file or the flags, the run itself says.
"""

import sys
from collections.abc import Sequence

from megatron_router_upcycling.config.yaml_files import read_yaml
from megatron_router_upcycling.errors import UserError

SIZES = ("tensor_model_parallel_size", "context_parallel_size")


def cuts(config: str, flags: Sequence[str]) -> bool:
    """By the YAML file and, above it, the flags."""
    sizes = {name: str(read_yaml(config).get(name, 1)) for name in SIZES}
    for flag, following in zip(flags, [*flags, ""][1:], strict=True):
        name, equals, value = flag.removeprefix("--").partition("=")
        if flag.startswith("--") and (name := name.replace("-", "_")) in SIZES:
            sizes[name] = value if equals else following
    return any(size != "1" for size in sizes.values())


if __name__ == "__main__":
    try:
        sys.exit(0 if cuts(sys.argv[1], sys.argv[2:]) else 1)
    except UserError:
        sys.exit(1)
