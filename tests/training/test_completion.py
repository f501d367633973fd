"""What flags leave out or contradict: filled in, or one line that names them, whose advice works."""

import ast
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import launch
from tests.repository import PACKAGE, ROOT

# A whole run; a case leaves out some of its flags and adds others.
RUN: dict[str, tuple[object, ...]] = {
    "--num-layers": (2,), "--hidden-size": (32,), "--num-attention-heads": (4,), "--disable-bias-linear": (),
    "--position-embedding-type": ("rope",), "--max-position-embeddings": (16,), "--seq-length": (16,),
    "--micro-batch-size": (2,), "--global-batch-size": (4,), "--train-iters": (8,), "--lr": (1e-3,),
    "--tokenizer-type": ("NullTokenizer",), "--vocab-size": (64,), "--mock-data": (),
}  # fmt: skip
MOE = "--num-experts 4 --router linear"

# (left out of RUN, added) -> what is filled in, and the line that says so.
FILLED: list[tuple[str, str, dict[str, int], str | None]] = [
    ("", "--eval-iters 0", {"eval_interval": 9}, None),
    ("", "--eval-iters 0 --eval-interval 0", {"eval_interval": 9}, None),
    ("", "", {"eval_interval": 9}, "--eval-interval is not given: validation comes at the end only"),
    ("", "--save {}", {"save_interval": 9}, "--save-interval is not given: a checkpoint is saved at the end"),
    ("--train-iters", "--save {} --train-samples 32", {"save_interval": 33}, "--save-interval is not given"),
    ("--train-iters --lr", "--skip-train", {"train_iters": 0, "eval_interval": 1}, None),
]
# (left out, added, the message's beginning, flags that it advises and that mend it)
REFUSED: list[tuple[str, str, str, str]] = [
    ("--num-layers", "", "--num-layers: is missing; give the architecture", "--num-layers 2"),
    ("--hidden-size", "", "--hidden-size: is missing; give the architecture", "--hidden-size 32"),
    ("--num-attention-heads", "", "--num-attention-heads: is missing; give", "--num-attention-heads 4"),
    ("--seq-length", "", "--seq-length: is missing", "--seq-length 16"),
    ("--max-position-embeddings", "", "--max-position-embeddings: is missing; give at least --seq-length",
     "--max-position-embeddings 16"),
    ("--micro-batch-size", "", "--micro-batch-size: is missing", "--micro-batch-size 2"),
    ("--lr", "", "--lr: is missing; give", "--lr 1e-3"),
    ("--train-iters", "", "--train-iters: is missing; give 1 or more, or --skip-train", "--skip-train"),
    ("--train-iters", "", "--train-iters: is missing; give 1 or more", "--train-iters 1"),
    ("", "--train-iters 0", "--train-iters 0: is no length; give 1 or more, or --skip-train", "--skip-train"),
    ("", "--train-iters -1", "--train-iters -1: is no length", "--train-iters 1"),
    ("", "--seq-length 0", "--seq-length 0: must be at least 1", "--seq-length 1"),
    ("", "--micro-batch-size 0", "--micro-batch-size 0: must be at least 1", "--micro-batch-size 1"),
    ("", "--global-batch-size 0", "--global-batch-size 0: must be at least 1", "--global-batch-size 2"),
    ("", "--log-interval 0", "--log-interval 0: must be at least 1", "--log-interval 1"),
    ("", "--tensorboard-log-interval 0", "--tensorboard-log-interval 0: must be at least 1",
     "--tensorboard-log-interval 1"),
    ("", "--eval-interval 0", "--eval-interval 0: must be at least 1", "--eval-interval 1"),
    ("", "--eval-iters -1", "--eval-iters -1: must be at least 0", "--eval-iters 0"),
    ("", "--save {} --save-interval 0", "--save-interval 0: must be at least 1", "--save-interval 1"),
    ("", "--min-lr -1", "--min-lr -1.0: must be at least 0", "--min-lr 0"),
    ("", "--min-lr 1", "Megatron refuses these arguments: --min-lr 1.0, --lr 0.001 (assert", "--min-lr 0"),
    ("", "--lr-warmup-init 1", "--lr-warmup-init 1.0: is more than --lr 0.001", "--lr-warmup-init 0"),
    ("", "--lr-warmup-iters 8", "--lr-warmup-iters 8: must be less than --lr-decay-iters 8",
     "--lr-decay-iters 9"),
    ("", "--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0: must be from 0 to less than 1",
     "--lr-warmup-fraction 0"),
    ("", "--lr-decay-iters 0", "--lr-decay-iters 0: must be at least 1", "--lr-decay-iters 1"),
    ("", "--lr-decay-style WSD", "--lr-decay-style WSD: give --lr-wsd-decay-iters",
     "--lr-wsd-decay-iters 1"),
    ("", "--weight-decay-incr-style linear --end-weight-decay 0.1",
     "Megatron refuses these arguments: --start-weight-decay None (assert", "--start-weight-decay 0"),
    ("", "--weight-decay-incr-style linear --end-weight-decay 0.1 --start-weight-decay 0.2",
     "--end-weight-decay 0.1: is less than --start-weight-decay 0.2", "--start-weight-decay 0.1"),
    ("--tokenizer-type", "", "--tokenizer-model None: --tokenizer-type None finds no",
     "--tokenizer-type NullTokenizer"),
    ("--mock-data", "", "--data-path: name the data", "--mock-data"),
    ("", "--transformer-impl inference_optimized", "--transformer-impl inference_optimized: is for text",
     "--transformer-impl transformer_engine"),
    ("", "--transformer-impl inference_optimized", "--transformer-impl inference_optimized: is for text",
     "--transformer-impl local"),
    ("", f"{MOE} --top-k 5", "--top-k 5: must be between 1 and --num-experts 4", "--top-k 4"),
    ("", f"{MOE} --top-k 5", "--top-k 5: must be between 1 and --num-experts 4", "--num-experts 5"),
    ("", "--num-experts 4 --router switch", "--router switch: sends a token to one expert",
     "--top-k 1 --moe-router-pre-softmax"),
    ("", f"{MOE} --locality-loss-coeff 1", "locality_loss_coeff 1.0: is for --router locmoe, not for linear",
     "--router locmoe"),
    ("", "--device cuda", "--device cuda: no GPU is visible here; use --device cpu or", "--device cpu"),
    ("", "--device cuda", "--device cuda: no GPU is visible here; use --device cpu or", "--device auto"),
    ("", "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
     "--override-opt-param-scheduler, --use-checkpoint-opt-param-scheduler: give one of the two", ""),
    ("", "--sft", "--sft: this trains on documents", ""),
    ("", "--dataloader-inter-document-masking", "--dataloader-inter-document-masking: is not supported; give",
     ""),
    ("", "--sample-rate 0.5", "--sample-rate 0.5: nothing in Megatron's training reads it", ""),
    ("", "--mask-type row", "--mask-type row: is for Megatron's vision models", "--mask-type random"),
    ("", "--inprocess-restart", "--inprocess-restart: is not supported", ""),
    ("", "--yaml-cfg run.yaml", "--yaml-cfg run.yaml: is not supported; name a file", ""),
    ("", "--optimizer soap --save {}", "--optimizer soap: Megatron-Core 0.19 cannot save", "--no-save-optim"),
    ("", "--optimizer adaptive_muon", "--optimizer adaptive_muon: fails at its first step",
     "--optimizer muon"),
    ("", "--optimizer muon --use-distributed-optimizer", "--use-distributed-optimizer: with Muon and its kin",
     ""),
    ("", f"{MOE} --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1",
     "--moe-router-load-balancing-type sinkhorn: has no auxiliary", "--moe-aux-loss-coeff 0"),
    ("--mock-data", "--train-data-path none --multiple-validation-sets",
     "--multiple-validation-sets: works only with --full-validation", ""),
    ("", "--moe-router-load-balancing-type none --lr-warmup-fraction 0.1 --lr-warmup-iters 1",
     "Megatron refuses these arguments: can only specify one of", ""),
]  # fmt: skip


