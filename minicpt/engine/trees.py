"""A row that holds the beginnings of many labels at once, each seeing the query and what it goes on from, nothing else.

    query   Mean  Natural  Office  Mean·of        "Mean of Transportation", "Natural Place", "Office Holder"
    0 … 79   80      80      80      81           positions: each token's as if it stood there alone

The model is told so by an attention mask (B, 1, T, S) and by positions; not every model takes them.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..core.loss import send
from .modules import found_once
from .passes import run


@found_once
def takes_trees(model) -> bool:
    """Whether the model takes such rows, tried out: two tokens that go on from one must give what each gives alone.

    ALiBi does not, nor does a model whose masks are its own affair.
    """
    weight = model.get_input_embeddings().weight
    rows = weight[None, len(weight) // 2 :][:, :3]  # some words
    mask, places = tree_mask([1], [(0,), (1,)], 0, weight.dtype)
    try:
        tree = run(model, rows, mask, position_ids=send(places, weight.device)).hidden[0, 2]
        alone = run(model, rows[:, [0, 2]]).hidden[0, 1]
    except Exception:  # it may fail in any way
        return False
    return bool((tree - alone).abs().max() <= 50 * torch.finfo(tree.dtype).eps * alone.abs().max())


def tree_mask(
    lengths: Sequence[int], nodes: Sequence[tuple], before: int, dtype: torch.dtype
) -> tuple[Float[Tensor, "B 1 T S"], Int[Tensor, "B S"]]:
    """What to add to the attention scores (0, or the smallest number), and all positions, of rows [query, nodes].

    `lengths` of the B queries; `nodes`: beginnings of labels, sorted, each of which stands there as its last token;
    `before`: tokens of the prefix. Padding comes last. Both are on the CPU.
    """
    T = max(lengths) + len(nodes)
    goes_on_from = torch.tensor([[a[: len(b)] == b for b in nodes] for a in nodes])
    depths = torch.tensor([len(node) - 1 for node in nodes])
    sees = torch.ones(len(lengths), T, before + T, dtype=torch.bool).tril(before)
    places = torch.arange(before + T).repeat(len(lengths), 1)  # (B, S)
    for row, n in enumerate(lengths):
        end = n + len(nodes)
        sees[row, n:end, before + n : before + end] = goes_on_from
        places[row, before + n : before + end] = before + n + depths
    mask = ~sees[:, None] * torch.finfo(dtype).min  # (B, 1, T, S)
    return mask.to(dtype), places
