"""submit.sh --local: from text and a Hugging Face folder to an evaluated mixture, on this machine."""

import math
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests import hf_models, launch, warm
from tests.slurm_cluster import wait_until

SUBMIT = launch.ROOT / "scripts" / "submit.sh"
TEXTS = sorted((launch.ROOT / "docs").glob("*.md"))
END = "<|endoftext|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Qwen2.5 of 14 heads in 2 groups with a byte-level BPE tokenizer of its own; 240 texts."""
    import transformers

    folder = tmp_path_factory.mktemp("a path") / "hf"
    whole, texts = "".join(path.read_text() for path in TEXTS), folder.parent / "the texts"
    texts.mkdir()
    for number in range(240):
        (texts / f"{number}.txt").write_text(whole[number * 300 : (number + 1) * 300])
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=[END], initial_alphabet=alphabet)
    bpe.train([str(path) for path in TEXTS], trainer)
    heads = {"hidden_size": 112, "num_attention_heads": 14, "num_key_value_heads": 2}
    hf_models.make("qwen2.5", folder, vocab_size=400, eos_token_id=0, max_position_embeddings=128, **heads)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END).save_pretrained(folder)
    return folder


def submit(*options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in (SUBMIT, *options)], env=launch.ENVIRONMENT | {"PYTHON": warm.PYTHON},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=launch.ROOT,
        # As from a terminal, also where the tests run in the background, which ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


@pytest.mark.slow
def test_from_text_to_an_evaluated_mixture_with_a_break(model: Path, tmp_path: Path) -> None:
    work = tmp_path / "a work"
    evaluate = ("--evaluate-flags", "--tasks stdlib --limit 4")
    options = ("--local", "--work", work, "--hf", model, "--nproc", 2, "--text", model.parent / "the texts")
    command = (*options, "--keys-flags", "--collect-iters 2", *evaluate, "--", "--log-interval", 1)
    first, log = submit(*command), work / "logs" / "train.log"
    wait_until(
        lambda: first.poll() is not None or (log.exists() and "iteration        3/" in log.read_text()),
        lambda: "".join(path.read_text()[-2000:] for path in (work / "logs").glob("*")),
    )
    assert first.poll() is None, first.communicate()
    first.send_signal(signal.SIGINT)
    said, errors = first.communicate(timeout=120)
    assert first.returncode == 130 and errors == ""
    assert "saving, then it ends" in said and "run the same command again to resume" in said
    assert (work / "run" / "run_state").read_text() == "stopped\n"

    again = submit(*command)
    said, errors = again.communicate(timeout=400)
    assert (again.returncode, errors) == (0, ""), said
    for stage in ("data", "import", "keys", "convert"):
        assert f"{stage:9} {work}" in said and f"{stage}.log" not in said  # it was there
    assert re.search(r"step \d+/\d+, loss [\d.]+, [\d,]+ tokens/s, \d+ (s|min) left", said)
    assert (work / "hf" / "tokenizer.json").is_file() and (work / "evaluation" / "results.json").is_file()
    assert f"{work}/hf (Qwen2MoeForCausalLM, 8 experts, 2 a token)" in said and f"{math.log(400):.4f}" in said
    assert re.search(r"loss on held-out text .*\n +this model +\d\.\d+\n +the dense model +\d\.\d+\n", said)
    assert (work / "report" / "report.html").is_file()
    assert "tied" not in (work / "logs" / "convert.log").read_text()
    assert "Warning" not in log.read_text() and "adam_beta2" in (work / "run" / "arguments.txt").read_text()
    one_pass = yaml.safe_load((work / "one_pass.yaml").read_text())
    losses = launch.Output(0, log.read_text()).losses
    assert one_pass["seq_length"] == 128 and list(losses) == list(range(1, one_pass["train_iters"] + 1))

    flags = ("--config", work / "train.yaml", "--load", work / "moe", "--data-path", work / "data" / "text")
    assert losses == launch.ranks(2, "pretrain", *flags, "--log-interval", 1).ok().losses

    changed = (*options, "--convert-flags", "--num-experts 4", *command[len(options) :])
    for asked, differs in ((changed, "--convert-flags"), ((*command, "--lr", 1), "the flags of pretrain")):
        said, errors = submit(*asked).communicate(timeout=60)
        assert said == "" and errors.startswith(f"error: {differs}: ") and "name another --work" in errors


def test_in_slurm_the_text_comes_first(model: Path, tmp_path: Path) -> None:
    for name in ("dense", "moe"):
        base = f"{launch.ROOT}/configs/qwen1.5-0.5b-8x/{name}.yaml"
        (tmp_path / f"{name}.yaml").write_text(f"base: {base}\nseq_length: 128\n")
    options = ("--dry-run", "--work", tmp_path / "work", "--hf", model, "--config", tmp_path / "moe.yaml")
    output, errors = submit(*options, "--text", TEXTS[0], "--data-flags", "--workers 8").communicate()
    data, imported, keys, *_ = output.splitlines()
    assert not errors and data.endswith("data.sbatch' '--workers' '8'") and "--dependency" not in data
    assert "import.sbatch" in imported and "'--dependency=afterok:DATA'" in imported
    assert "keys.sbatch" in keys and "'--dependency=afterok:IMPORT'" in keys


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--text", "/not/there"), "--text /not/there: no such file or folder"),
        (("--text", TEXTS[0], "--data", "x"), "--text: not with --data"),
        (("--text", TEXTS[0], "--container", "image"), "--local: not with --container"),
        ((), "--data or --text: name the training data"),
        (("--text", launch.ROOT / "configs" / "one_machine" / "dense.yaml"), "--text: gives at most"),
        (("--text", TEXTS[0], "--nproc", 3), "--global-batch-size 32: is not divisible by"),
        (("--text", TEXTS[0], "--convert-flags", "--num-routers 5"), "--num-routers 5: does not fit 14"),
        (("--text", TEXTS[0], "--convert-flags", "--top-k 1 --no-moe-router-pre-softmax"), "--top-k 1 with"),
        (("--text", TEXTS[0], "--evaluate-flags", "--tasks stdlb"), "--tasks stdlb: give names of"),
        (("--text", TEXTS[0], "--data-flags", "'x"), "--data-flags 'x: a quote is missing in it"),
    ],
)
def test_mistakes_are_one_line(model: Path, tmp_path: Path, options: tuple[object, ...], said: str) -> None:
    process = submit("--local", "--work", tmp_path / "work", "--hf", model, *options)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and output == "" and not (tmp_path / "work").exists()
    assert errors.startswith(f"error: {said}") and errors.count("\n") == 1


def test_a_model_of_unknown_length_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").write_text("num_layers: 2\n")
    done = launch.run(sys.executable, SUBMIT.with_name("one_pass.py"), tmp_path, tmp_path / "out.yaml")
    assert (done.returncode, done.text.count("\n")) == (2, 1) and done.errors
    assert "max_position_embeddings" in done.text and not (tmp_path / "out.yaml").exists()


def test_stage_that_fails_ends_the_chain_with_its_reason(model: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n' * 1000)
    process = submit("--local", "--work", tmp_path / "work", "--hf", model, "--text", tmp_path / "bad.jsonl")
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 2 and "data.log ... ended after" in output and "import" not in output
    assert "bad.jsonl" in errors and errors.count("\n") == 1
