"""YAML and flags into arguments: precedence, switches, and mistakes."""

import argparse
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_router_upcycling.config import flags, manifest, yaml_files
from megatron_router_upcycling.config.start import InitConfig
from megatron_router_upcycling.errors import UserError
from megatron_router_upcycling.routers.config import RouterConfig
from megatron_router_upcycling.routers.kinds import keys_per_expert


@pytest.fixture
def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--lr", type=float)
    parser.add_argument("--swiglu", action="store_true")
    parser.add_argument("--disable-bias-linear", action="store_false", dest="add_bias_linear")
    parser.add_argument("--log-progress", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--data-path", nargs="*")
    parser.add_argument("--dispatcher", choices=("alltoall", "allgather"))
    return parser


def test_entries_become_defaults_that_flags_override(parser: argparse.ArgumentParser) -> None:
    entries = {"num_layers": 3, "lr": "1e-3", "swiglu": True, "disable_bias_linear": True}
    flags.set_defaults(parser, entries | {"log-progress": False, "data_path": [-1, "--x"]}, "x.yaml")
    args = parser.parse_args(["--num-layers", "5"])
    assert (args.num_layers, args.lr, args.swiglu) == (5, 1e-3, True)
    assert (args.add_bias_linear, args.log_progress, args.data_path) == (False, False, ["-1", "--x"])


def test_false_and_null_undo_what_stands_below(parser: argparse.ArgumentParser) -> None:
    """A manifest or a base file may set what a file above it takes back; no flag could say so."""
    below = {"swiglu": True, "num_layers": 3, "disable_bias_linear": True, "no_log_progress": True}
    flags.set_defaults(parser, below, "below.yaml")
    above = {"swiglu": False, "num_layers": None, "disable_bias_linear": False, "no_log_progress": False}
    names = ["swiglu", "num_layers", "add_bias_linear", "log_progress"]
    assert flags.set_defaults(parser, above, "x.yaml") == names
    assert [getattr(parser.parse_args([]), name) for name in names] == [False, None, True, True]


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"num_layer": 3}, "x.yaml: unknown argument 'num_layer'; did you mean 'num_layers'?"),
        ({"num_layers": "three"}, "x.yaml: num_layers: 'three' is not valid (.* invalid int value: 'three')"),
        ({"swiglu": 1}, "x.yaml: swiglu: 1 is a switch; write true or false"),
        ({"lr": [1]}, "x.yaml: lr: [1] must be one value, or a list where the flag takes several"),
        ({"dispatcher": "flex"}, "x.yaml: dispatcher: 'flex' is not valid (.*choose from .*allgather.*)"),
    ],
)
def test_wrong_entries_name_file_and_remedy(
    parser: argparse.ArgumentParser, entries: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message).replace('\\.\\*', '.*')}$"):
        flags.set_defaults(parser, entries, "x.yaml")


def test_base_files_stand_below_and_later_ones_above_earlier_ones(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("lr: 1\nswiglu: true\nupcycling: {pooling: max, num_routers: 4}\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\nnum_layers: 2\nupcycling: {router: linear}\n")
    (tmp_path / "c.yaml").write_text("lr: 3\nnum_layers: 5\nupcycling: {pooling: sum}\n")
    (tmp_path / "d.yaml").write_text("base: [b.yaml, c.yaml]\nnum_layers: 7\nupcycling: {router: mixture}\n")
    section = {"router": "mixture", "pooling": "sum", "num_routers": 4}
    expected = {"lr": 3, "swiglu": True, "num_layers": 7, "upcycling": section}
    assert yaml_files.read_yaml(tmp_path / "d.yaml") == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: x.yaml", "builds on itself"),
        ("- a\n- b", "must be a mapping"),
        ("a: [", "not readable as YAML"),
        ("base: none.yaml", "no such file"),
        ("upcycling: 3", "'upcycling:' must be a mapping"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        yaml_files.read_yaml(path)


@pytest.mark.parametrize(("m", "c"), [(8, 1), (2, 1), (16, 2), (32, 4)])
def test_shards_of_one_copy_have_as_many_keys_as_the_copy(m: int, c: int) -> None:
    assert keys_per_expert(RouterConfig(num_experts=16, granularity=2, num_routers=m)) == c


def test_a_manifest_that_nests_deep_is_refused(tmp_path: Path) -> None:
    (tmp_path / manifest.NAME).write_text('{"format": 1, "router": ' + "[" * 30 + "]" * 30 + "}")
    with pytest.raises(UserError, match="not a manifest of format 1"):
        manifest.read(tmp_path)


@pytest.mark.parametrize(("m", "n", "heads"), [(3, 8, 16), (8, 8, 15), (0, 8, 16), (20, 8, 16)])
def test_impossible_numbers_name_those_that_work(m: int, n: int, heads: int) -> None:
    asked = f"--num-experts {n}, and as many routers" if m == n else f"--num-routers {m}"
    with pytest.raises(UserError, match=f"^{asked}: does not fit {heads} attention heads") as error:
        RouterConfig(num_experts=n, num_routers=m).shape(heads, 64)
    for near in map(int, str(error.value).rsplit("work: ", 1)[1].split(", ")):
        RouterConfig(num_experts=n, num_routers=near).shape(heads, 64)


def test_manifests_of_earlier_versions() -> None:
    """An option that is gone is read where it had its default, and refused where it had another value."""
    gone = {"logit_scale": 1.0, "expert_noise": 0.0, "drop_upcycling": 0.0, "norm_gain": False}
    gone["weights"] = "dense"
    old = {"router": {"num_experts": 4, "grouping": "greedy"}, "init": gone | {"target_entropy": 1.5}}
    assert manifest.router_config(old, "OLD") == RouterConfig(num_experts=4)
    assert manifest.init_config(old, "OLD") == InitConfig(target_entropy=1.5)
    with pytest.raises(UserError, match="^OLD: router: unknown option 'grouping'; known: .*$"):
        manifest.router_config({"router": {"grouping": "optimal"}}, "OLD")
    for name in gone:
        with pytest.raises(UserError, match=f"^OLD: init: unknown option '{name}'; known: .*$"):
            manifest.init_config({"init": gone | {name: 0.5}}, "OLD")


def test_impossible_options() -> None:
    with pytest.raises(UserError, match="x.yaml: unknown upcycling option 'routers'"):
        flags.split_section({"routers": 8}, "x.yaml")
    for name, value in (("top_k", 9), ("top_k", 0), ("router", "x"), ("num_experts", 0)):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}"):
            RouterConfig(**{name: value})
