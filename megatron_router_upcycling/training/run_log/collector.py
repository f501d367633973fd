"""Routing statistics of a model in training, from Megatron's own routers.

Every kind of router is a ``TopKRouter`` whose ``routing`` turns logits into weights and a map; the collector
wraps that method. Sums stay on the device; only ``gather`` synchronises ranks. Evaluation is not counted, and
activation recomputation does not count a token twice. In CUDA graphs this Python runs only when a layer is
captured; so the tensors that it writes keep their place, and tensors say whether a pass counts.
"""

import math
import re
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from megatron.core.transformer.cuda_graphs import is_graph_warmup

from megatron_router_upcycling.files import write_whole
from megatron_router_upcycling.layers.statistics import SUMS, routing_sums
from megatron_router_upcycling.training.run_log import measures

# Measures that cost more and change slowly: how often one router's first choice is the mixture's, the cosine
# between the gates of two routers, the distance of two experts over their norm, and the change of the
# router's parameters since the run's start over their norm (of all, and of each of the mixture's two kinds).
DRIFTS = ("router_drift", "query_weight_drift", "expert_key_drift")
RARE = ("router_agreement", "gate_cosine", "expert_distance", *DRIFTS)
SAMPLE_TOKENS = 256  # of one micro-batch, for router_agreement
SAMPLE_ROWS = 16  # of each expert's first matrix, evenly spaced, for expert_distance
INITIAL = "routing_initial"  # folder in --save: the routers' parameters at the run's start
# Of one expert [2F, D], or of all of a rank's experts [n, 2F, D].
FC1 = re.compile(r"(?:local_experts\.\d+\.)?linear_fc1[._]weight\d*")


