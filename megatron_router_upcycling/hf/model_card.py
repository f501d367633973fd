"""The model card of an exported folder."""

from typing import Any

from megatron_router_upcycling import __version__
from megatron_router_upcycling.hf.export_job import Export
from megatron_router_upcycling.hf.files import MODELLING_FILE
from megatron_router_upcycling.hf.rounding import Rounding


def model_card(job: Export, record: dict[str, Any]) -> str:
    """README.md: what the model is and what made it."""
    code = "" if job.is_stock else ", trust_remote_code=True"
    source = record["source"]
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

Exported by megatron-router-upcycling {__version__} (`router-upcycle export-hf`) from the Megatron checkpoint
`{source["name"]}`, `{source["iteration"]}`, whose index has SHA-256 `{source["digest"]}`.
"""
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
    shared = ""
    if job.model.family == "qwen2":
        shared = "\n\nThe shared expert that the class asks for is all zeros: it adds exactly nothing."
    assert isinstance(record["rounding"], dict)
    rounding = Rounding(**record["rounding"]).describe(record["dtype"])
    return f"""
## Router

{router.num_experts} experts, {router.top_k} a token; the router is {kind}; {order}. {folded}{shared}

Precision: {rounding}
(random hidden states of unit variance, through each layer's norm).
"""
