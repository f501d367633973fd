"""Log-probabilities of tokens in llama.cpp, for its own environment: FILE.gguf QUANTISATION TOKENS OUT.

QUANTISATION is a name such as Q8_0, or none. TOKENS and OUT are as in ``in_vllm``.
"""

import importlib.metadata
import json
import sys
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def quantise(source: Path, name: str) -> Path:
    target = source.with_suffix(f".{name}.gguf")
    asked = llama_cpp.llama_model_quantize_default_params()
    asked.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{name}")
    asked.nthread = 2
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), asked):
        sys.exit(f"{source} could not be quantised to {name}")
    return target


def plain_parameters(made: Any = llama_cpp.llama_model_default_params) -> Any:
    """Without instructions that a virtual machine may name and not have (AMX)."""
    parameters = made()
    parameters.use_extra_bufts = False
    return parameters


def main(file: str, quantisation: str, tokens: str, out: str) -> None:
    path = Path(file) if quantisation == "none" else quantise(Path(file), quantisation)
    llama_cpp.llama_cpp.llama_model_default_params = plain_parameters
    options = {"logits_all": True, "verbose": False, "type_k": 0, "type_v": 0}  # 0: keys, values in float32
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=2, **options)
    found = []
    for prompt in json.loads(Path(tokens).read_text()):
        model.reset()
        model.eval(prompt)
        logits = np.asarray(model.scores[: len(prompt)], dtype=np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        found.append([logprobs[place, token] for place, token in enumerate(prompt[1:])])
    version = importlib.metadata.version("llama-cpp-python")
    Path(out).write_text(json.dumps({"version": version, "logprobs": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