class RoutingCollector:
    """Collects from the routers of this rank's ``model`` chunks in the steps for which ``count`` asks."""

    def __init__(self, model: Sequence[torch.nn.Module], args: Namespace) -> None:
        from megatron.core.transformer.moe.moe_layer import MoELayer

        self.captured = args.cuda_graph_impl == "local"
        # With FSDP, parameters are sharded, and the RARE measures, which read them whole, are left out.
        self.whole = not (args.use_megatron_fsdp or args.use_torch_fsdp2)
        self.layers: dict[int, Any] = {}  # of this rank: layer from 0 -> its MoELayer
        for module in (module for chunk in model for module in chunk.modules()):
            if isinstance(module, MoELayer) and not getattr(module.router, "is_mtp_layer", False):
                self.layers[module.router.layer_number - 1] = module
        size = args.num_layers, len(SUMS) + args.num_experts
        device = next(model[0].parameters()).device
        self.sums = torch.zeros(size, dtype=torch.float64, device=device)
        self.samples: dict[int, torch.Tensor] = {}  # inputs of the routers, for router_agreement
        self.counting = self.sampling = False
        # The same for the device: whether a pass is counted, and of which layers the next inputs are kept.
        self.counts = torch.zeros((), dtype=torch.bool, device=device)
        self.keeps = torch.zeros(args.num_layers, dtype=torch.bool, device=device)
        self.initial: dict[int, dict[str, torch.Tensor]] = {}
        for index, layer in self.layers.items():
            if self.whole:
                self.initial[index] = _initial(index, layer.router, args)
            self._attach(index, layer.router)

    def count(self, counting: bool, sampling: bool) -> None:
        """Whether the coming passes are counted, and whether the inputs of the first of them are kept."""
        self.counting, self.sampling = counting, sampling
        self.counts.fill_(counting)
        self.keeps.fill_(sampling)

    def _attach(self, index: int, router: Any) -> None:
        route, forward = router.routing, router.forward

        def sees(wanted: bool) -> bool:
            trained = router.training and torch.is_grad_enabled() and not is_graph_warmup()
            return trained and (wanted or self.captured)

        def routing(logits: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            output = route(logits, *args, **kwargs)
            if sees(self.counting):
                with torch.no_grad():
                    found = getattr(router, "statistics", None)  # of a FusedRoutingRouter
                    if found is None:
                        weights, routing_map = output
                        if router.config.moe_pad_expert_input_to_capacity:
                            routing_map = routing_map & (weights > 0)  # the map counts the padding too
                        scores = _scores(router, logits.detach().flatten(0, -2))
                        found = routing_sums(scores, weights.detach(), routing_map, router.topk)
                    self.sums[index].add_(torch.where(self.counts, found, 0))
            return output

        def keeping(tokens: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if sees(self.sampling):
                self._keep(index, tokens.detach().flatten(0, -2))
            return forward(tokens, *args, **kwargs)

        router.routing, router.forward = routing, keeping

    def _keep(self, index: int, tokens: torch.Tensor) -> None:
        stride = max(1, len(tokens) // SAMPLE_TOKENS)
        sample = tokens[::stride][:SAMPLE_TOKENS]
        kept = self.samples.setdefault(index, torch.zeros_like(sample))  # in the first step, before graphs
        kept.copy_(torch.where(self.keeps[index], sample, kept))
        self.keeps[index].fill_(False)

    @torch.no_grad()
    def gather(self, with_rare: bool) -> dict[str, Any]:
        """The statistics that all ranks collected since the last call. Collective: every rank must call it.

        Returns ``layers``, the MoE layers from 0, and for each measure a list over them; ``rare`` likewise.
        """
        rare = torch.zeros((len(self.sums), len(RARE), 2), dtype=torch.float64)  # sum over ranks, ranks
        with_rare = with_rare and self.whole
        if with_rare:
            for index, values in self._rare().items():
                for column, name in enumerate(RARE):
                    if not math.isnan(value := values.get(name, math.nan)):
                        rare[index, column] = torch.tensor((value, 1.0))
        everything = torch.cat((self.sums, rare.flatten(1).to(self.sums.device)), dim=1)
        # One sum over all ranks is enough: layers of other pipeline stages are zero here, and tensor-parallel
        # ranks that see the same tokens add equally to numerators and denominators.
        torch.distributed.all_reduce(everything)
        sums, rare = everything.cpu().split((self.sums.shape[1], 2 * len(RARE)), dim=1)
        self.sums.zero_()
        found = {i: summary for i, row in enumerate(sums) if (summary := measures.summarise(row))}
        record: dict[str, Any] = {"layers": list(found)}
        for summary in found.values():
            for name, value in summary.items():
                record.setdefault(name, []).append(value)
        if with_rare:
            means = rare.unflatten(1, (-1, 2))[list(found)]
            columns = (means[..., 0] / means[..., 1]).t()  # NaN where no rank had any
            named = dict(zip(RARE, columns, strict=True))
            record["rare"] = {name: c.tolist() for name, c in named.items() if not c.isnan().all()}
        return record

    def _rare(self) -> dict[int, dict[str, float]]:
        found = {}
        distances = _expert_distances(self.layers)
        for index, layer in self.layers.items():
            router, initial = layer.router, self.initial[index]
            values = {"expert_distance": distances[index]}
            squares = {}  # of the change and of what changed
            for name, parameter in router.named_parameters():
                if name in initial:
                    before = initial[name].float()
                    change = parameter.float() - before
                    squares[name] = torch.stack((change.square().sum(), before.square().sum()))
                    values[f"{name}_drift"] = _root_ratio(squares[name])
            if squares:
                values["router_drift"] = _root_ratio(torch.stack(list(squares.values())).sum(dim=0))
            if hasattr(router, "own_measures"):
                values |= router.own_measures(self.samples.get(index))
            found[index] = values
        return found


def _root_ratio(squares: torch.Tensor) -> float:
    change, norm = squares.tolist()
    return math.sqrt(change / norm) if norm else math.nan


def _scores(router: Any, logits: torch.Tensor) -> torch.Tensor:
    """The routing distribution [T, n] in float32 of logits [T, n], by the router's score function."""
    if router.score_function == "softmax":
        return logits.float().softmax(dim=1)
    from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss

    return compute_routing_scores_for_aux_loss(logits.float(), router.topk, router.score_function)[1]


def _expert_distances(layers: dict[int, Any]) -> dict[int, float]:
    """For each layer, ``measures.spread`` of sampled rows of its experts on all expert-parallel ranks."""
    from megatron.core import parallel_state

    parts = []
    for layer in layers.values():
        found = [p for name, p in layer.experts.named_parameters() if FC1.fullmatch(name)]
        weights = [w for p in found for w in (p.unbind() if p.dim() == 3 else (p,)) if w.dim() == 2]
        rows = torch.stack([w[:: max(1, len(w) // SAMPLE_ROWS)][:SAMPLE_ROWS].flatten() for w in weights])
        rows = rows.double()  # a small difference of large sums
        counts = torch.stack((rows.square().sum(), rows.new_tensor(len(rows))))
        parts.append(torch.cat((rows.sum(dim=0), counts)))
    if not parts:
        return {}
    totals = torch.stack(parts)
    torch.distributed.all_reduce(totals, group=parallel_state.get_expert_model_parallel_group())
    spreads = [measures.spread(row[:-2], float(row[-2]), int(row[-1])) for row in totals.cpu()]
    return dict(zip(layers, spreads, strict=True))


def _initial(index: int, router: Any, args: Namespace) -> dict[str, torch.Tensor]:
    """A router's parameters at the run's start, which are saved in the run's folder for resuming."""
    from megatron.core import parallel_state

    now = {name: p.detach().clone() for name, p in router.named_parameters()}
    if not args.save or not now:
        return now
    path = Path(args.save) / INITIAL / f"layer_{index:03}.safetensors"
    if args.iteration and path.is_file():
        return safetensors.torch.load_file(path, device=str(next(iter(now.values())).device))
    replica = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    if replica == 0 and parallel_state.get_tensor_model_parallel_rank() == 0:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, safetensors.torch.save({name: p.contiguous().cpu() for name, p in now.items()}))
        except OSError as error:
            print(f"{path}: cannot be written ({error.strerror}); after a resume drift counts from there")
    return now
