"""The model card of an exported folder."""

import math
from collections.abc import Iterator
from typing import Any

from megatron_router_upcycling.hf import rounding
from megatron_router_upcycling.hf.export_job import Export
from megatron_router_upcycling.hf.files import MODELLING_FILE


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
    return text + _router_section(job, record) if job.router else text


def _router_section(job: Export, record: dict[str, Any]) -> str:
    router = job.router
    assert router is not None
    kind = router.kind.card.format(router=router)
    order = "softmax, then top-k" if router.pre_softmax else "top-k, then softmax"
    if job.is_stock:
        folded = "It is linear in the hidden state, and stands here as one gate a layer, folded in float32."
    else:
        how = router.kind.exported.format(rows=job.gate["weight"][0])
        folded = f"It stands here {how}: see `{MODELLING_FILE}`, which needs transformers 5."
    notes = "".join(f"\n\n{note}" for note in _notes(job))
    tools = "".join(f"- {sentence}.\n" for sentence in _elsewhere(job))
    elsewhere = f"\n## In other tools\n\n{tools}" if job.is_stock else ""
    return f"""
## Router

{router.num_experts} experts, {router.top_k} a token; the router is {kind}; {order}. {folded}{notes}

Precision: {rounding.describe(record)}
(random hidden states of unit variance, through each layer's norm).
{elsewhere}"""


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
    if job.aux_losses:
        assert job.router is not None
        given = " and ".join(f"`{kind}` {value:g}" for kind, value in job.aux_losses.items())
        what = f"trained with Megatron's {given}"
        if job.is_untrained:
            what = f"the experts have not been trained yet; for their training the paper's {given}"
        count, k = len(model.expert_layers), job.router.top_k
        yield (
            f"Load balancing: {what}, added up over {count} layers. transformers has one loss over all layers"
            f" together, which counts each of a token's {k} choices, and adds it only with"
            f" `output_router_logits=True`. `router_aux_loss_coef` {job.aux_loss_coefficient:g} (that times"
            f" {count}/{k}) gives routers the same gradients where the layers load their experts alike, and"
            " otherwise those of the mean load over layers."
        )


def _elsewhere(job: Export) -> Iterator[str]:
    """Where other tools take the folder for another model, or train other parts of it, without a word."""
    yield from job.faults
    yield (
        "transformers 5 saves config.json without `rope_theta` (and Qwen3-MoE's without `num_experts`), and"
        " transformers 4 then takes its own defaults. Put them back before it, or a tool of its time, reads"
        " what transformers 5 has saved"
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
