"""Checkers of notebook 03: a prompt before a batch, a start from words, the nearest words."""

import torch
from torch import Tensor

from ..core.loss import IGNORE
from .engine import checker, expect, same

BLUE, ORANGE, YELLOW, GREY = "#56B4E9", "#D55E00", "#F6D58F", "#E4E4E4"


@checker("03.1")
def put_before(student, generator):
    """The prompt stands before every row; rows may see it, and the loss asks nothing of it."""
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    for B, P, T, D in ((2, 1, 2, 2), (3, 2, 5, 4), (2, 3, 3, 6)):  # a small one first, to be shown
        prompt = torch.randn(P, D, generator=generator)
        embeds = torch.randn(B, T, D, generator=generator)
        lengths = torch.tensor([T - i % 2 for i in range(B)])
        mask = (torch.arange(T) < lengths[:, None]).long()  # padding on the right
        labels = torch.full((B, T), IGNORE)
        labels[torch.arange(B), lengths - 1] = torch.randint(1, 50, (B,), generator=generator)
        got = student(prompt, embeds, mask, labels)
        expect(
            isinstance(got, (tuple, list)) and len(got) == 3,
            "return three tensors: embeds, mask, labels, each P longer.",
        )
        every = prompt.expand(B, P, D)
        same(
            got[0],
            torch.cat((every, embeds), 1),
            {
                "the prompt comes after the text; a causal model reads from the left, so the text "
                "never sees it there. It must come before.": torch.cat((embeds, every), 1),
                "only the embeddings of the text came back; put the prompt before them.": embeds,
                "only the first row has the prompt: every row of the batch needs it.": torch.cat(
                    (torch.cat((prompt[None], torch.zeros(B - 1, P, D))), embeds), 1
                ),
                "the prompt's tokens are in reverse order.": torch.cat((every.flip(1), embeds), 1),
            },
            "the batch of embeddings",
        )
        ones, zeros = torch.ones(B, P).long(), torch.zeros(B, P).long()
        same(
            got[1],
            torch.cat((ones, mask), 1),
            {
                "the mask is 0 on the prompt: then no token may look at "
                "it, and training it changes nothing.": torch.cat((zeros, mask), 1),
                "the mask is still T long; embeddings and mask must have one length, P + T.": mask,
                "the mask's ones for the prompt stand "
                "after the text; they belong before it.": torch.cat((mask, ones), 1),
                "the mask is 1 everywhere: the padding "
                "at the end would be read as text.": torch.ones(B, P + T).long(),
            },
            f"the result for mask {mask.tolist()} and P = {P}",
        )
        same(
            got[2],
            torch.cat((zeros + IGNORE, labels), 1),
            {
                "the prompt's labels are 0, and that is a token of the vocabulary: the loss would "
                "ask for it P times. -100 means: no label.": torch.cat((zeros, labels), 1),
                "the prompt's labels are 1, as in the mask; -100 means: no label.": torch.cat(
                    (ones, labels), 1
                ),
                "the labels are still T long; they must be as long as the logits, P + T.": labels,
                "the -100s of the prompt stand after the text, so that every "
                "label has moved away from its token.": torch.cat((labels, zeros + IGNORE), 1),
            },
            f"the result for labels {labels.tolist()} and P = {P}",
        )
    names = ["prompt", "text", "label", "padding"]
    figure, panel = plt.subplots(figsize=(6, 1.7), layout="constrained")
    for b in range(B):
        for s in range(P + T):
            kind = 0 if s < P else 3 if not got[1][b, s] else 2 if got[2][b, s] != IGNORE else 1
            panel.barh(
                -b,
                0.9,
                left=s,
                height=0.8,
                color=[YELLOW, BLUE, ORANGE, GREY][kind],
                edgecolor="#555555",
                hatch="//" if kind == 0 else None,
                linewidth=1.8 if kind == 2 else 0.5,
            )
    panel.set(
        yticks=[-b for b in range(B)], yticklabels=[f"row {b}" for b in range(B)], xlabel="position"
    )
    figure.legend(
        handles=[
            Patch(
                facecolor=colour, edgecolor="#555555", label=name, hatch="//" * (name == "prompt")
            )
            for name, colour in zip(names, (YELLOW, BLUE, ORANGE, GREY))
        ],
        loc="outside upper center",
        ncols=4,
        frameon=False,
    )
    plt.close(figure)
    return (
        figure,
        "Your batch: in every row the hatched prompt, then the text, "
        "its label in a thick frame, padding.",
    )


