"""What flags leave out or contradict: filled in, or one line that names them, whose advice works."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests import launch

# A whole run; a case leaves out some of its flags and adds others.
RUN: dict[str, tuple[object, ...]] = {
    "--num-layers": (2,), "--hidden-size": (32,), "--num-attention-heads": (4,), "--disable-bias-linear": (),
    "--position-embedding-type": ("rope",), "--max-position-embeddings": (16,), "--seq-length": (16,),
    "--micro-batch-size": (2,), "--global-batch-size": (4,), "--train-iters": (8,), "--lr": (1e-3,),
    "--tokenizer-type": ("NullTokenizer",), "--vocab-size": (64,), "--mock-data": (),
}  # fmt: skip
MOE = "--num-experts 4 --router linear"
TP2 = "--tensor-model-parallel-size 2"
REFUSES = "Megatron refuses these arguments: "

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
    *(
        (flag, "", f"{flag}: is missing; give it in flags or --config, or --load", "")
        for flag in ("--num-layers", "--hidden-size", "--seq-length", "--micro-batch-size")
    ),
    ("--lr", "", "--lr: is missing; give", ""),
    ("--train-iters", "", "--train-iters: give 1 or more, or --skip-train", "--skip-train"),
    ("", "--train-iters -1", "--train-iters: give 1 or more", ""),
    ("", "--seq-length 0", "--seq-length 0: must be at least 1", ""),
    ("", "--log-interval 0", "--log-interval 0: must be at least 1", ""),
    ("", "--eval-interval 0", "--eval-interval 0: must be at least 1", ""),
    ("", "--eval-iters -1", "--eval-iters -1: must be at least 0", ""),
    ("", "--save {} --save-interval 0", "--save-interval 0: must be at least 1", ""),
    ("", "--routing-diagnostics-interval 0", "--routing-diagnostics-interval 0: must be at least 1", ""),
    ("", "--micro-batch-size 0", f"{REFUSES}--micro-batch-size 0 (assert", ""),
    ("", "--min-lr -1", f"{REFUSES}--min-lr -1.0 (assert self.min_lr >= 0.0", ""),
    ("", "--min-lr 1", f"{REFUSES}--min-lr 1.0, --lr 0.001 (assert", "--min-lr 0"),
    ("", "--lr-warmup-init 1", f"{REFUSES}--lr-warmup-init 1.0, --lr 0.001 (assert", ""),
    ("", "--lr-warmup-iters 8", f"{REFUSES}--lr-warmup-iters 8, --lr-decay-iters 8 (assert",
     "--lr-decay-iters 9"),
    ("--train-iters", "--train-samples 32 --lr-warmup-samples 32",
     f"{REFUSES}--lr-warmup-samples 32, --lr-decay-samples 32 (assert", "--lr-decay-samples 33"),
    ("", "--lr-warmup-fraction 1", "--lr-warmup-fraction 1.0: must be from 0 to less than 1", ""),
    ("", "--lr-decay-style WSD", f"{REFUSES}--lr-wsd-decay-iters None (assert", "--lr-wsd-decay-iters 1"),
    ("", "--weight-decay-incr-style linear --end-weight-decay 0.1 --start-weight-decay 0.2",
     f"{REFUSES}--end-weight-decay 0.1, --start-weight-decay 0.2 (assert", "--start-weight-decay 0.1"),
    ("--tokenizer-type", "", "--tokenizer-model None: --tokenizer-type None finds no", ""),
    ("--tokenizer-type", "--tokenizer-type SentencePieceTokenizer --tokenizer-model /not/there",
     "--tokenizer-model /not/there: --tokenizer-type SentencePieceTokenizer finds no tokenizer", ""),
    ("", "--num-layerz 3", "unrecognized arguments: --num-layerz 3", ""),
    ("--mock-data", "", "--data-path: name the data", "--mock-data"),
    ("", "--transformer-impl inference_optimized", "--transformer-impl inference_optimized: is for text",
     "--transformer-impl local"),
    ("", f"{MOE} --top-k 5", "--top-k 5: must be between 1 and --num-experts 4", "--top-k 4"),
    ("", "--num-experts 4 --router switch", "--router switch: needs --top-k 1",
     "--top-k 1 --moe-router-pre-softmax"),
    ("", f"{MOE} --locality-loss-coeff 1", "locality_loss_coeff 1.0: is for --router locmoe, not for linear",
     "--router locmoe"),
    ("", "--device cuda", "--device cuda: no GPU is visible here; use --device cpu or", "--device auto"),
    ("", "--override-opt-param-scheduler --use-checkpoint-opt-param-scheduler",
     f"{REFUSES}both override and use-checkpoint are set", ""),
    ("", "--sft", "--sft: is no part of this training; leave it out", ""),
    ("", "--dataloader-inter-document-masking", "--dataloader-inter-document-masking: is no part of this"
     " training; give --reset-attention-mask", ""),
    ("", "--sample-rate 0.5", "--sample-rate 0.5: is no part of this training", ""),
    ("", "--mask-type row", "--mask-type row: is no part of this training", "--mask-type random"),
    ("", "--inprocess-restart", "--inprocess-restart: is no part of", ""),
    ("", "--yaml-cfg run.yaml", "--yaml-cfg run.yaml: is no part of this training; name a file", ""),
    ("", "--optimizer soap --save {}", "--optimizer soap: Megatron-Core 0.19 cannot save", "--no-save-optim"),
    ("", "--optimizer adaptive_muon", "--optimizer adaptive_muon: fails at its first step",
     "--optimizer muon"),
    ("", "--optimizer muon --use-distributed-optimizer", "--use-distributed-optimizer: with Muon and its kin",
     ""),
    ("", f"{MOE} --moe-router-load-balancing-type sinkhorn --moe-aux-loss-coeff 0.1",
     "--moe-router-load-balancing-type sinkhorn: has no auxiliary", "--moe-aux-loss-coeff 0"),
    ("", "--lr-warmup-fraction 0.1 --lr-warmup-iters 1", f"{REFUSES}can only specify one of", ""),
]  # fmt: skip
# What is added, and CUDA_DEVICE_MAX_CONNECTIONS after it, which tensor and context parallelism want.
QUEUES = [
    ("", None),
    ("--expert-model-parallel-size 2", None),
    (TP2, "1"),
    ("--context-parallel-size=2", "1"),
    ("--config cut.yaml", "1"),
    ("--config cut.yaml --tensor-model-parallel-size 1", None),
    (f"{TP2} --use-megatron-fsdp", None),
]


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
        commands += [command(left_out, f"{added} {more}", save) for more in {"", mend}]
    save.with_name("cut.yaml").write_text("tensor_model_parallel_size: 2\n")
    commands += [command("", added) for added, _ in QUEUES]
    file = save.with_name("commands")
    file.write_text(json.dumps(commands))
    program = f"from tests.training import test_arguments as t; t.prepare_all({str(file)!r})"
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
    os.chdir(Path(file).parent)
    for argv in json.loads(Path(file).read_text()):
        said = io.StringIO()
        os.environ.pop("CUDA_DEVICE_MAX_CONNECTIONS", None)
        try:
            with contextlib.redirect_stdout(said):
                args = training_launch.prepare(argv).args
        except UserError as error:
            outcomes.append({"error": str(error)})
        else:
            names = ("eval_interval", "save_interval", "train_iters")
            outcomes.append({"said": said.getvalue()} | {name: getattr(args, name) for name in names})
        outcomes[-1]["queues"] = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS")
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


@pytest.mark.parametrize(("added", "expected"), QUEUES)
def test_one_hardware_queue_only_where_the_order_of_launches_matters(
    outcomes: dict[str, Any], added: str, expected: str | None
) -> None:
    assert of(outcomes, "", added)["queues"] == expected


def test_what_megatron_says_while_it_sets_up_is_one_line() -> None:
    words = command("", f"{MOE} --expert-model-parallel-size 2")
    refused = launch.python("-m", "megatron_router_upcycling.pretrain", *words)
    assert refused.returncode == 2 and "Traceback" not in refused.text
    assert refused.errors == [
        "error: Megatron refuses these arguments: world_size (1) is not divisible by"
        " expert_tensor_model_pipeline_parallel size (2)"
    ]


def test_an_moe_on_tensor_parallel_ranks_needs_sequence_parallelism() -> None:
    words = command("--train-iters", f"--train-iters 1 --eval-iters 0 {MOE} {TP2} --no-routing-diagnostics")
    refused = launch.ranks(2, "pretrain", *words)
    assert refused.returncode == 2
    assert refused.errors[0].endswith(" only with --sequence-parallel; give that too")
    launch.ranks(2, "pretrain", *words, "--sequence-parallel").ok()


def test_a_run_without_intervals_validates_and_saves_at_its_end(tmp_path: Path) -> None:
    save = tmp_path / "save"
    words = command(
        "--train-iters", "--train-iters 3 --eval-iters 1 --save {} --lr-decay-style warmup-step-decay", save
    )
    text = launch.python("-m", "megatron_router_upcycling.pretrain", *words).ok().text
    assert (save / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert text.count("validation loss at iteration 3 on validation set") == 1
