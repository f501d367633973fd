"""``router-upcycle evaluate``: the averages against the paper's own, and whole evaluations of tiny models."""

import copy
import itertools
import json
import math
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import pytest

from megatron_router_upcycling import cli
from megatron_router_upcycling.evaluation import paper, report, runner, stdlib_task
from tests import launch
from tests.data import small

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (pip install -e '.[eval]')")

make_stdlib_records = stdlib_task.records
# Table 1's averages as printed, in the order of paper.METHODS.
PRINTED = {
    "understanding": ("32.90", "49.40", "25.60", "44.80", "46.30", "50.80"),
    "reasoning": ("37.91", "49.61", "27.17", "44.95", "48.67", "51.86"),
    "knowledge": ("32.55", "35.14", "25.44", "35.35", "33.14", "37.31"),
    "average": ("34.76", "43.78", "26.17", "41.08", "41.98", "45.83"),
}
# Where the ten printed figures give another last digit: 194.65 / 4 and 261.62 / 10.
OTHERWISE = {("reasoning", "mlp"): "48.66", ("average", "switch"): "26.16"}


@pytest.mark.parametrize("method", paper.METHODS)
@pytest.mark.parametrize("group", PRINTED)
def test_averages_are_those_that_the_paper_prints(group, method):
    printed = PRINTED[group][paper.METHODS.index(method)]
    average = paper.averages(paper.figures(method, paper.TASKS))[group]
    assert average["complete"]
    assert report.percent(average["score"]) == OTHERWISE.get((group, method), printed)


def test_some_scores_give_averages_that_say_so():
    found = paper.averages({"copa": 60.0, "openbookqa": 20.0, "openbookqa_fact": 41.0, "stdlib": 99.0})
    assert set(found) == {"understanding", "knowledge", "average"}
    tasks = ["openbookqa", "openbookqa_fact"]
    assert found["understanding"] == {"score": 30.5, "tasks": tasks, "of": 2, "complete": True}
    assert found["average"] == {"score": 121 / 3, "tasks": [*tasks, "copa"], "of": 10, "complete": False}
    assert not found["knowledge"]["complete"]


@pytest.fixture(scope="module")
def stdlib_records() -> dict[str, list[dict[str, Any]]]:
    return stdlib_task.records()


@pytest.fixture(autouse=True)
def records_are_made_once(monkeypatch, stdlib_records) -> None:
    """Which takes seconds: the library is parsed."""
    monkeypatch.setattr(stdlib_task, "records", lambda: copy.deepcopy(stdlib_records))


def test_stdlib_records_are_sound_and_the_same_each_time(stdlib_records):
    made = stdlib_records
    assert made == make_stdlib_records()
    assert (len(made["test"]), len(made["train"])) == (stdlib_task.QUESTIONS, stdlib_task.EXAMPLES)
    answers = [record["answer"] for record in made["test"]]
    for record in made["test"]:
        assert len(set(record["choices"])) == stdlib_task.CHOICES
        assert all(choice == choice.strip() for choice in record["choices"])
    assert all(answers.count(index) > 20 for index in range(stdlib_task.CHOICES))  # no place is favoured
    assert not {json.dumps(r) for r in made["test"]} & {json.dumps(r) for r in made["train"]}