@checker("03.2")
def from_words(student, generator):
    """Soft token i starts at the embedding of word i, counted round and round."""
    import matplotlib.pyplot as plt

    V, D = 20, 6
    for count, P in ((2, 3), (3, 8), (5, 3), (4, 1)):  # a small one first, to be shown
        ids = torch.randperm(V - 1, generator=generator)[:count].add(1).tolist()
        embedding = torch.randn(V, D, generator=generator).requires_grad_()
        rows = embedding.detach()
        turns = ids * P
        got = student(ids, P, embedding)
        kept = got.detach() if isinstance(got, Tensor) else got
        wrong = {
            "every word is repeated in place (a a b b ...); the list is to be "
            "repeated as a whole (a b a b ...).": rows[
                [i for i in ids for _ in range(-(-P // count))][:P]
            ],
            "these are the words' ids; return their embeddings, (P, D).": torch.tensor(turns[:P]),
            "the list starts at its end: the first soft token is the first word.": rows[
                (ids[::-1] * P)[:P]
            ],
            "the last words are kept; cut off what comes after the first P.": rows[ids[-P:]]
            if P < count
            else rows[:0],
            "all soft tokens start at the mean of the words, so nothing tells "
            "them apart. Each starts at one word.": rows[ids].mean(0).expand(P, D),
            "the remaining places are filled with the last word; begin the list again.": rows[
                (ids + ids[-1:] * P)[:P]
            ],
            "the remaining places are zeros; begin the list again.": torch.cat(
                (rows[ids], torch.zeros(P, D))
            )[:P],
            "these are the first rows of the vocabulary, whatever the words are.": rows[:P],
            "the rows have been scaled; copy them as they are.": rows[turns[:P]]
            / rows[turns[:P]].norm(dim=1, keepdim=True),
            "it has a place for every word; P soft tokens are "
            "asked for. Repeat the list, or cut it.": rows[ids],
            "the list was repeated and not cut to P.": rows[(ids * -(-P // count))],
        }
        want = rows[turns[:P]]
        same(kept, want, wrong, f"the start from the ids {ids} for P = {P}")
        expect(
            got.grad_fn is None,  # a leaf may require a gradient: an nn.Parameter is as good
            "the values are right, but they hang on the embedding: an optimiser refuses such a "
            "tensor, or the gradient goes to the vocabulary. Return a copy: .detach().clone().",
        )
        shared = got.untyped_storage().data_ptr() == embedding.untyped_storage().data_ptr()
        expect(
            not shared,
            "the values are right, but they are the vocabulary's own memory: training the prompt "
            "would change the words. Return a copy: .clone().",
        )
        if count == 3:
            drawn = ids, kept, rows
    ids, kept, rows = drawn
    figure, panels = plt.subplots(
        1, 2, figsize=(6, 2.6), width_ratios=(len(ids), len(kept)), layout="constrained"
    )
    for panel, values, title in zip(
        panels, (rows[ids], kept), ("the words", "the start of the prompt")
    ):
        panel.imshow(values.T.tolist(), cmap="PuOr", vmin=-2.5, vmax=2.5, aspect="auto")
        panel.set(title=title, xticks=range(len(values)), yticks=[])
    panels[0].set_xticklabels("abc")
    panels[1].set_xticklabels([("abc" * len(kept))[i] for i in range(len(kept))])
    panels[0].set_ylabel("dimension")
    plt.close(figure)
    return (
        figure,
        "Left: three words as coloured columns; right: eight soft tokens that repeat them in turn.",
    )


@checker("03.3")
def nearest(student, generator):
    """The k rows of the vocabulary with the largest cosine to each soft token."""
    import matplotlib.pyplot as plt

    for P, V, D, k in ((1, 6, 4, 2), (3, 40, 12, 3), (2, 30, 8, 1)):
        axes = torch.linalg.qr(torch.randn(D, D, generator=generator))[
            0
        ].T  # orthonormal: two directions a soft token
        u, v = axes[:P], axes[P : 2 * P]
        # By cosine the short word wins, then the long one; by dot product the long one; by distance
        # the one of the soft token's own length. No order is another one read backwards: each
        # mistake has an answer of its own.
        angles = torch.tensor([0.15, 0.5, 0.8])
        lengths = torch.tensor([0.4, 5.0, 2.0])
        planted = [n * (a.cos() * u + a.sin() * v) for a, n in zip(angles, lengths)]
        planted.append(-1.5 * u)  # the opposite direction
        others = torch.randn(V - 4 * P, D, generator=generator)
        others -= others @ u.T @ u  # no cosine to any soft token
        order = torch.randperm(V, generator=generator)
        embedding = torch.cat((*planted, others))[order]
        prompt = 2 * u
        unit = embedding / embedding.norm(dim=1, keepdim=True)
        cosine = (prompt / 2) @ unit.T  # (P, V)
        dot = prompt @ embedding.T
        distance = torch.cdist(prompt, embedding)
        ids = cosine.topk(k).indices
        wrong = {
            "this is the dot product: long words win, whatever "
            "they point at. Divide by the lengths.": dot.topk(k),
            "this is the Euclidean distance, which asks for like length as "
            "well. Compare directions: the cosine.": distance.topk(k, largest=False),
            "these are the words that are farthest away by cosine: take the largest.": cosine.topk(
                k, largest=False
            ),
            "a word of the opposite direction is not near: leave the cosine its sign.": (
                cosine.abs().topk(k)
            ),
        }
        wrong = {words: top.indices for words, top in wrong.items()} | {
            "these are the cosines themselves; return the words' ids.": cosine.topk(k).values,
            "these are all cosines, (P, V); return the ids of the k largest in each row.": cosine,
            "the best come last; the nearest word comes first.": ids.flip(1),
            "these are the soft tokens nearest to each word; find the words nearest to each soft token.": (
                unit @ u.T
            )
            .topk(min(k, P))
            .indices,
            "words and soft tokens are exchanged: a row is a soft token, (P, k).": ids.T,
        }
        got = student(prompt, embedding, k)
        expect(
            not isinstance(got, tuple),
            "topk returns the values and the indices; return the indices alone.",
        )
        what = "the ids"
        if P == 1:  # small enough to be shown
            cosines = ", ".join(f"{c:.2f}" for c in cosine[0].tolist())
            what = f"the ids, for one soft token and k = {k}, its cosines to the words being {cosines},"
        same(got, ids, wrong, what)
        if k == 3:
            drawn = [
                word @ torch.stack((u[0], v[0])).T for word in embedding[cosine[0].topk(3).indices]
            ]
    figure, panel = plt.subplots(figsize=(5.6, 2.8), layout="constrained")
    names = ["nearest by cosine", "nearest by dot product", "nearest by distance"]
    for (x, y), name, colour, line in zip(
        drawn, names, (ORANGE, "#009E73", BLUE), ("-", ":", "--")
    ):
        panel.plot(
            [0, x], [0, y], line, marker="o", markevery=[1], color=colour, label=name, linewidth=2
        )
    panel.plot(
        [0, 2],
        [0, 0],
        "-",
        marker="*",
        markevery=[1],
        markersize=11,
        color="black",
        label="soft token",
    )
    panel.set(aspect="equal", xlim=(-0.2, 5), xlabel="along the soft token", ylabel="across")
    figure.legend(loc="outside right center", frameon=False)
    plt.close(figure)
    return (
        figure,
        "A soft token and three words as lines from zero; nearest "
        "is the short one of its direction.",
    )
