"""Log-probabilities of tokens in vLLM, for its own environment: JOBS TOKENS OUT, three JSON files.

JOBS lists [folder, dtype, tensor parallel size], TOKENS lists of token ids. OUT gets, for each job, the
log-probability of every token but the first after those before it, a list for each of TOKENS.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

# One process where tensor parallelism needs no more: importing vLLM takes longer than all else.
os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
import vllm  # noqa: E402
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory  # noqa: E402


def logprobs(folder: str, dtype: str, tensor_parallel: int, prompts: list[list[int]]) -> Any:
    options = {"skip_tokenizer_init": True, "enforce_eager": True, "enable_prefix_caching": False}
    sizes = {"tensor_parallel_size": tensor_parallel, "max_model_len": 64, "max_num_seqs": 4}
    model = vllm.LLM(folder, dtype=dtype, **options, **sizes)
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0.0)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    del model
    cleanup_dist_env_and_memory()
    return [
        [answer.prompt_logprobs[place][token].logprob for place, token in enumerate(prompt) if place]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]


def main(jobs: str, tokens: str, out: str) -> None:
    prompts = json.loads(Path(tokens).read_text())
    found = [logprobs(*job, prompts) for job in json.loads(Path(jobs).read_text())]
    Path(out).write_text(json.dumps({"version": vllm.__version__, "logprobs": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
