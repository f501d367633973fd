"""Equations 4 to 9 of Router Upcycling (arXiv 2509.00679) on a toy, each step printed.

    .venv/bin/python examples/equations.py

One layer with H = 4 heads of size d = 2 and hidden size D = 4 becomes a mixture of m = 2 routers over n = 2
experts. What a dense model's training would bring (query projections, average keys) is made up here.
"""

import math

import torch
from torch import Tensor

from megatron_router_upcycling import RouterConfig
from megatron_router_upcycling.initialisation.heads import cosine_similarity, group_heads, init_mixture
from megatron_router_upcycling.routers.fold import fold, pool_logits

H, d, D, T = 4, 2, 4, 3  # heads, head size, hidden size, tokens


def show(title: str, value: Tensor) -> None:
    print(f"{title} {list(value.shape)}:")
    print("   " + str(value).removeprefix("tensor(").removesuffix(")").replace("\n       ", "\n   "))


def main() -> None:
    torch.set_printoptions(precision=3, sci_mode=False)
    generator = torch.Generator().manual_seed(0)
    config = RouterConfig(num_experts=2, top_k=1, num_routers=2)

    print("\n--- the dense model's attention heads ---")
    query_heads = torch.randn(H, d, D, generator=generator)
    show("W_Q by head, the rows of the query projection [H, d, D]", query_heads)
    # In a model: the mean over many tokens. Heads 0 and 2 look for alike tokens here, and so do 1 and 3.
    key_heads = torch.tensor([[2.0, 0.1], [0.2, 1.0], [1.0, 0.0], [-0.2, 2.0]])
    show("average key of each head [H, d]", key_heads)

    print("\n--- section 3.2: group heads whose average keys point the same way ---")
    show("cosine similarity of the keys [H, H]", cosine_similarity(key_heads))
    assert config.num_routers is not None
    print(f"sets of heads: {group_heads(key_heads, config.num_routers)}")

    print("\n--- equations 4 and 5: keys of the experts, query maps of the routers ---")
    query_weight, expert_key = init_mixture(query_heads, key_heads, config)
    show("eq. 4, K_i: a set's average keys, one behind the other [n, d']", expert_key)
    show("eq. 5, W^j: a set's query projections, one below the other [m, d', D]", query_weight)

    print("\n--- equations 6 to 8: the experts' scores for T tokens ---")
    x = torch.randn(T, D, generator=generator)
    show("x, hidden states [T, D]", x)
    queries = torch.einsum("jqd,td->tjq", query_weight, x)
    show("eq. 6, Q^j = W^j x [T, m, d']", queries)
    by_router = torch.einsum("tjq,iq->tji", queries, expert_key) / math.sqrt(expert_key.shape[1])
    show("eq. 7, S_i^j = Q^j . K_i / sqrt(d') [T, m, n]", by_router)
    scores = by_router.sum(dim=1)
    show("eq. 8, S_i = sum over j of S_i^j [T, n]", scores)

    print("\n--- the same, folded: what training and an exported model compute ---")
    gate = fold(query_weight, expert_key, config.pooling)
    show("A = K (W^1 + ... + W^m) / sqrt(d') [n, D]", gate)
    folded = pool_logits(x @ gate.t(), config.num_experts, 1)
    print(f"largest difference between x A^T and eq. 8: {float((folded - scores).abs().max()):.1e}")
    torch.testing.assert_close(folded, scores)

    print("\n--- equation 9: softmax over all experts, then the top k ---")
    probabilities = scores.softmax(dim=-1)
    show("R = softmax(S) [T, n]", probabilities)
    weights, experts = probabilities.topk(config.top_k, dim=-1)
    for token in range(T):
        chosen = ", ".join(
            f"expert {int(e)} with weight {float(w):.3f}"
            for e, w in zip(experts[token], weights[token], strict=True)
        )
        print(f"token {token} goes to {chosen}")


if __name__ == "__main__":
    main()
