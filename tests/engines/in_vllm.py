"""Log-probabilities of tokens in vLLM, for its own environment: FOLDER DTYPE TENSOR_PARALLEL TOKENS OUT.

TOKENS is a JSON file of lists of token ids. OUT gets, for each list, the log-probability of every token but
the first after those before it.
"""

import json
import sys
from pathlib import Path

import vllm


def main(folder: str, dtype: str, tensor_parallel: str, tokens: str, out: str) -> None:
    model = vllm.LLM(
        folder,
        dtype=dtype,
        tensor_parallel_size=int(tensor_parallel),
        skip_tokenizer_init=True,
        enforce_eager=True,
        max_model_len=64,
        max_num_seqs=4,
        enable_prefix_caching=False,
    )
    prompts = json.loads(Path(tokens).read_text())
    asked = vllm.SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False, temperature=0.0)
    answers = model.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
    found = [
        [answer.prompt_logprobs[place][token].logprob for place, token in enumerate(prompt) if place]
        for prompt, answer in zip(prompts, answers, strict=True)
    ]
    Path(out).write_text(json.dumps({"version": vllm.__version__, "logprobs": found}))


if __name__ == "__main__":
    main(*sys.argv[1:])