CHOICES = {"text": ["a stone", "the light of the sun", "iron", "three sheep"], "label": list("ABCD")}
OPENBOOK = {"question_stem": "Plants live on", "choices": CHOICES, "answerKey": "B"}
FACT = {"fact1": "plants make food of light", **OPENBOOK}
ARC = {"question": "What warms the sea?", "choices": CHOICES, "answerKey": "B"}
ENDINGS = ["opens the oven.", "flies away.", "is a fish.", "sinks."]
HELLASWAG = {
    "activity_label": "Baking", "ctx_a": "[header] How to bake", "ctx_b": "a man", "endings": ENDINGS,
    "label": "0",
}  # fmt: skip
CUP = "The cup fell off the shelf as"
WINOGRANDE = {
    "sentence": f"{CUP} _ was loose.", "option1": "the cup", "option2": "the shelf", "answer": "2",
}  # fmt: skip
BOOLQ = {"passage": "Sheep eat grass.", "question": "do sheep eat grass", "label": 1}
COPA = {
    "premise": "The glass broke.", "question": "cause", "choice1": "It fell.", "choice2": "It was red.",
    "label": 0,
}  # fmt: skip
NQ = {"question": "who built the bridge", "answer": ["the Romans", "Romans"]}
TRIVIA = {"question": "Who built the bridge?", "answer": {"aliases": ["the Romans", "Rome"]}}
# Task: a record, and the context and continuations with which the model is asked.
FOUR = [f" {text}" for text in CHOICES["text"]]
ASKED: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "openbookqa": (OPENBOOK, "Plants live on", FOUR),
    "openbookqa_fact": (FACT, "plants make food of light. Plants live on", FOUR),
    "arc_challenge": (ARC, "Question: What warms the sea?\nAnswer:", FOUR),
    "arc_easy": (ARC, "Question: What warms the sea?\nAnswer:", FOUR),
    "hellaswag": (HELLASWAG, "Baking: How to bake A man", [f" {text}" for text in ENDINGS]),
    "winogrande": (WINOGRANDE, f"{CUP} the cup", [" was loose."]),
    "boolq": (BOOLQ, "Sheep eat grass.\nQuestion: do sheep eat grass?\nAnswer:", [" no", " yes"]),
    "copa": (COPA, "The glass broke because", ["  it fell.", "  it was red."]),
    "nq_open": (NQ, "Answer these questions:\n\nQ: who built the bridge?\nA:", []),
    "triviaqa": (TRIVIA, "Question: Who built the bridge??\nAnswer:", []),
}
# The right choices of these records.
RIGHT = dict.fromkeys(ASKED, 1) | {"hellaswag": 0, "copa": 0}


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing here may so much as look up a host."""
    attempts: list[object] = []

    def refuse(*args: object, **kwargs: object) -> NoReturn:
        attempts.append(args)
        raise OSError("no network in this test")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert attempts == []


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Qwen2 and Qwen2-MoE models, folders ``dense`` and ``moe``, with a tokenizer made here."""
    import torch
    import transformers

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=small.byte_pairs(), eos_token="<|endoftext|>"
    )
    size: dict[str, Any] = dict(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        initializer_range=0.5,  # wide, so that the model has opinions
    )  # fmt: skip
    experts: dict[str, Any] = dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    )
    folder = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, model in (
        ("dense", transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**size))),
        ("moe", transformers.Qwen2MoeForCausalLM(transformers.Qwen2MoeConfig(**size, **experts))),
    ):
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def evaluate(model: Path, output: Path, *flags: object) -> dict[str, Any]:
    arguments = ["evaluate", model, "--device", "cpu", "--output", output, *flags]
    assert cli.main([str(argument) for argument in arguments]) == 0
    return json.loads((output / report.JSON_NAME).read_text())


