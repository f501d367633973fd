"""Ablations of the paper's first values (``InitConfig``), as pure functions of tensors.

The functions alter given values, in the checkpoint's dtype. Statistics (norms, standard deviations, scales)
are computed in float64 and rounded to float32, so that they do not depend on the order of summation, and each
random tensor is drawn by a ``generator`` of its own.

Symbols: S tokens, D hidden size, n experts.
"""

import hashlib
import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from megatron_router_upcycling.config.start import OF_TEXTS, InitConfig
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.initialisation import domains
from megatron_router_upcycling.routers.config import RouterConfig

LEAST_SINGULAR = 1e-6  # of the largest: what is below is rounding
BISECTIONS = 200
SCALES = (1e-8, 1e8)


def generator(seed: int, *what: object) -> torch.Generator:
    """A random generator for ``what`` (names and numbers), seeded with a hash of it and ``seed``."""
    text = ":".join(map(str, (seed, *what)))
    return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little"))


def _float32(value: Tensor | float) -> float:
    return torch.tensor(float(value), dtype=torch.float32).item()


def with_norm_of(values: Tensor, random: torch.Generator) -> Tensor:
    """Random float32 values of the shape of ``values``; each slice along axis 0 has the norm of theirs."""
    drawn = torch.randn(values.shape, generator=random)
    for row, like in zip(drawn, values, strict=True):
        row *= _float32(like.double().norm() / row.double().norm())
    return drawn


def equal_singular_values(gate: Tensor) -> Tensor:
    """The matrix [n, n] that makes the singular values of ``gate`` [n, D] equal, those that are not 0.

    The gate keeps its Frobenius norm. Of n experts whose keys are shorter than n, some values are 0; tied
    experts stay tied.
    """
    u, singular, _ = torch.linalg.svd(gate, full_matrices=False)
    kept = singular > LEAST_SINGULAR * singular[0]
    u, singular = u[:, kept], singular[kept]
    return (u / singular) @ u.t() * singular.square().mean().sqrt()


def scale_to_entropy(logits: Tensor, target: float, place: str) -> float:
    """The factor for ``logits`` [S, n] with which the mean entropy of their softmax over n is ``target``."""
    logits = logits.double()

    def entropy(scale: float) -> float:
        log_p = torch.log_softmax(logits * scale, dim=1)
        return float(-(log_p.exp() * log_p).sum(dim=1).mean())

    low, high = map(math.log, SCALES)
    if not entropy(math.exp(high)) < target < entropy(math.exp(low)):
        raise UserError(
            f"--target-entropy {target}: no logit scale gives it {place}, where it can be"
            f" {entropy(math.exp(high)):.4f} to {entropy(math.exp(low)):.4f}"
        )
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if entropy(math.exp(middle)) > target else (low, middle)
    return _float32(math.exp(low))


def alter_router(
    values: dict[str, Tensor],
    router: RouterConfig,
    init: InitConfig,
    seed: int,
    layer: int,
    samples: Sequence[Tensor] = (),
) -> dict[str, Tensor]:
    """Apply the ablations of ``init`` to one layer's router: its parameters by name, in their dtype.

    ``samples``: of the layer's router inputs [S, D], one of each text, where ``init`` needs any.
    """
    inputs = torch.cat([*samples]) if samples else torch.empty(0)
    dtype = next(iter(values.values())).dtype
    made = dict(values)
    for option, name in ((init.queries, "query_weight"), (init.keys, "expert_key")):
        if option == "random":
            made[name] = with_norm_of(made[name], generator(seed, name, layer)).to(dtype)
    if init.gate == "centroid":
        if len(inputs) < router.num_copies:
            raise UserError(
                f"gate centroid: {len(inputs)} tokens in --key-stats are too few for {router.num_copies}"
                " experts; collect more with --router-samples"
            )
        centres = domains.cluster_centres(inputs, router.num_copies, generator(seed, "centroid", layer))
        norms = made["weight"][:: router.granularity].double().norm(dim=1, keepdim=True).float()
        made["weight"] = (centres * norms).repeat_interleave(router.granularity, dim=0).to(dtype)
    if init.gate in OF_TEXTS:
        rows = domains.gate(init.gate, samples, router.num_copies, partial(generator, seed, "domain", layer))
        rows *= _float32(made["weight"].double().norm() / rows.norm() / math.sqrt(router.granularity))
        made["weight"] = rows.repeat_interleave(router.granularity, dim=0).to(dtype)
    scaled = router.kind.scaled or ""  # InitConfig.check refuses the kinds that have none
    reads = "query_weight" if "query_weight" in made else "weight"  # the factor [..., D] of the gate
    if init.center:
        mean, value = inputs.double().mean(dim=0), made[reads].double()
        made[reads] = (value - (value @ mean).unsqueeze(-1) * (mean / mean.dot(mean))).to(dtype)
    if init.equalize:
        by_copy = (router.num_copies, router.granularity, -1)  # shards of a copy are equal
        folded = router.kind.gate(made, router, made[reads].shape[-1], torch.float64)["weight"]
        gate, rows = (
            one.unflatten(0, by_copy)[:, 0].flatten(0, 1) for one in (folded, made[scaled].double())
        )
        if init.equalize == "rows":
            norms = gate.norm(dim=1, keepdim=True)
            rows = rows * norms.square().mean().sqrt() / norms.clamp_min(LEAST_SINGULAR * norms.max())
        elif init.equalize == "logits":  # with C their covariance, s C^(-1/2)
            logits = gate @ (inputs.double() - inputs.double().mean(dim=0)).t()
            rows = equal_singular_values(logits) @ rows
        else:
            rows = equal_singular_values(gate) @ rows
        rows = rows.unflatten(0, (router.num_copies, -1)).repeat_interleave(router.granularity, dim=0)
        made[scaled] = rows.flatten(0, 1).to(dtype)
    if init.target_entropy is not None:
        gate = router.kind.gate(made, router, inputs.shape[1], torch.float64)
        logits = router.kind.logits(gate, inputs.double(), router)
        scale = scale_to_entropy(logits, init.target_entropy, f"in layer {layer}")
        made[scaled] = (made[scaled].double() * scale).to(dtype)
    return made
