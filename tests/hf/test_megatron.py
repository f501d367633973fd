"""The logits of Megatron itself, after import and before export, equal those of transformers.

Run as a script, this file is the two ranks that load one checkpoint after the other, each at
its own tensor, pipeline and expert parallel size, and save the logits.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from tests import hf_models, launch
from tests.conftest import TRAINING
from tests.hf.folders import make_stats_of

pytestmark = pytest.mark.slow
TOLERANCE = 1e-5  # absolute, in float32; logits are of the order of 1
TOKENS = (torch.arange(2 * 32).reshape(2, 32) * 37) % 250
LAYOUTS = {
    "TP 1": (),
    "TP 2": ("--tensor-model-parallel-size", "2", "--sequence-parallel"),
    "PP 2": ("--pipeline-model-parallel-size", "2"),
    "EP 2": ("--expert-model-parallel-size", "2"),
}
DENSE_LAYOUTS = ("TP 1", "TP 2", "PP 2")
# Mixtures-of-Experts: the dense model, options of convert, whether it is trained, options of export-hf.
MOES: dict[str, tuple[str, tuple[Any, ...], bool, tuple[str, ...]]] = {
    "trained, softmax then top-k": ("qwen1.5", ("--num-experts", 8), True, ()),
    "trained, top-k then softmax": ("qwen1.5", ("--num-experts", 8, "--no-moe-router-pre-softmax"), True, ()),
    "Qwen3": ("qwen3", ("--num-experts", 4), False, ()),
    "max pooling": ("qwen2.5", ("--num-experts", 4, "--pooling", "max"), False, ("--modelling-code",)),
    "MLP": ("qwen1.5", ("--num-experts", 4, "--router", "mlp"), False, ("--modelling-code",)),
    "trained, finer experts and a shared one in some layers": (
        "qwen1.5",
        ("--num-experts", 8, "--granularity", 2, "--shared-expert", "--layers", "1"),
        True,
        (),
    ),
    "finer experts of a tied Qwen3": (
        "qwen3-tied",
        ("--num-experts", 4, "--granularity", 3, "--no-moe-router-pre-softmax"),
        False,
        (),
    ),
    "shared expert, max pooling, some layers": (
        "qwen2.5",
        ("--num-experts", 4, "--pooling", "max", "--shared-expert", "--layers", "0"),
        False,
        ("--modelling-code",),
    ),
    "two keys": ("qwen3", ("--num-experts", 4, "--num-routers", 8), False, ("--modelling-code",)),
}


def main(jobs: Path) -> None:
    """Carry out ``jobs``: a JSON list of [arguments of pretrain, the file for the logits]."""
    for argv, output in json.loads(jobs.read_text()):
        logits = megatron_logits(argv)
        if logits is not None:
            torch.save(logits, output)
    torch.distributed.destroy_process_group()


def megatron_logits(argv: list[str]) -> torch.Tensor | None:
    """Logits [batch, sequence, padded vocabulary] on one rank of the last stage, None on the others."""
    from megatron_router_upcycling.key_statistics import collect
    from megatron_router_upcycling.training import launch

    # Before Megatron is imported: this bridges it to the CPU.
    args = launch.prepare(argv, needs_checkpoint=True).args
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine
    from megatron.training.global_vars import destroy_global_vars

    args.spec = ["megatron_router_upcycling.layer_spec", "upcycled_layer_spec"]
    model = collect.load_model(args)
    sequence = TOKENS.shape[1]
    mask = torch.ones(1, 1, sequence, sequence, dtype=torch.bool).triu(1)

    def forward_step(data: Any, chunk: Any) -> Any:
        positions = torch.arange(sequence).expand(TOKENS.shape)
        return chunk(TOKENS, positions, mask), lambda output, non_loss_data: output

    with torch.no_grad():
        outputs = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=None,
            model=model,
            num_microbatches=1,
            seq_length=sequence,
            micro_batch_size=len(TOKENS),
            forward_only=True,
            collect_non_loss_data=True,
        )
    logits = None
    if parallel_state.is_pipeline_last_stage():
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(outputs[0])
    saves = parallel_state.get_data_parallel_rank() == parallel_state.get_tensor_model_parallel_rank() == 0
    parallel_state.destroy_model_parallel()
    destroy_num_microbatches_calculator()
    destroy_rerun_state_machine()
    destroy_global_vars()
    return logits if saves else None


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """Hugging Face models, their imports, Mixtures-of-Experts of them, and all logits of Megatron."""
    folder = tmp_path_factory.mktemp("hf")
    jobs = []
    for family in hf_models.FAMILIES:
        hf_models.make(family, folder / family)
        launch.cli("import-hf", folder / family, folder / f"{family} dense").ok()
        entries = TRAINING | {"base": str(folder / f"{family} dense/model.yaml"), "data_path": [str(data)]}
        entries |= {"data_cache_path": str(folder / "cache"), "moe_router_dtype": "fp32"}
        del entries["vocab_size"]
        (folder / f"{family}.yaml").write_text(yaml.safe_dump(entries))
        jobs += [job(folder, family, f"{family} dense", layout) for layout in DENSE_LAYOUTS]
    for number, (name, (family, options, trained, _)) in enumerate(MOES.items()):
        upcycled = folder / f"converted {number}" if trained else folder / name
        stats = make_stats_of(folder / "key_stats", folder / f"{family} dense")
        launch.cli("convert", folder / f"{family} dense", upcycled, "--key-stats", stats, *options).ok()
        if trained:
            train(folder, family, upcycled, folder / name)
        jobs.append(job(folder, family, name, "EP 2"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    launch.ranks(2, __file__, folder / "jobs.json").ok()
    return folder


def job(folder: Path, family: str, name: str, layout: str) -> tuple[list[str], str]:
    flags = ["--config", str(folder / f"{family}.yaml"), "--load", str(folder / name), *LAYOUTS[layout]]
    return flags, str(logits_file(folder, name, layout))


def logits_file(folder: Path, name: str, layout: str) -> Path:
    return folder / f"{name} {layout}.pt"


def train(folder: Path, family: str, moe: Path, out: Path) -> None:
    """A few steps at EP 2, with a learning rate that lets the experts differ."""
    flags = ("--train-iters", 4, "--lr", 0.02, "--expert-model-parallel-size", 2, "--eval-iters", 0)
    config = folder / f"{family}.yaml"
    launch.ranks(2, "pretrain", "--config", config, "--load", moe, "--save", out, *flags).ok()


@pytest.mark.parametrize("layout", DENSE_LAYOUTS)
@pytest.mark.parametrize("family", hf_models.FAMILIES)
def test_imported_model_has_the_logits_of_transformers(made: Path, family: str, layout: str) -> None:
    expected = hf_models.logits(made / family, TOKENS)
    found = torch.load(logits_file(made, f"{family} dense", layout))
    assert expected.std() > 0.3
    assert (found[..., : expected.shape[-1]] - expected).abs().max() < TOLERANCE
    assert not found[..., expected.shape[-1] :].any()


@pytest.mark.parametrize("name", MOES)
def test_exported_mixture_of_experts_has_the_logits_of_megatron(
    made: Path, tmp_path: Path, name: str
) -> None:
    family, _, trained, options = MOES[name]
    launch.cli("export-hf", made / name, tmp_path / "hf", *options).ok()
    expected = torch.load(logits_file(made, name, "EP 2"))
    found = hf_models.logits(tmp_path / "hf", TOKENS, trust_remote_code=bool(options))
    assert (found - expected[..., : found.shape[-1]]).abs().max() < TOLERANCE
    if trained:
        tensors = hf_models.tensors(tmp_path / "hf")
        layer = 1 if "some layers" in name else 0
        of_layer = f"model.layers.{layer}.mlp.experts"
        experts = [tensors[f"{of_layer}.{expert}.down_proj.weight"] for expert in range(8)]
        assert not torch.equal(experts[0], experts[1])
        assert (hf_models.logits(made / family, TOKENS) - found).abs().max() > 0.1


@pytest.mark.parametrize("family", hf_models.MOES)
def test_megatrons_own_loop_starts_from_an_imported_mixture_of_experts(tmp_path: Path, family: str) -> None:
    """With its model.yaml and flags of data only, at EP 2: the first loss is that of transformers.

    All documents are one of 32 tokens, so that each sample is the same. The vocabulary is not padded, since
    Megatron's loss counts the padding too.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    hf_models.make(family, tmp_path / "hf", vocab_size=256)
    launch.cli("import-hf", tmp_path / "hf", tmp_path / "moe").ok()
    builder = IndexedDatasetBuilder(f"{tmp_path}/data.bin", dtype=np.uint16)
    for _ in range(40):
        builder.add_document(TOKENS[0], [len(TOKENS[0])])
    builder.finalize(f"{tmp_path}/data.idx")
    flags = {"data_path": tmp_path / "data", "split": "1,0,0", "seq_length": 32, "train_iters": 1, "lr": 0.01}
    flags |= {"micro_batch_size": 2, "global_batch_size": 4, "eval_iters": 0, "log_interval": 1}
    flags |= {"tokenizer_type": "NullTokenizer", "expert_model_parallel_size": 2, "save_interval": 1}
    flags |= {"config": tmp_path / "moe/model.yaml", "load": tmp_path / "moe", "save": tmp_path / "run"}
    words = [word for name, value in flags.items() for word in (f"--{name.replace('_', '-')}", value)]
    losses = launch.ranks(2, "pretrain", *words).ok().losses
    tokens = TOKENS[:1]
    logits = hf_models.logits(tmp_path / "hf", tokens)
    expected = torch.nn.functional.cross_entropy(logits[0], tokens[0].roll(-1))
    assert losses[1] == pytest.approx(float(expected), abs=TOLERANCE)
    launch.cli("export-hf", tmp_path / "run", tmp_path / "trained").ok()
    before, after = (hf_models.tensors(tmp_path / name) for name in ("hf", "trained"))
    assert before.keys() <= after.keys()
    gates = [name for name in before if name.endswith("mlp.gate.weight")]
    assert gates and not any(torch.equal(before[name], after[name]) for name in gates)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))
