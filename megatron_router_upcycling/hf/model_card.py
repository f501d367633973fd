"""The model card of an exported folder, and how other tools read the model.

llama.cpp and mbridge do not read every entry of config.json: in the versions in docs/hugging_face.md, the
class alone decides whether the chosen experts' weights are renormalised, and every layer must have experts.

transformers trains the export with the load balancing loss of config.json. In a layer with n experts, k per
token, and T tokens, f_i tokens choose expert i, and P_i is the sum of its softmax over all tokens. Megatron
adds c n / (k T^2) sum_i f_i P_i for every layer; transformers, only with ``output_router_logits``, adds
r n / (L T)^2 sum_i F_i Q_i once, where F and Q are the sums of f and P over all L layers. With r = c L / k
the gradients with respect to P_i, c n f_i / (k T^2) and r n F_i / (L T)^2, are equal if all layers have equal
counts (F_i = L f_i); otherwise each layer's counts are replaced by their mean over the layers.
"""

import math
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

from megatron_router_upcycling.checkpoint.names import RELEASE
from megatron_router_upcycling.checkpoint.read_config_json import rounded
from megatron_router_upcycling.hf.export_job import Export
from megatron_router_upcycling.hf.files import MODELLING_FILE
from megatron_router_upcycling.routers.config import RouterConfig

# For a model whose experts have not trained yet, so that its first training balances their load: the c of the
# paper (section 4.1) and of configs/methods.
UNTRAINED = {"aux_loss": 0.02}
# Megatron's kinds of this loss: f_i counts a micro-batch, a sequence, or the global batch so far.
BALANCING = ("aux_loss", "seq_aux_loss", "global_aux_loss")


def balanced_by(args: Namespace) -> dict[str, float]:
    """Kind of loss in ``BALANCING`` -> its coefficient in Megatron's arguments; only those above 0."""
    defaults = {"moe_router_load_balancing_type": "aux_loss", "moe_aux_loss_coeff": 0}
    given = (getattr(args, name, value) for name, value in defaults.items())
    kinds, coefficients = (value if isinstance(value, list | tuple) else [value] for value in given)
    return {
        kind: float(value)
        for kind, value in zip(kinds, coefficients, strict=False)
        if kind in BALANCING and isinstance(value, int | float) and value > 0
    }


def aux_losses(job: Export) -> dict[str, float]:
    """The losses that balanced the experts' load in training, or should in the first training."""
    is_trained = job.manifest is None or job.checkpoint.iteration_dir.name != RELEASE
    return balanced_by(job.checkpoint.args) if is_trained else UNTRAINED


def loss_coefficient(trained: dict[str, float], num_layers: int, top_k: int) -> float:
    """``router_aux_loss_coef`` for ``num_layers`` layers with experts; ``read_config_json`` inverts it."""
    return rounded(sum(trained.values()) * num_layers / top_k)


def _order(router: RouterConfig) -> str:
    return "softmax, then top-k" if router.pre_softmax else "top-k, then softmax"


def faults(job: Export) -> list[str]:
    """Why llama.cpp and mbridge do not compute a model that stock classes load; empty where they do."""
    model, router = job.model, job.router
    if router is None or not job.is_stock:
        return []
    name, is_qwen2 = f"{model.family.capitalize()}-MoE", model.family == "qwen2"
    order = None
    if router.pre_softmax != is_qwen2 and router.top_k != router.num_experts:
        order = (
            f"computes another model: it {'never' if is_qwen2 else 'always'} renormalises the chosen experts'"
            f" weights in {name}, and this one routes by {_order(router)}"
        )
    llama_cpp = mbridge = order
    if model.dense_layers:
        mbridge = "does not load this model: it wants experts in every layer"
        llama_cpp = f"{mbridge} of {name}"
    elif is_qwen2 and not job.shared_expert_width:
        llama_cpp = f"does not load this model: it wants a shared expert in {name}"
    if is_qwen2 and model.shared_expert_size:
        mbridge = "computes another model: it leaves out the gate of Qwen2-MoE's shared expert"
    return [f"{tool} {why}" for tool, why in (("llama.cpp", llama_cpp), ("mbridge", mbridge)) if why]


