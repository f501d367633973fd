"""How a Mixture-of-Experts starts: the ablations' options, whose defaults are the paper's.

Pure: imports neither torch nor Megatron. It decides values, not shapes, and is ``init`` in the manifest.
"""

import math
from dataclasses import dataclass, fields

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import Recorded, RouterConfig

HEAD_KEYS = ("mean", "attended")
CHOICES = {
    "queries": ("heads", "random"),
    "keys": ("heads", "random"),
    "gate": ("random", "centroid"),
    "head_key": (None, *HEAD_KEYS),
}


@dataclass(frozen=True)
class InitConfig(Recorded):
    """Options of the start.

    - ``queries``, ``keys``: ``random`` draws the mixture's query maps or expert keys from a normal
      distribution, each with the norm of the one from attention heads.
    - ``head_key``: equation 4's key of an attention head, the ``mean`` of its query group's or what the head
      ``attended`` to (``key_statistics.capture``); None: ``attended`` where heads would share a mean key.
    - ``gate``: of a linear router, ``centroid`` makes it of the centres of clusters of its inputs.
    - ``logit_scale``: multiplies every logit.
    - ``target_entropy``: in nats, the mean entropy of a token's routing distribution over all experts, to
      which each layer's logits are scaled.
    - ``expert_noise``: standard deviation of noise on each expert's weights, relative to that of the tensor.
    - ``drop_upcycling``: share of each expert's FFN channels that is drawn anew (arXiv 2502.19261).
    """

    RETIRED = {"norm_gain": False, "weights": "dense"}

    queries: str = "heads"
    keys: str = "heads"
    head_key: str | None = None
    gate: str = "random"
    logit_scale: float = 1.0
    target_entropy: float | None = None
    expert_noise: float = 0.0
    drop_upcycling: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(choice for choice in choices if choice)
                raise UserError(f"{name} {getattr(self, name)}: choose one of {known}")
        if not 0 < self.logit_scale < math.inf:
            raise UserError(f"logit_scale {self.logit_scale}: must be more than 0")
        if not 0 <= self.expert_noise < math.inf:
            raise UserError(f"expert_noise {self.expert_noise}: must be 0 or more")
        if not 0 <= self.drop_upcycling <= 1:
            raise UserError(f"drop_upcycling {self.drop_upcycling}: is a share, between 0 and 1")

    @property
    def alters_experts(self) -> bool:
        """Whether experts differ, so that each is stored."""
        return self.expert_noise > 0 or self.drop_upcycling > 0

    @property
    def alters_router(self) -> bool:
        """Whether a router's values are not the paper's."""
        kept = ("head_key", "expert_noise", "drop_upcycling")
        return self != InitConfig(**{name: getattr(self, name) for name in kept})

    @property
    def needs_router_input(self) -> bool:
        """Whether values are made from samples of the routers' inputs."""
        return self.gate == "centroid" or self.target_entropy is not None

    def check(self, router: RouterConfig) -> None:
        """Raise UserError for what ``router`` cannot start with."""
        default = InitConfig().to_dict()
        for name, value in self.to_dict().items():
            if value != default[name]:
                router.kind.check_has(name, f"{name} {value}")
        target, uniform = self.target_entropy, math.log(router.num_experts)
        if target is not None and self.logit_scale != 1:
            raise UserError("--target-entropy sets the logits' scale; leave logit_scale out")
        if target is not None and not 0 < target < uniform:
            raise UserError(
                f"--target-entropy {target}: is in nats and must be between 0 and ln {router.num_experts} ="
                f" {uniform:.4f}, that of uniform routing"
            )
        if router.granularity > 1 and self.alters_experts:
            raise UserError("--granularity: leave it out; expert_noise and drop_upcycling need whole experts")


NAMES = tuple(field.name for field in fields(InitConfig))
