"""Exports in vLLM and in llama.cpp: they load, and give tokens the probabilities that transformers gives.

``make test-engines`` makes the engines' environments. docs/hugging_face.md reports the ``figure:`` lines.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests import hf_models
from tests.hf.folders import make_stats_of
from tests.hf.folders import run as command

pytestmark = pytest.mark.engines
ROOT = Path(__file__).parents[2]
ENGINES = ROOT / ".engines"
HERE = Path(__file__).parent
TOKENS = [[(start + 37 * place) % 250 for place in range(32)] for start in (3, 11)]
PRE, POST = "--moe-router-pre-softmax", "--no-moe-router-pre-softmax"
# llama.cpp's Q4_K_M wants multiples of 256, vLLM's attention on the CPU heads of at least 32.
SIZES = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 32}
# Name -> family, options of convert.
MODELS: dict[str, tuple[str, tuple[object, ...]]] = {
    "Qwen2-MoE, softmax first": ("qwen1.5", (PRE,)),
    "Qwen2-MoE, top-k first": ("qwen1.5", (POST,)),
    "Qwen3-MoE, softmax first": ("qwen3", (PRE,)),
    "Qwen3-MoE, top-k first": ("qwen3", (POST,)),
    "tied Qwen2-MoE": ("qwen2.5", (PRE,)),
    "tied Qwen3-MoE": ("qwen3-tied", (POST,)),
    "shared expert": ("qwen1.5", (PRE, "--shared-expert")),
    "finer experts": ("qwen3", (POST, "--granularity", 2)),
    "some layers": ("qwen1.5", (PRE, "--layers", "1")),
}
OTHER_ORDER = ("Qwen2-MoE, top-k first", "Qwen3-MoE, softmax first")  # than llama.cpp's


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder for each of MODELS, with a tokenizer."""
    folder, found = tmp_path_factory.mktemp("engines"), {}
    for number, (name, (family, options)) in enumerate(MODELS.items()):
        hf, dense, moe, out = (folder / f"{number} {what}" for what in ("hf", "dense", "moe", "out"))
        hf_models.make(family, hf, **SIZES)
        write_tokenizer(hf)
        assert command("import-hf", hf, dense) == 0
        make_stats_of(stats := folder / "key_stats", dense)
        assert command("convert", dense, moe, "--key-stats", stats, "--num-experts", 4, *options) == 0
        assert command("export-hf", moe, out) == 0
        found[name] = out
    return found


def write_tokenizer(folder: Path) -> None:
    """Byte-level, as Qwen's are, of the bytes that 250 tokens have room for."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:248]
    vocabulary = {token: number for number, token in enumerate([*letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    fast.save_pretrained(folder)


def python_of(engine: str) -> Path:
    if not (ENGINES / engine / "ready").exists():
        pytest.skip(f"no {engine} in {ENGINES}; make test-engines installs it, {engine}.log says why not")
    return ENGINES / engine / "bin/python"


def run(*program: object) -> None:
    ended = subprocess.run(list(map(str, program)), capture_output=True, text=True, timeout=3600)
    assert ended.returncode == 0, (ended.stdout + ended.stderr)[-6000:]


def ask(tmp_path: Path, *program: object) -> tuple[torch.Tensor, str]:
    """The log-probabilities [..., prompts, tokens - 1] that a script finds, and its engine's version."""
    tokens, out = tmp_path / "tokens.json", tmp_path / "out.json"
    tokens.write_text(json.dumps(TOKENS))
    run(*program, tokens, out)
    answer = json.loads(out.read_text())
    return torch.tensor(answer["logprobs"], dtype=torch.float64), answer["version"]


def in_transformers(folder: Path) -> torch.Tensor:
    tokens = torch.tensor(TOKENS)
    logprobs = hf_models.logits(folder, tokens, dtype=torch.float32).double().log_softmax(-1)
    return logprobs[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]


def figure(engine: str, what: str, found: torch.Tensor, folder: Path) -> float:
    difference = float((found - in_transformers(folder)).abs().max())
    print(f"figure: {engine}: {what}: largest difference of a log-probability {difference:.1e}")
    return difference


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_vllm(exported: dict[str, Path], tmp_path: Path, tensor_parallel: int) -> None:
    """Every model in float32 and bfloat16; each family and order at tensor parallel 2 as well, in float32."""
    python, jobs = python_of("vllm"), tmp_path / "jobs.json"
    runs = [(name, dtype) for name in MODELS for dtype in ("float32", "bfloat16")]
    if tensor_parallel > 1:
        runs = [(name, "float32") for name in MODELS if "first" in name]
    jobs.write_text(json.dumps([(str(exported[name]), dtype, tensor_parallel) for name, dtype in runs]))
    found, version = ask(tmp_path, python, HERE / "in_vllm.py", jobs)
    for (name, dtype), logprobs in zip(runs, found, strict=True):
        what = f"{name}, {dtype}, TP {tensor_parallel}"
        difference = figure(f"vLLM {version}", what, logprobs, exported[name])
        assert difference < (1e-4 if dtype == "float32" else 0.5), what


def gguf(folder: Path) -> Path:
    """The exported model as a GGUF file beside its folder, in float32."""
    python_of("llama_cpp")
    file = folder.with_suffix(".gguf")
    if not file.exists():
        run(sys.executable, HERE / "to_gguf.py", ENGINES / "llama_cpp/source", folder, file)
    return file


@pytest.mark.parametrize("name", [name for name in MODELS if name != "some layers"])
@pytest.mark.parametrize(("quantisation", "tolerance"), [("none", 1e-3), ("Q8_0", 0.5), ("Q4_K_M", 3.0)])
def test_llama_cpp(
    exported: dict[str, Path], tmp_path: Path, name: str, quantisation: str, tolerance: float
) -> None:
    """In the other order it computes another model, as export-hf says: else it has learned norm_topk_prob."""
    script = (python_of("llama_cpp"), HERE / "in_llama_cpp.py", gguf(exported[name]), quantisation)
    found, version = ask(tmp_path, *script)
    difference = figure(f"llama.cpp {version}", f"{name}, {quantisation}", found, exported[name])
    if name not in OTHER_ORDER:
        assert difference < tolerance  # False for NaN
    elif quantisation == "none":
        assert difference > 0.01


def test_llama_cpp_does_not_take_a_model_with_experts_in_some_layers(exported: dict[str, Path]) -> None:
    """What export-hf says. Its converter stops."""
    with pytest.raises(AssertionError, match="Can not map tensor 'model.layers.0.mlp.down_proj.weight'"):
        gguf(exported["some layers"])
