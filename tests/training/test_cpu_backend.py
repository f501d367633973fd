"""The CPU bridge: it answers for CUDA, and refuses where a GPU is."""

from tests import launch


def test_cuda_requests_are_answered_by_the_cpu_where_there_is_no_gpu() -> None:
    launch.python(
        "-c",
        """
import torch
from megatron_router_upcycling.training.patches import cpu_backend
before, available = torch.zeros, torch.cuda.is_available
torch.cuda.is_available = lambda: True  # what a GPU answers
try:
    cpu_backend.install()
except RuntimeError:
    assert torch.zeros is before
else:
    raise SystemExit("installed on a GPU")
torch.cuda.is_available = available
cpu_backend.install()
cpu_backend.install()  # a second time changes nothing
assert torch.zeros.__wrapped__ is before
for tensor in (torch.zeros(2, device="cuda"), torch.ones(2).cuda(), torch.ones(2).to("cuda:0"),
               torch.empty(2, device=torch.cuda.current_device()), torch.ones(1).new_zeros(2, device="cuda")):
    assert tensor.device.type == "cpu"
assert torch.zeros(1).type() == "torch.cuda.FloatTensor"
assert torch.zeros(1).to(torch.float64).dtype is torch.float64
torch.cuda.manual_seed(7)
state = torch.cuda.get_rng_state()
first = torch.rand(3, device="cuda")
torch.cuda.set_rng_state(state)
assert torch.equal(first, torch.rand(3))
torch.cuda.set_rng_state(torch.tensor([7, 4096]).view(torch.uint8))  # as a GPU gives it: seed and offset
assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(7)))
import torch._dynamo.trace_rules
torch._dynamo.trace_rules.get_torch_obj_rule_map()  # refuses one function under two of torch's names
with torch.cuda.stream(torch.cuda.Stream()):
    torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
""",
    ).ok()