def refused(capsys: pytest.CaptureFixture[str], model: Path, *flags: object) -> str:
    assert cli.main(["evaluate", *(str(argument) for argument in (model, *flags))]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ")
    return lines[0]


class Reference:
    """A model asked one sequence at a time."""

    def __init__(self, folder: Path) -> None:
        import transformers

        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()

    def log_likelihood(self, context: str, continuation: str) -> float:
        """The sum of the log-probabilities of the tokens that ``continuation`` adds."""
        import torch

        tokens = self.tokenizer(context + continuation)["input_ids"]
        start = len(self.tokenizer(context)["input_ids"])
        with torch.no_grad():
            logits = self.model(torch.tensor([tokens])).logits[0]
        total = 0.0
        for position in range(start, len(tokens)):
            total += torch.log_softmax(logits[position - 1], dim=0)[tokens[position]].item()
        return total

    def generate(self, context: str, until: str) -> str:
        """The greedy continuation up to one of the characters ``until``, at most 256 tokens."""
        import torch

        tokens = self.tokenizer(context)["input_ids"]
        start = len(tokens)
        for _ in range(256):
            with torch.no_grad():
                following = int(self.model(torch.tensor([tokens])).logits[0, -1].argmax())
            tokens.append(following)
            text = self.tokenizer.decode(tokens[start:])
            if following == self.tokenizer.eos_token_id or any(mark in text for mark in until):
                break
        text = self.tokenizer.decode(tokens[start:], skip_special_tokens=True)
        for mark in until:
            text = text.split(mark)[0]
        return text.strip()


@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_stdlib_scores_are_those_of_a_loop(models, tmp_path, capsys, stdlib_records, kind):
    count = 40
    result = evaluate(models / kind, tmp_path, "--tasks", "stdlib", "--limit", count, "--batch-size", 3)
    reference = Reference(models / kind)
    plain, normed = [], []
    for record in stdlib_records["test"][:count]:
        found = [reference.log_likelihood(record["context"], f" {choice}") for choice in record["choices"]]
        by_length = [score / len(choice) for score, choice in zip(found, record["choices"], strict=True)]
        plain.append(found.index(max(found)) == record["answer"])
        normed.append(by_length.index(max(by_length)) == record["answer"])
    task = result["tasks"]["stdlib"]
    assert plain != normed and 0 < sum(normed) < count  # else this would show little
    assert task["metrics"]["acc"] == pytest.approx(100 * sum(plain) / count)
    assert task["score"] == task["metrics"]["acc_norm"] == pytest.approx(100 * sum(normed) / count)
    assert task["by_question"] == normed
    share = sum(normed) / count
    assert task["stderr"] == pytest.approx(100 * math.sqrt(share * (1 - share) / (count - 1)))
    assert (task["questions"], task["questions_of"]) == (count, stdlib_task.QUESTIONS)
    assert result["averages"] == {}  # the task is not the paper's
    shown = capsys.readouterr().out
    assert f"{task['score']:.2f} ± {task['stderr']:.2f}" in shown and "no measurement" in shown


def test_log_likelihoods_of_a_bfloat16_model_are_added_up_in_float32(models, tmp_path):
    import torch
    import transformers
    from lm_eval.api.instance import Instance

    model = transformers.AutoModelForCausalLM.from_pretrained(models / "dense", dtype=torch.bfloat16)
    shutil.copytree(models / "dense", tmp_path / "bf16")
    model.save_pretrained(tmp_path / "bf16")
    asked = runner._load_model(tmp_path / "bf16", runner.Options((), None, 0, "cpu", 1, None, False))
    reference = Reference(tmp_path / "bf16")
    assert reference.model.dtype == torch.bfloat16
    pairs = [
        ("def words(text):", f" {answer}") for answer in (CHOICES["text"][3] * 9, CHOICES["text"][1] * 9)
    ]
    found = asked.loglikelihood([Instance("loglikelihood", {}, pair, 0) for pair in pairs])
    for pair, (value, _) in zip(pairs, found, strict=True):
        assert value < -64 and value != torch.tensor(value).bfloat16().item()
        assert value == pytest.approx(reference.log_likelihood(*pair), abs=0.5)


def test_a_tokenizer_without_an_end_of_text_token(models, tmp_path, capsys):
    flags = ("--tasks", "stdlib", "--limit", 6)
    expected = evaluate(models / "moe", tmp_path / "with", *flags)["tasks"]["stdlib"]
    model = shutil.copytree(models / "moe", tmp_path / "model")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    assert evaluate(model, tmp_path / "without", *flags)["tasks"]["stdlib"]["metrics"] == expected["metrics"]
    save(tmp_path / "data" / "nq_open", "validation", [NQ], "jsonl")
    capsys.readouterr()
    said = refused(
        capsys, model, "--tasks", "nq_open", "--data-dir", tmp_path / "data", "--output", tmp_path / "no"
    )
    assert "--tasks nq_open: generated answers end with an end-of-text token, and " in said


def test_the_dense_model_is_shown_beside(models, tmp_path, capsys):
    """Asked the same; no column stays empty, and the report names the models."""
    flags = ("--tasks", "stdlib", "--limit", 6)
    alone = evaluate(models / "dense", tmp_path / "dense", *flags)["tasks"]["stdlib"]
    result = evaluate(models / "moe", tmp_path / "both", *flags, "--dense", models / "dense")
    beside = result["dense"]["tasks"]["stdlib"]
    assert beside["by_question"] == alone["by_question"] != result["tasks"]["stdlib"]["by_question"]
    assert result["tasks"]["stdlib"]["chance"] == 25.0
    assert result["model"]["log_likelihoods"] == "float32"
    shown = (tmp_path / "both" / report.MARKDOWN_NAME).read_text()
    head, _, row = (line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("|"))
    assert [cell.strip() for cell in head] == ["task", "metric", "this model", "dense model", "chance"]
    assert [cell.strip() for cell in row][4] == "25.00" and "-" not in "".join(row)
    assert (
        f"# Evaluation of {models.name}/moe\n" in shown
        and f"dense model: {models.name}/dense, Qwen2For" in shown
    )
    assert "2509.00679" not in shown and "float32 from the model's logits" in shown

    (tmp_path / "broken").mkdir()
    capsys.readouterr()
    assert "broken: no model" in refused(capsys, models / "moe", *flags, "--dense", tmp_path / "broken")
    (tmp_path / "broken" / "adapter_config.json").write_text("{}")
    said = refused(capsys, tmp_path / "broken", *flags, "--output", tmp_path / "none")
    assert "holds an adapter (adapter_config.json); merge it" in said


@pytest.mark.parametrize("task", paper.PAPER_TASKS, ids=lambda task: task.name)
def test_each_task_asks_what_the_harness_asks_of_the_data_it_names(task):
    from lm_eval.tasks import TaskManager

    record, context, continuations = ASKED[task.name]
    assert set(record) == set(task.fields)  # no more than these fields is needed
    asked = runner.harness_task(task, {task.split: [record]}, 0)
    asked.build_all_requests(limit=1)
    assert asked.instances[0].args[0] == context
    if continuations:
        assert [request.args[1] for request in asked.instances][: len(continuations)] == continuations
        for preferred in range(len(asked.instances)):  # what scores when the model prefers each choice
            likelihoods = [(-float(index != preferred), False) for index in range(len(asked.instances))]
            score = asked.process_results(asked.eval_docs[0], likelihoods)[task.metric]
            assert score == (preferred == RIGHT[task.name])
    else:
        assert asked.process_results(asked.eval_docs[0], ["the Romans"])["exact_match"] == 1.0
        assert asked.process_results(asked.eval_docs[0], ["the Goths"])["exact_match"] == 0.0
    assert (asked.config.dataset_path, asked.config.dataset_name) == (task.repository, task.configuration)
    if task.harness:
        import lm_eval.tasks

        folder = Path(lm_eval.tasks.__file__).parent / task.harness
        entry = TaskManager(include_path=folder, include_defaults=False).task_index[task.name]
        assert entry.cfg is not None
        assert task.split == (entry.cfg.get("test_split") or entry.cfg["validation_split"])


def test_few_shot_examples_come_from_the_train_split():
    shown = {**BOOLQ, "passage": "Fish swim.", "question": "do fish swim"}
    asked = runner.harness_task(paper.TASKS["boolq"], {"validation": [BOOLQ], "train": [shown]}, 1)
    asked.set_fewshot_seed(runner.SEED)
    asked.build_all_requests(limit=1)
    example = "Fish swim.\nQuestion: do fish swim?\nAnswer: yes\n\n"
    assert asked.instances[0].args[0] == example + ASKED["boolq"][1]


def save(folder: Path, split: str, rows: list[dict[str, Any]], form: str) -> None:
    """Write ``rows`` in one of the forms that --data-dir may hold."""
    import datasets

    folder.mkdir(parents=True, exist_ok=True)
    held = datasets.Dataset.from_list(rows)
    if form == "jsonl":
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")
    elif form == "parquet":
        held.to_parquet(folder / f"{split}.parquet")
    elif form == "hub":
        for part in range(2):
            held.shard(2, part, contiguous=True).to_parquet(folder / f"{split}-0000{part}-of-00002.parquet")
    else:
        datasets.DatasetDict({split: held}).save_to_disk(folder)


def test_the_ten_tasks_from_local_data(models, tmp_path, capsys):
    reference = Reference(models / "dense")
    own = {name: reference.generate(ASKED[name][1], "\n.,") for name in ("nq_open", "triviaqa")}
    forms = itertools.cycle(("jsonl", "parquet", "hub", "saved"))
    for task in paper.PAPER_TASKS:
        rows = [ASKED[task.name][0] | {"more": "that no task needs"}] * 3
        if task.name in own:  # one answer in three is the model's own
            wanted: Any = [own[task.name]]
            rows[1] = rows[1] | {"answer": wanted if task.name == "nq_open" else {"aliases": wanted}}
        save(tmp_path / "data" / task.name, task.split, rows, next(forms))
    result = evaluate(models / "dense", tmp_path / "out", "--data-dir", tmp_path / "data")
    assert [result["tasks"][task.name]["questions"] for task in paper.PAPER_TASKS] == [3] * 10
    assert all(len(task["by_question"]) == 3 for task in result["tasks"].values())
    for name, text in own.items():
        assert text and result["tasks"][name]["score"] == pytest.approx(100 / 3)
    scores, means = {name: task["score"] for name, task in result["tasks"].items()}, result["averages"]
    assert means["average"]["score"] == pytest.approx(sum(scores.values()) / 10)
    assert means["knowledge"]["score"] == pytest.approx(
        sum(scores[name] for name in ("boolq", "copa", "nq_open", "triviaqa")) / 4
    )
    assert all(average["complete"] for average in means.values())
    shown = (tmp_path / "out" / report.MARKDOWN_NAME).read_text()
    assert shown in capsys.readouterr().out
    rows_shown = {line.split("|")[1].strip(): line for line in shown.splitlines() if line.startswith("|")}
    for title, mine, others in (
        ("ARC-C", scores["arc_challenge"], (25, 27.12, 39.66, 14.58, 29.15, 34.92, 42.37)),
        ("*reasoning*", means["reasoning"]["score"], (31.25, 37.91, 49.61, 27.17, 44.95, 48.66, 51.86)),
        ("**average**", means["average"]["score"], (27.5, 34.76, 43.78, 26.16, 41.08, 41.98, 45.83)),
    ):
        cells = [cell.strip() for cell in rows_shown[title].split("|")[3:-1]]
        assert cells[0].split(" ± ")[0] == report.percent(mine)
        assert cells[1:] == [f"{value:.2f}" for value in others]  # chance, and the paper's
    by_chance = {name: task["chance"] for name, task in result["tasks"].items()}
    assert (by_chance["winogrande"], by_chance["arc_easy"], by_chance["nq_open"]) == (50.0, 25.0, None)
    assert result["versions"]["lm_eval"] and result["model"]["architecture"] == "Qwen2ForCausalLM"


def test_a_part_of_the_tasks_is_marked_as_such(models, tmp_path, capsys):
    save(tmp_path / "copa", "validation", [COPA] * 2, "jsonl")
    result = evaluate(models / "dense", tmp_path / "out", "--tasks", "copa", "--data-dir", tmp_path)
    assert result["averages"]["knowledge"] == result["averages"]["average"] | {"of": 4}
    assert not result["averages"]["average"]["complete"]
    shown = capsys.readouterr().out
    assert "*knowledge* (1 of 4 tasks)" in shown and "**average** (1 of 10 tasks)" in shown
    assert "no measurement" not in shown


def test_data_that_is_not_there_is_one_line_before_the_model_is_loaded(tmp_path, capsys):
    model, folder = tmp_path / "model", tmp_path / "data"
    model.mkdir()
    (model / "config.json").write_text('{"model_type": "qwen2"}')  # no weights: loading would fail
    save(folder / "copa", "validation", [COPA], "jsonl")
    flags = ("--data-dir", folder, "--output", tmp_path / "out", "--tasks")
    said = refused(capsys, model, *flags, "copa,stdlib,openbookqa_fact")
    assert "no data for openbookqa_fact (allenai/openbookqa additional: test), or they cannot" in said
    assert f"{folder}/openbookqa_fact/test.jsonl or .parquet" in said
    said = refused(capsys, model, *flags, "copa", "--num-fewshot", 2)
    assert "copa (aps/super_glue copa: train)" in said
    said = refused(capsys, model, "--tasks", "stdlib", "--num-fewshot", 21)
    assert "--num-fewshot 21: stdlib has 20 examples to show" in said

    save(folder / "boolq", "validation", [COPA], "parquet")
    assert "cannot be used (KeyError: 'passage')" in refused(capsys, model, *flags, "boolq")
    for name, content, why in (
        ("boolq/validation.parquet", "cut short", "no data for boolq"),
        ("copa/validation.jsonl", '{"premise":\n', "JSONDecodeError"),
        ("copa/validation.jsonl", "\n", "it has no records"),
    ):
        (folder / name).write_text(content)
        assert why in refused(capsys, model, *flags, name.split("/")[0])
    assert not (tmp_path / "out").exists()


def test_a_failed_download_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    command = (sys.executable, "-m", "megatron_router_upcycling.cli", "evaluate", ".", "--tasks", "copa")
    ended = launch.run(*command, cwd=tmp_path, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path / "cache"))
    assert ended.returncode == 2 and ended.text.count("\n") == 1, ended.text
    assert ended.text.startswith("error: copa (aps/super_glue copa: validation) could not be downloaded")
    assert "FOLDER/copa/validation.jsonl or .parquet and pass --data-dir FOLDER" in ended.text


