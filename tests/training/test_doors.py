"""What torchrun names with -m: their help, and what they refuse before Megatron is imported."""

import pytest

from tests import launch


@pytest.mark.parametrize("door", ["pretrain", "collect_keys", "rehearse"])
def test_help_teaches_this_packages_flags(door: str) -> None:
    text = launch.run(launch.sys.executable, "-m", f"megatron_router_upcycling.{door}", "--help").ok().text
    assert text.startswith(f"usage: python -m megatron_router_upcycling.{door} ")
    for part in (f"-m megatron_router_upcycling.{door} --config", "router (a converted", "--num-routers"):
        assert part in text
    assert "--help-megatron" in text and "--hidden-size" not in text
    assert "Warning" not in text  # of Megatron's imports


def test_all_flags_can_be_listed() -> None:
    text = launch.python("-m", "megatron_router_upcycling.pretrain", "--help-megatron").ok().text
    assert "--hidden-size" in text and "--num-routers" in text and "warmup-step-decay" in text


@pytest.mark.parametrize(
    ("door", "flags", "message"),
    [
        ("rehearse", (), "--gpus: give the number of GPUs of the run"),
        ("rehearse", ("--gpus", 4, "--rehearse-rank", 4), "--rehearse-rank 4: must be between 0 and 3"),
        ("rehearse", ("--gpus", 4, "--rehearse-seq-length", 0), "--rehearse-seq-length 0: must be at least"),
        ("rehearse", ("--gpus", 4, "--output", "/no/f"), "--output /no/f: there is no folder /no;"),
        ("pretrain", ("--rehearse", 0), "--gpus: give the number of GPUs of the run, at least 1"),
        ("pretrain", ("--rehearse-rank", 4), "--rehearse-rank, --rehearse-seq-length: need --rehearse"),
        ("pretrain", ("--config", "none.yaml"), "--config none.yaml: no such file"),
        ("pretrain", ("--load", "/not/there"), "--load /not/there: no checkpoint there"),
        ("collect_keys", (), "--output: name the file to write"),
        ("collect_keys", ("--output", "x", "--router-samples", -1), "--router-samples -1: must be 0"),
    ],
)
def test_refused_in_one_line_without_megatron(door: str, flags: tuple[object, ...], message: str) -> None:
    done = launch.run(launch.sys.executable, "-m", f"megatron_router_upcycling.{door}", *flags)
    assert done.returncode == 2
    assert done.text.startswith(f"error: {message}") and done.text.count("\n") == 1


def test_a_run_imports_nothing_slow_that_it_does_not_use(dense_config: object) -> None:
    code = "import sys; from megatron_router_upcycling.training import launch; launch.prepare(sys.argv[1:])"
    code += "; assert not {'wandb', 'transformers'} & sys.modules.keys()"
    launch.run(launch.sys.executable, "-c", code, "--config", dense_config).ok()
