"""Runs that go on from a checkpoint with other flags: learning rates, optimizers, additions to layers."""

import base64
import re
import zlib
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_router_upcycling.checkpoint.format.metadata import parse_metadata
from megatron_router_upcycling.checkpoint.open import check_whole, open_checkpoint
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.training.arguments import check_resuming
from megatron_router_upcycling.training.patches.added_state import added_by
from tests import launch
from tests.conftest import LAYERS, expert_parallel

FRESH = "--no-load-optim"
BIAS = "--moe-router-enable-expert-bias"
# Megatron has such a bias for sigmoid scores alone.
SIGMOID = ("--moe-router-score-function", "sigmoid", "--moe-router-load-balancing-type", "none")
# The .metadata of dcp.save({"w": torch.zeros(2, 3)}) with torch 2.15.0, compressed.
OF_TORCH_2_15 = r"""
    c-nnZO>fgc5Otal18pRvmOp?%w1*fcG?1JS3I#=0(x~kft=8U2ysG0h-gRj!Rf0n+A?>Zp|7F(sDnj6s{ru*=c{B69_G?ge%16Ic
    B9CH^aj9}177Cab#Soomf~U%xgQAQoYV@Pg>h<0n{4h6WU++pq6%fWFMb^X{qbuJ`?C57_kV=uCqCTC$-_=jDTx5_d4${(}F6fgD
    STgr@y=>5EcbW*Q-gFSxyNjkJ<eVn_nkp_*qqoTn6iMinD3oP2mn;m%fSFr!Vt%629vK~t$fx6z(T6i~G#(s(9F9LDKX6J$Pz@?~
    Mww98B)<l;ZlHE*KasZ;RPRbP-H75MJ(uQ-O|UnxAOFnjis@8>!m!T+CvcVub?Z@LYt<s8MJV-7me4eXoGiy0yRmy~5SI&wHSXx<
    %59i3xZGG)r(aX7({*0rfukFXCjRK52=%M~9>J6+Ag`o?xzRgh8E}|R#m1?bLxNkl0FqG^TN?3+UkXN<iQil61kxG)8yz&tc&ixp
    a%_n02a|gsyy=5*hF4(q6CN7<cp@afoLIYiBvxJ<T~+hU=q;7wW<&~|b{F@ELv|&_&TRRMF0}i8ug6+_8g*KS5q;b0_d?d{`Oxq9
    J^!8G#g)5wYRndlwL2HA!2Gyl9F%(jxh#*Z-u8UYN6h;T>eWVU
"""
OTHER_MODEL = "leave out the flags that make it another model than the checkpoint's"


@pytest.mark.parametrize("distributed", [False, True], ids=["plain", "distributed"])
def test_the_flags_of_the_schedule_decide_on_the_learning_rate(
    dense: Path, dense_config: Path, moe_config: Path, unbroken: tuple[Path, Any], distributed: bool
) -> None:
    """At EP 2 dense parameters and experts have optimizers of their own."""
    command: tuple[object, ...] = (1, "pretrain", "--config", dense_config, "--load", dense)
    if distributed:
        command = (2, "pretrain", *expert_parallel(moe_config, unbroken[0]))
    flags = ("--ckpt-step", 4, "--lr", 1e-3, "--eval-iters", 0)
    (line,) = launch.ranks(*command, *flags).errors
    assert "(--lr 0.001, and the checkpoint has 0.005;" in line
    for way, rate in (("--override", "1.000000E-03"), ("--use-checkpoint", "5.000000E-03")):
        flag = f"{way}-opt-param-scheduler"
        text = launch.ranks(*command, *flags, flag).ok().text
        assert flag in line and text.count(f"learning rate: {rate}") == 4


def flags_of(root: Path, **changes: Any) -> Namespace:
    """Arguments as the run had them that saved the checkpoint, but for ``changes``."""
    fresh = {"skip_train": False, "finetune": False, "no_load_optim": False, "ckpt_step": None}
    return Namespace(**vars(open_checkpoint(root).args) | fresh | changes)


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"use_distributed_optimizer": True}, "--use-distributed-optimizer True: "),
        ({"bf16": True}, "--bf16 (or --fp16) True: "),
        ({"decoupled_lr": 0.1}, "--decoupled-lr True: "),
        ({"apply_wd_to_qk_layernorm": True}, "--apply-wd-to-qk-layernorm True: "),
        ({"use_layer_wise_distributed_optimizer": True}, "--use-distributed-optimizer True: "),
        ({"optimizer": "sgd"}, "--optimizer sgd: "),
    ],
)
def test_another_optimizer_than_the_checkpoints_is_one_line(
    dense: Path, moe: Path, changes: dict[str, Any], flag: str
) -> None:
    check_resuming(flags_of(dense), str(dense))
    check_resuming(flags_of(moe, **changes), str(moe))  # a converted checkpoint suits every optimizer
    with pytest.raises(UserError) as refused:
        check_resuming(flags_of(dense, **changes), str(dense))
    assert str(refused.value).startswith(flag) and FRESH in str(refused.value)
    for way_out in ({"no_load_optim": True}, {"finetune": True}, {"skip_train": True}):
        check_resuming(flags_of(dense, **changes, **way_out), str(dense))


@pytest.mark.parametrize("asked", ["fsdp_dtensor", "torch_dcp", "torch"])
def test_a_format_that_cannot_take_the_checkpoint_is_one_line(moe: Path, asked: str) -> None:
    with pytest.raises(UserError, match=f"^--ckpt-format {asked}: loads no other format, and .* torch_dist"):
        check_resuming(flags_of(moe, ckpt_format=asked, skip_train=True), str(moe))


