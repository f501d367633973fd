"""Graphs are chosen where they are known to work, and what they hold needs no Python."""

from argparse import Namespace
from typing import Any

import pytest
import torch

from megatron_router_upcycling.training import cuda_graphs
from tests import launch
from tests.layers import one_rank

ARGS = {name: known[0] for name, known in cuda_graphs.KNOWN.items()}
ARGS |= {"num_experts": 8, "micro_batch_size": 4, "eval_micro_batch_size": 4}


@pytest.mark.parametrize("name", ["num_experts", "eval_micro_batch_size", *cuda_graphs.KNOWN])
def test_anything_else_than_what_is_known_keeps_a_run_eager(name: str) -> None:
    assert cuda_graphs.why_not(Namespace(**ARGS)) is None
    other = None if name == "num_experts" else "other"
    assert cuda_graphs.why_not(Namespace(**ARGS | {name: other})) == f"{name}={other}"


def test_a_replay_without_python_finds_what_an_eager_run_does() -> None:
    """Of both kinds of routers, in a process of its own, with Megatron on the CPU."""
    launch.python("-c", "from tests.training import test_cuda_graphs as t; t.compare()").ok()


def compare() -> None:
    one_rank.start()
    from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
    from megatron.core.transformer.moe.router import TopKRouter

    from megatron_router_upcycling.layers.dispatch import UpcycledMoELayer
    from megatron_router_upcycling.layers.kernels import routing as kernel
    from megatron_router_upcycling.layers.routing import FusedRoutingRouter
    from tests.layers.test_dispatch import EXPERTS, build

    kernel.usable, kernel.route = lambda logits: True, kernel.plain
    inputs = torch.randn(6, 12, 2, one_rank.D, generator=torch.Generator().manual_seed(3))
    for kind in (TopKRouter, FusedRoutingRouter):
        found: dict[str, Any] = {}
        for impl in ("none", "local"):
            losses = {"moe_router_load_balancing_type": "aux_loss", "moe_z_loss_coeff": 1e-3}
            layer = build(UpcycledMoELayer, 2, False, **losses)
            layer.config.moe_aux_loss_coeff = 0.02
            layer.router = kind(layer.config, get_default_pg_collection())
            layer.router.weight.data.normal_(generator=torch.Generator().manual_seed(5))
            layer.router.set_layer_number(1)
            found[impl] = steps(layer, inputs, impl, EXPERTS)
        assert found["none"] == found["local"]
        assert (getattr(layer.router, "statistics", None) is None) == (kind is TopKRouter)
        counted = [record["layers"] for record, *_ in found["none"]]
        assert found["none"][2][2] == inputs[4].flatten(0, 1).tolist()  # the step's first micro-batch
        assert counted == [[0], [], [0]] and found["none"][2][0]["load"] != found["none"][0][0]["load"]


def steps(layer: Any, inputs: torch.Tensor, impl: str, experts: int) -> list[Any]:
    """Three steps of two micro-batches, of which the second is not counted, and the last keeps its tokens.

    With ``impl`` local all but the first step are replays of one capture, and so are evaluations after each.
    """
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_router_upcycling.training.run_log.collector import RoutingCollector
    from tests.tape import Capture

    args = Namespace(num_layers=1, num_experts=experts, iteration=0, save=None, cuda_graph_impl=impl)
    args.use_megatron_fsdp = args.use_torch_fsdp2 = False
    collector, tracker, found = RoutingCollector([layer], args), get_moe_metrics_tracker(), []
    tracker.metrics.clear()  # type: ignore[attr-defined]
    fixed, call = torch.empty_like(inputs[0]), lambda tokens: layer.router(tokens)
    for step in range(3):
        collector.count(step != 1, step == 2)
        for micro_batch in inputs.view(3, 2, *inputs.shape[1:])[step]:
            call(micro_batch)
        collector.count(False, False)
        if step == 0 and impl == "local":
            with Capture() as capture:
                layer.router(fixed)
            call = lambda tokens: (fixed.copy_(tokens), capture.tape.replay())  # noqa: E731, B023
        losses = {name: entry.values.tolist() for name, entry in tracker.metrics.items()}
        layer.eval()
        call(inputs[0])
        layer.train()
        tracker.clear()  # as Megatron's loop does
        found.append((collector.gather(False), losses, collector.samples[0].tolist() if step == 2 else None))
    return found


def test_values_are_checked_after_the_passes_in_one_reading() -> None:
    """In a process of its own: symbols stay replaced."""
    launch.python("-c", "from tests.training import test_cuda_graphs as t; t.check()").ok()


def check() -> None:
    one_rank.start()
    from megatron.core.pipeline_parallel import schedules
    from megatron.core.rerun_state_machine import RerunStateMachine
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from megatron_router_upcycling.training.patches import graphs

    machine, readings, moved = RerunStateMachine(), [], torch.Tensor.cpu
    metrics = get_moe_metrics_tracker()
    metrics.record("z_loss", torch.tensor(2.0), 1, 1)

    def create() -> str:  # warms layers up, which adds to Megatron's metrics
        metrics.record("z_loss", torch.tensor(5.0), 1, 1)
        return "created"

    schedules.create_cudagraphs = create
    graphs.install()
    torch.Tensor.cpu = lambda self: (readings.append(self.tolist()), moved(self))[1]

    def norms(*values: float) -> None:
        for value in values:
            result = torch.tensor(value)
            machine.validate_result(result, torch.isnan, "found NaN", tolerance=0.1, fatal=True)
            result /= 2

    norms(1.0, 2.0)
    assert readings == [] and schedules.create_cudagraphs() == "created" and readings == [[1.0, 2.0]]
    assert float(metrics.metrics["z_loss"].values) == 2.0
    norms(3.0, float("nan"))
    for expected in ("Unexpected result nan (message='found NaN')", None):  # and once only
        try:
            schedules.create_cudagraphs()
        except RuntimeError as error:
            assert expected and expected in str(error), error
        else:
            assert expected is None