def test_models_that_cannot_be_measured(models, tmp_path, capsys):
    import torch
    from safetensors.torch import load_file, save_file

    flags = ("--tasks", "stdlib", "--limit", 1, "--output", tmp_path / "out")
    assert "no model in Hugging Face format" in refused(capsys, tmp_path / "nowhere", *flags)

    if not torch.cuda.is_available():
        said = refused(capsys, models / "dense", *flags, "--device", "cuda")
        assert "dense: cannot be loaded on cuda" in said

    broken = shutil.copytree(models / "dense", tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    said = refused(capsys, broken, *flags)
    assert "not the weights of a Qwen2ForCausalLM: 1 missing_keys, model.layers.1.mlp.up_proj.weight" in said
    tensors = load_file(models / "dense" / "model.safetensors")
    save_file(tensors | {"model.router": tensors["model.norm.weight"].clone()}, broken / "model.safetensors")
    assert "1 unexpected_keys, model.router" in refused(capsys, broken, *flags)
    (broken / "model.safetensors").write_bytes(b"cut short")
    assert "broken: cannot be loaded on cpu" in refused(capsys, broken, *flags)

    (broken / "boom.py").write_text("raise RuntimeError('code of the folder has run')")
    code = {"AutoConfig": "boom.Boom", "AutoModelForCausalLM": "boom.B"}
    (broken / "config.json").write_text(json.dumps({"model_type": "boom", "auto_map": code}))
    said = refused(capsys, broken, *flags)
    assert "code that it brings is run with --trust-remote-code only" in said and "has run" not in said
    assert not (tmp_path / "out").exists()


def test_answers_are_cut_for_a_model_that_takes_few_tokens(models, tmp_path, capsys):
    model = tmp_path / "short"
    shutil.copytree(models / "dense", model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 48}
    (model / "config.json").write_text(json.dumps(config))
    found = evaluate(model, tmp_path / "results", "--tasks", "stdlib", "--limit", 3)
    assert "stdlib: answers cut to " in (said := capsys.readouterr().out)
    assert "the model takes 48" in said
    task = found["tasks"]["stdlib"]
    assert task["questions"] == 3 and 0.75 < task["questions_of"] / stdlib_task.QUESTIONS <= 1

    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 2}))
    arguments = ["evaluate", model, "--device", "cpu", "--output", tmp_path / "none", "--tasks", "stdlib"]
    assert cli.main([str(argument) for argument in arguments]) == 2
    assert "error: --tasks stdlib: has answers that do not fit the 2 tokens" in capsys.readouterr().err