@pytest.mark.slow
def test_megatrons_older_format_saves_and_resumes(tmp_path: Path, moe: Path, moe_config: Path) -> None:
    """``torch``, into which Megatron converts a checkpoint with its manifest: the losses of torch_dist."""
    flags = ("--config", moe_config, "--expert-model-parallel-size", 2, "--train-iters", 4)
    convert = ("--ckpt-convert-format", "torch", "--ckpt-convert-save", tmp_path)
    launch.ranks(2, "pretrain", *flags, "--load", moe, *convert).ok()
    expected = launch.ranks(2, "pretrain", *flags, "--load", moe).ok().losses
    run = ("--ckpt-format", "torch", "--save", tmp_path / "run", "--save-interval", 2)
    assert launch.ranks(2, "pretrain", *flags, *run, "--load", tmp_path / "torch").ok().losses == expected
    (tmp_path / "run/latest_checkpointed_iteration.txt").write_text("2")
    resumed = launch.ranks(2, "pretrain", *flags, *run).ok().losses
    assert resumed == {step: expected[step] for step in (3, 4)}


def test_a_checkpoint_of_a_later_torch_is_one_line(tmp_path: Path) -> None:
    """Metadata that torch 2.15.0 wrote of one tensor: six properties, where earlier ones know five."""
    folder = tmp_path / "iter_0000001"
    folder.mkdir()
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("1")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    content = zlib.decompress(base64.b85decode("".join(OF_TORCH_2_15.split())))
    (folder / ".metadata").write_bytes(content)
    (folder / "__0_0.distcp").write_bytes(bytes(5000))
    assert parse_metadata(content, "here")[0]["w"].shape == (2, 3)
    if torch.__version__ >= "2.15":
        return check_whole(tmp_path)
    for step in (None, 1):
        with pytest.raises(
            UserError, match=r"\.metadata: was saved by a later torch than .* with torch 2\.15"
        ):
            check_whole(tmp_path, step)


def test_switching_the_distributed_optimizer_needs_a_fresh_one(
    moe_config: Path, unbroken: tuple[Path, dict[int, float]]
) -> None:
    command = ("pretrain", "--config", moe_config, "--load", unbroken[0], "--train-iters", 9)
    refused = launch.ranks(1, *command)
    assert refused.returncode == 2 and "Traceback" not in refused.text
    (line,) = refused.errors
    expected = f"error: --use-distributed-optimizer False: .* was saved with True, .* or pass {FRESH}"
    assert re.match(expected, line), line
    assert list(launch.ranks(1, *command, FRESH).ok().losses) == [9]


def test_expert_bias_begins_at_zero_and_goes_on(tmp_path: Path, dense: Path, moe: Path, moe_config: Path):
    run = tmp_path / "run"
    flags = ("--config", moe_config, "--expert-model-parallel-size", 2, *SIGMOID, "--save-interval", 3)
    first = ("--load", moe, "--train-iters", 3, BIAS, "--save", run)
    text = launch.ranks(2, "pretrain", *flags, *first).ok().text
    assert f"{BIAS}: the checkpoint has no such bias; it begins at zero" in text
    launch.cli("verify", dense, run).ok()
    stored = open_checkpoint(run)
    key = "decoder.layers.mlp.router.expert_bias"
    bias = [stored.read_layer(key, layer, bytearray()) for layer in range(LAYERS)]
    # Each of three steps moved it by the rate, up or down, or not where an expert had its even share.
    for layer in bias:
        steps = layer / 1e-3
        assert (steps - steps.round()).abs().max() < 1e-3 and 1 <= steps.round().abs().max() <= 3
    longer = ("--train-iters", 4, "--override-opt-param-scheduler", "--load", run)
    text = launch.ranks(1, "pretrain", *flags[:2], *flags[4:], *longer, BIAS).ok().text
    assert "begins at zero" not in text and "left out" not in text
    text = launch.ranks(1, "pretrain", *flags[:2], *flags[4:], *longer).ok().text
    assert f"{BIAS}: is not given, and the checkpoint has such a bias; it is left out" in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--moe-shared-expert-intermediate-size", 32), "--moe-shared-expert-intermediate-size: {} has no "),
        (("--mtp-num-layers", 1), "--mtp-num-layers: {} has no mtp.layers.0."),
        (("--softmax-type", "learnable"), "--softmax-type: {} has no "),
        (("--moe-layer-freq", 2), "--moe-layer-freq: {} has no decoder.layers.0."),
        (("--moe-ffn-hidden-size", 32), "--load: {} has decoder.layers.mlp.experts."),
    ],
)  # fmt: skip
def test_a_flag_that_makes_another_model_is_named(
    moe: Path, moe_config: Path, flags: tuple[object, ...], message: str
) -> None:
    output = launch.ranks(1, "pretrain", "--config", moe_config, "--load", moe, *flags)
    assert output.returncode == 2 and "Traceback" not in output.text
    (line,) = output.errors
    assert line.startswith(f"error: {message.format(moe / 'release')}") and line.endswith(OTHER_MODEL)


def test_what_is_missing_names_the_flag_that_adds_it() -> None:
    for key, flag in (
        ("decoder.layers.mlp.shared_experts.gate_weight", "--moe-shared-expert-gate"),
        ("decoder.layers.self_attention.linear_qkv.bias", "--add-qkv-bias"),
        ("decoder.layers.mlp.router.bias", "the absence of --disable-bias-linear"),
        ("decoder.layers.mlp.something_new", "--load"),
    ):
        assert added_by(key, ()) == flag