def model_card(job: Export, record: dict[str, Any]) -> str:
    """README.md: what the model is and what made it."""
    code = "" if job.is_stock else ", trust_remote_code=True"
    source, version = record["source"], record["versions"]["megatron-router-upcycling"]
    tags = "\ntags:\n- mixture-of-experts\n- router-upcycling" if job.router else ""
    text = f"""---
library_name: transformers
pipeline_tag: text-generation{tags}
---

# {job.out.absolute().name}

`{job.class_name}`: {record["architecture"]}, {record["dtype"]}.

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER", dtype="auto"{code})
```

Exported by megatron-router-upcycling {version} (`router-upcycle export-hf`) from the Megatron checkpoint
`{source["name"]}`, `{source["iteration"]}`, whose index has SHA-256 `{source["digest"]}`.
"""
    if record.get("tokenizer_fault"):
        text += f"\n## Tokenizer\n\n{record['tokenizer_fault']}.\n"
    return text + _router_section(job, job.router, record) if job.router else text


def _router_section(job: Export, router: RouterConfig, record: dict[str, Any]) -> str:
    kind = router.kind.card.format(router=router)
    folded = "It is linear in the hidden state, and is stored here as one gate a layer, folded in float32."
    elsewhere = "\n## In other tools\n\n" + "".join(f"- {sentence}.\n" for sentence in _elsewhere(job))
    if not job.is_stock:
        how = router.kind.exported.format(rows=job.gate["weight"][0])
        folded = f"It is stored here {how}: see `{MODELLING_FILE}`, which needs transformers 5."
        elsewhere = ""
    notes = "".join(f"\n\n{note}" for note in _notes(job))
    return f"""
## Router

{router.num_experts} experts, {router.top_k} a token; the router is {kind}; {_order(router)}. {folded}{notes}

Precision: {precision(record)}
(random hidden states of unit variance, through each layer's norm).
{elsewhere}"""


def precision(record: dict[str, Any]) -> str:
    """The effect of rounding in words, from the record of an export."""
    dtype, found = record["dtype"], record["rounding"]
    if dtype == "float32":
        return "the gates are kept as they were folded, in float32"
    return (
        f"routers in {dtype}, not float32: of {found['choices']} choices of an expert for random tokens"
        f" {found['by_rounding']} are different ({found['by_arithmetic']} where logits are computed in"
        f" {dtype} too)"
    )


def _notes(job: Export) -> Iterator[str]:
    """What differs from what the classes' names and entries suggest."""
    model = job.model
    if model.dense_layers:
        layers = ", ".join(map(str, model.dense_layers))
        yield f"Layers without experts (`mlp_only_layers`): {layers}."
    if model.shared_expert_size and not model.shared_expert_gated:
        yield (
            "The shared expert has no gate: `shared_expert_gate` is so small that its sigmoid is one half,"
            " and the expert's `down_proj` is doubled, which is exact."
        )
    elif model.family == "qwen2" and not model.shared_expert_size:
        yield "The shared expert that the class asks for is all zeros: it adds exactly nothing."
    if (scale := model.routed_scale) != 1.0:
        exact = math.frexp(scale)[0] == 0.5
        yield (
            f"The routed experts' outputs were scaled by {scale:g} in training; the factor is in their"
            f" `down_proj`, {'exactly' if exact else 'rounded to the dtype of the weights'}."
        )
    if losses := aux_losses(job):
        assert job.router is not None
        given = " and ".join(f"`{kind}` {value:g}" for kind, value in losses.items())
        what = f"trained with Megatron's {given}"
        if losses is UNTRAINED:
            what = f"the experts have not been trained yet; for their training the paper's {given}"
        count, k = len(model.expert_layers), job.router.top_k
        yield (
            f"Load balancing: {what}, added up over {count} layers. transformers has one loss over all layers"
            f" together, which counts each of a token's {k} choices, and adds it only with"
            f" `output_router_logits=True`. `router_aux_loss_coef` {loss_coefficient(losses, count, k):g}"
            f" (that times {count}/{k}) gives routers the same gradients where the layers load their experts"
            " alike, and otherwise those of the mean load over layers."
        )


def _elsewhere(job: Export) -> Iterator[str]:
    """Where other tools silently load a different model, or train other parts of it."""
    yield from faults(job)
    yield (
        "transformers 5 saves config.json without `rope_theta` (and Qwen3-MoE's without `num_experts`), and"
        " transformers 4 then takes its own defaults. Restore them before transformers 4, or a tool of its"
        " time, reads what transformers 5 has saved"
    )
    if job.model.family == "qwen2" and not job.model.shared_expert_size and job.shared_expert_width:
        yield (
            "peft's `all-linear` and `gate_proj`, `up_proj`, `down_proj` adapt only the shared expert, which"
            " is all zeros and stays so. To adapt the experts, give"
            ' `target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]`'
        )
    yield (
        "transformers' Trainer adds the load balancing loss whole in each micro-batch: divide"
        " `router_aux_loss_coef` by its accumulation steps. trl divides, and adds the loss whenever the"
        " coefficient is not 0"
    )
