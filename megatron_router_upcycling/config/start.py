"""How a Mixture-of-Experts starts: the ablations' options, whose defaults are the paper's.

Pure: imports neither torch nor Megatron. It decides values, not shapes, and is ``init`` in the manifest.
"""

import math
from dataclasses import dataclass, fields

from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import Recorded, RouterConfig

HEAD_KEYS = ("mean", "attended")
OF_TEXTS = ("domain", "ridge")  # gates that tell the texts of several key statistics apart
GATES = ("random", "centroid", "heads", *OF_TEXTS)
CHOICES = {
    "queries": ("heads", "random"),
    "keys": ("heads", "random"),
    "gate": GATES,
    "equalize": (False, True, "rows", "logits"),
    "head_key": (None, *HEAD_KEYS),
}


@dataclass(frozen=True)
class InitConfig(Recorded):
    """Options of the start.

    - ``queries``, ``keys``: ``random`` draws the mixture's query maps or expert keys from a normal
      distribution, each with the norm of the one from attention heads.
    - ``head_key``: equation 4's key of an attention head, the ``mean`` of its query group's or what the head
      ``attended`` to (``key_statistics.capture``); None: ``attended`` where heads would share a mean key.
    - ``gate``: of a linear router, ``centroid`` makes it of the centres of clusters of its inputs, ``heads``
      folds the mixture that attention heads give into one matrix; ``domain`` and ``ridge`` tell the texts
      of several key statistics apart (``initialisation.domains``).
    - ``center``: take the direction of the mean router input out, so that no expert is ahead for all tokens.
    - ``equalize``: give the gate equal singular values, so that no two experts are nearly alike. ``rows``
      gives it rows of equal norm only, ``logits`` makes its logits uncorrelated over the sample, with equal
      variances.
    - ``target_entropy``: in nats, the mean entropy of a token's routing distribution over all experts, to
      which each layer's logits are scaled.
    """

    RETIRED = dict(norm_gain=False, weights="dense", logit_scale=1.0, expert_noise=0.0, drop_upcycling=0.0)

    queries: str = "heads"
    keys: str = "heads"
    head_key: str | None = None
    gate: str = "random"
    center: bool = False
    equalize: bool | str = False
    target_entropy: float | None = None

    def __post_init__(self) -> None:
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                known = ", ".join(str(choice).lower() for choice in choices if choice)
                raise UserError(f"{name} {getattr(self, name)}: choose one of {known}")

    @property
    def alters_router(self) -> bool:
        """Whether a router's values are not the paper's."""
        return self != InitConfig(head_key=self.head_key)

    @property
    def needs_router_input(self) -> bool:
        """Whether values are made from samples of the routers' inputs."""
        samples = self.gate in ("centroid", *OF_TEXTS) or self.center or self.equalize == "logits"
        return samples or self.target_entropy is not None

    def of_heads(self, router: RouterConfig) -> bool:
        """Whether the routers are made from attention heads."""
        return router.kind.of_heads or self.gate == "heads"

    def needs_key_stats(self, router: RouterConfig) -> bool:
        return self.of_heads(router) or self.needs_router_input

    def check(self, router: RouterConfig) -> None:
        """Raise UserError for what ``router`` cannot start with."""
        default = InitConfig().to_dict()
        for name, value in self.to_dict().items():
            if value != default[name]:
                flag = name if name in ("queries", "keys") else f"--{name.replace('_', '-')}"
                router.kind.check_has(name, flag if value is True else f"{flag} {value}")
        if self.equalize and router.pooling == "max":
            raise UserError("--equalize: is for --pooling sum; the maximum has no single gate")
        if self.head_key and not self.of_heads(router):
            raise UserError(f"--head-key {self.head_key}: --router {router.router} needs --gate heads for it")
        target, uniform = self.target_entropy, math.log(router.num_experts)
        if target is not None and not 0 < target < uniform:
            raise UserError(
                f"--target-entropy {target}: is in nats and must be between 0 and ln {router.num_experts} ="
                f" {uniform:.4f}, that of uniform routing"
            )


NAMES = tuple(field.name for field in fields(InitConfig))
