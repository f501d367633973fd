"""Grouped expert products against Megatron's loop over experts, on the CPU."""

from typing import Any

import torch

from tests import launch
from tests.layers import one_rank

EXPERTS = 4


def test_equal_to_megatrons_loop_forward_and_backward() -> None:
    launch.python("-c", "from tests.layers import test_experts; test_experts.compare()").ok()


def compare() -> None:
    one_rank.start()
    from megatron.core.models.backends import LocalSpecProvider
    from megatron.core.transformer.moe.experts import SequentialMLP

    from megatron_router_upcycling.layers import experts

    assert experts.usable("cpu") is None
    builders = [LocalSpecProvider().grouped_mlp_modules(grouped) for grouped in (False, True)]
    for counts in ([7, 0, 30, 3], [40, 0, 0, 0], [0, 0, 0, 0]):
        loop, grouped = (build(builder) for builder in builders)
        assert isinstance(grouped, experts.GroupedExperts)
        with torch.no_grad():
            for linear in experts.LINEARS:
                weights = [getattr(expert, linear).weight for expert in loop.local_experts]
                grouped.get_parameter(f"{linear}_weight").copy_(torch.stack(weights))
        expected, found = stacked(run(loop, counts)), run(grouped, counts)
        assert expected.keys() == found.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    other: dict[str, Any] = {"add_bias_linear": True, "activation_func": torch.nn.functional.gelu}
    other |= {"glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0, "recompute_modules": ["moe_act"]}
    for name, value in other.items():
        assert isinstance(build(builders[1], **{name: value}), SequentialMLP), name


def stacked(values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The loop's gradients under the names of the stacked parameters."""
    found = {name: value for name, value in values.items() if "local_experts" not in name}
    for linear in ("linear_fc1", "linear_fc2"):
        each = [values[f"local_experts.{number}.{linear}.weight"] for number in range(EXPERTS)]
        found[f"{linear}_weight"] = torch.stack(each)
    return found


def build(builder: Any, **changes: Any) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    config = one_rank.config(num_moe_experts=EXPERTS, **changes)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    return builder(num_local_experts=EXPERTS, config=config, pg_collection=groups)


def run(experts: Any, counts: list[int]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randn(sum(counts), one_rank.D, generator=generator, requires_grad=True)
    probs = torch.rand(sum(counts), generator=generator, requires_grad=True)
    output, bias = experts(tokens, torch.tensor(counts), probs)
    assert bias is None
    output.backward(torch.randn(output.shape, generator=generator))
    found = {"output": output.detach(), "tokens": tokens.grad, "probs": probs.grad}
    for name, parameter in experts.named_parameters():
        found[name] = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
    return {name: torch.zeros(0) if value is None else value for name, value in found.items()}