def command(left_out: str, added: str, save: Path | str = "") -> list[str]:
    kept = [word for flag, values in RUN.items() if flag not in left_out.split() for word in (flag, *values)]
    return [*map(str, kept), *added.format(save).split()]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each case's command -> the arguments that were filled in and what was printed, or the error.

    All in one process: most of the time of a start is Megatron's import.
    """
    save = tmp_path_factory.mktemp("save") / "run"
    commands = [command(left_out, added, save) for left_out, added, *_ in FILLED]
    for left_out, added, _, mend in REFUSED:
        commands += [command(left_out, added, save), command(left_out, f"{added} {mend}", save)]
    file = save.with_name("commands")
    file.write_text(json.dumps(commands))
    program = f"from tests.training import test_completion as t; t.prepare_all({str(file)!r})"
    launch.python("-c", program).ok()
    found = json.loads(file.with_name("outcomes").read_text())
    return {
        " ".join(words).replace(str(save), "SAVE"): outcome
        for words, outcome in zip(commands, found, strict=True)
    }


def prepare_all(file: str) -> None:
    """Prepare the run of each command in ``file``, as ``pretrain`` does before anything is built."""
    import contextlib
    import io

    from megatron_router_upcycling.errors import UserError
    from megatron_router_upcycling.training import launch as training_launch

    outcomes: list[dict[str, Any]] = []
    for argv in json.loads(Path(file).read_text()):
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said):
                args = training_launch.prepare(argv).args
        except UserError as error:
            outcomes.append({"error": str(error)})
        else:
            names = ("eval_interval", "save_interval", "train_iters")
            outcomes.append({"said": said.getvalue()} | {name: getattr(args, name) for name in names})
        forget()
    Path(file).with_name("outcomes").write_text(json.dumps(outcomes))


def forget() -> None:
    """What Megatron keeps for a whole process."""
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.training.global_vars import destroy_global_vars

    destroy_global_vars()
    unset_num_microbatches_calculator()


def of(outcomes: dict[str, Any], left_out: str, added: str) -> dict[str, Any]:
    return outcomes[" ".join(command(left_out, added, "SAVE"))]


@pytest.mark.parametrize(("left_out", "added", "values", "line"), FILLED)
def test_what_is_left_out_has_a_sane_value(
    outcomes: dict[str, Any], left_out: str, added: str, values: dict[str, int], line: str | None
) -> None:
    found = of(outcomes, left_out, added)
    assert "error" not in found, found
    assert {name: found[name] for name in values} == values
    assert line in found["said"] if line else "is not given" not in found["said"]


@pytest.mark.parametrize(("left_out", "added", "message", "mend"), REFUSED)
def test_one_line_names_the_flag_and_its_advice_works(
    outcomes: dict[str, Any], left_out: str, added: str, message: str, mend: str
) -> None:
    found = of(outcomes, left_out, added)
    assert found.get("error", "").startswith(message), found
    if mend:
        assert "error" not in (mended := of(outcomes, left_out, f"{added} {mend}")), mended


def test_what_megatron_says_while_it_sets_up_is_one_line() -> None:
    words = command("", f"{MOE} --expert-model-parallel-size 2")
    refused = launch.python("-m", "megatron_router_upcycling.pretrain", *words)
    assert refused.returncode == 2 and "Traceback" not in refused.text
    assert refused.errors == [
        "error: Megatron refuses these arguments: world_size (1) is not divisible by"
        " expert_tensor_model_pipeline_parallel size (2)"
    ]


def test_an_moe_on_tensor_parallel_ranks_needs_sequence_parallelism() -> None:
    words = command("--train-iters", f"--train-iters 1 --eval-iters 0 {MOE} --tensor-model-parallel-size 2")
    refused = launch.ranks(2, "pretrain", *words)
    assert refused.returncode == 2 and refused.errors[0].endswith(
        " only with --sequence-parallel; give that too"
    )
    words += ["--sequence-parallel", "--routing-diagnostics-interval", "0"]
    refused = launch.ranks(2, "pretrain", *words)
    assert refused.errors == [
        "error: --routing-diagnostics-interval 0: must be at least 1 (--no-routing-diagnostics collects none)"
    ]
    launch.ranks(2, "pretrain", *words, "--no-routing-diagnostics").ok()


# Flags that messages of training advise and that are given in other tests.
TRIED_ELSEWHERE = {
    "--no-load-optim": "test_resuming.py",
    "--override-opt-param-scheduler": "resume_in_one_process.py",
    "--use-checkpoint-opt-param-scheduler": "resume_in_one_process.py",
    "--optimizer": "test_resuming.py",
    "--sequence-parallel": "test_completion.py",
    "--load": "test_training.py",
    "--no-routing-diagnostics": "test_completion.py",
    "--data-cache-path": "test_data_flags.py",
    "--full-validation": "test_data_flags.py",
    "--ckpt-convert-format": "test_resuming.py",
    "--moe-router-pre-softmax": "../commands/test_convert_cli.py",
    "--no-moe-router-pre-softmax": "../commands/test_convert_cli.py",
}


def test_every_flag_that_a_message_advises_is_given_in_a_test() -> None:
    advised = {flag for text in messages("training", "routers", "config") for flag in advice(text)}
    mending = {word for *_, mend in REFUSED for word in mend.split() if word.startswith("--")}
    assert {"--sequence-parallel", "--no-load-optim", "--skip-train"} <= advised
    given = mending | set(TRIED_ELSEWHERE)
    assert not {flag for flag in advised if not any(word.startswith(flag) for word in given)}
    for flag, file in TRIED_ELSEWHERE.items():
        text = (Path(__file__).parent / file).read_text(encoding="utf-8")
        assert flag in text or flag.lstrip("-").replace("-", "_") in text, (flag, file)


def advice(message: str) -> set[str]:
    """The flags that a message tells to give, not those that it says were changed or read."""
    told = set(re.findall(r"(?:give|pass|with|use|or|and) (--[a-z][a-z-]+)", message))
    return told - {"--use-mup", "--save"}


def messages(*rooms: str) -> Iterator[str]:
    """What the UserErrors of some rooms say, values left out."""
    for room in rooms:
        for path in sorted((ROOT / PACKAGE / room).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "UserError":
                    parts = (part.value for part in ast.walk(node) if isinstance(part, ast.Constant))
                    yield "".join(part for part in parts if isinstance(part, str))


def test_a_run_without_intervals_validates_and_saves_at_its_end(tmp_path: Path) -> None:
    save = tmp_path / "save"
    words = command("--train-iters", "--train-iters 3 --eval-iters 1 --save {}", save)
    text = launch.python("-m", "megatron_router_upcycling.pretrain", *words).ok().text
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert text.count("validation loss at iteration 3 on validation set") == 1


if __name__ == "__main__":
    prepare_all(sys.argv[1])