def test_flags_that_make_no_sense(models, tmp_path, capsys):
    model = models / "dense"
    for words in ("copa,arc_eas", ","):
        assert f"--tasks {words}: give names of openbookqa," in refused(capsys, model, "--tasks", words)
    assert "--limit: 0: must be at least 1" in refused(capsys, model, "--limit", 0)
    assert "--data-dir" in refused(capsys, model, "--data-dir", tmp_path / "nowhere")
    (tmp_path / report.JSON_NAME).write_text("{}")
    assert "pass --overwrite" in refused(capsys, model, "--output", tmp_path)
    result = evaluate(model, tmp_path, "--tasks", "stdlib", "--limit", 1, "--overwrite")
    assert result["tasks"]["stdlib"]["stderr"] is None  # of one question


def test_groups_name_their_tasks_once():
    assert [task.name for task in runner.parse_tasks("arc_easy,reasoning,stdlib")] == [
        *("arc_easy", "arc_challenge", "hellaswag", "winogrande", "stdlib")
    ]
    assert runner.parse_tasks(None) == paper.PAPER_TASKS


def test_what_was_measured_survives_an_interruption(models, tmp_path, capsys, monkeypatch):
    save(tmp_path / "data" / "copa", "validation", [COPA], "jsonl")
    save(tmp_path / "data" / "boolq", "validation", [BOOLQ], "jsonl")
    build, built = runner.harness_task, []

    def second_is_interrupted(*args: Any) -> Any:
        if built:
            raise KeyboardInterrupt
        built.append(args)
        return build(*args)

    monkeypatch.setattr(runner, "harness_task", second_is_interrupted)
    flags = ("--tasks", "copa,boolq", "--data-dir", tmp_path / "data", "--output", tmp_path / "out")
    assert cli.main(["evaluate", str(models / "dense"), *map(str, flags)]) == 130
    assert f"1 of 2 tasks are in {tmp_path / 'out'}" in capsys.readouterr().err
    assert list(json.loads((tmp_path / "out" / report.JSON_NAME).read_text())["tasks"]) == ["copa"]
