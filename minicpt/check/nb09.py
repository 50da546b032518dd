"""Checkers of notebook 09: the size of the key-value cache; a gradient gathered row by row."""

import torch

from .engine import NotYet, checker, expect, same


@checker("09.1")
def cache_size(student, generator):
    """2 (keys, values) x layers x rows x tokens x key-value heads x width of a head x itemsize."""
    import matplotlib.pyplot as plt

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=generator))

    given, wants, wrongs = [], [], []
    for kv_heads, share, itemsize in ((draw(2, 5), 3, 2), (draw(2, 5), 1, 4), (draw(2, 5), 5, 1)):
        layers, head, rows, tokens = draw(3, 40), 16 * draw(2, 9), draw(3, 9), draw(50, 400)
        heads = kv_heads * share
        width = heads * head
        want = 2 * layers * rows * tokens * kv_heads * head * itemsize
        given.append((layers, width, heads, kv_heads, rows, tokens, itemsize))
        wants.append(want)
        wrongs.append(
            {
                "factor 2 is missing: a cache holds keys and values.": want // 2,
                "every query head has keys and values of its own here; with grouped "
                "heads only `kv_heads` of them are kept.": want * share,
                "the rows are missing: each sequence that is scored at the same time has a cache.": want
                // rows,
                "the bytes of a number are missing: you counted numbers.": want // itemsize,
                "a number takes `itemsize` bytes, not always 4.": want // itemsize * 4,
                "a number takes `itemsize` bytes, not always 2.": want // itemsize * 2,
                "the layers are missing: each keeps keys and values of its own.": want // layers,
                "the tokens are missing.": want // tokens,
                "a head is not as wide as the model: width // heads.": want * heads,
                "the width is divided by the key-value heads; it is shared "
                "by the query heads, width // heads.": want * share,
                "the tokens are squared: that is the matrix of "
                "attention weights, which is not kept.": want * tokens,
                "these are bits: eight to a byte, and `itemsize` is in bytes already.": want * 8,
                "these are GiB: return bytes.": want / 2**30,
            }
        )
    got = [student(*arguments) for arguments in given]
    same(
        got,
        wants,
        {words: [case[words] for case in wrongs] for words in wrongs[0]},
        "the list of three sizes",
    )
    figure, panel = plt.subplots(figsize=(5, 2.4), layout="constrained")
    heads = [32, 16, 8, 4, 1]
    sizes = [student(32, 4096, 32, kept, 64, 360, 2) / 2**30 for kept in heads]
    bars = panel.bar(
        range(len(heads)), sizes, color=["#0072B2" if kept != 8 else "#D55E00" for kept in heads]
    )
    panel.bar_label(bars, [f"{size:.1f}" for size in sizes])
    panel.set(
        xticks=range(len(heads)),
        xticklabels=heads,
        xlabel="heads of keys and values (of 32 query heads)",
        ylabel="GiB",
        ylim=(0, 1.15 * max(sizes)),
    )
    plt.close(figure)
    return (
        figure,
        "Cache of 64 rows by the number of key-value heads: half the "
        "heads, half the bar; Llama 3's is 8.",
    )


@checker("09.2")
def accumulated_gradient(student, generator):
    """Sum each row's losses, backward, next row; divide by the number of all labels at the end."""
    import matplotlib.pyplot as plt

    D = 4
    for counts in ((1, 2, 6), (5, 1, 3, 2)):
        order = torch.randperm(len(counts), generator=generator).tolist()
        cases = [
            (
                torch.randn(counts[i], D, generator=generator),
                2 * torch.randn(counts[i], generator=generator),
            )
            for i in order
        ]
        weight, done, running = torch.randn(D, generator=generator), set(), []

        def plain(weight, row, cases=cases):
            x, y = cases[row]
            return (x @ weight - y) ** 2

        def losses_of(weight, row, done=done, running=running, plain=plain):
            losses = plain(weight, row)
            if losses.requires_grad:
                if set(running) - done:
                    raise NotYet(
                        "the activations of several rows are kept at once, which is "
                        "what cutting should avoid: call backward (or autograd.grad) "
                        "for a row before you ask for the next."
                    )
                running.append(row)
                losses.register_hook(lambda _: done.add(row))
            elif torch.is_grad_enabled():
                raise NotYet(
                    "the losses have no gradient: begin with weight.detach().requires_grad_()."
                )
            return losses

        def gradient(of, weight=weight, cases=cases, plain=plain):
            leaf = weight.clone().requires_grad_()
            return torch.autograd.grad(of([plain(leaf, row) for row in range(len(cases))]), leaf)[0]

        n = sum(counts)
        want = gradient(lambda losses: torch.cat(losses).mean())
        means = gradient(lambda losses: torch.stack([loss.mean() for loss in losses]).mean())
        wrong = {
            "it is the mean of the rows' means: a label in a row of many "
            "counts less than a label in a row of one. Add the sums, and "
            "divide by the number of all labels at the end.": means,
            "the rows' means are added up: add their sums, and "
            "divide by the number of all labels.": means * len(counts),
            "it is the sum over all labels: divide by their number.": want * n,
            "the sum is divided by the number of rows: divide by the number of labels.": want
            * n
            / len(counts),
            "only the last row's gradient is left: gradients must add up over the rows.": gradient(
                lambda losses: losses[-1].sum()
            )
            / n,
            "only the last row's gradient is left, as its mean: "
            "gradients must add up over the rows.": gradient(lambda losses: losses[-1].mean()),
            "only the first row is used.": gradient(lambda losses: losses[0].sum()) / n,
            "the sign is turned: return the gradient, not the step.": -want,
        }
        same(student(weight, list(range(len(counts))), losses_of), want, wrong, "the gradient")
        expect(done == set(range(len(counts))), "not all rows were used.")
    got = student(weight, list(range(len(counts))), plain)
    figure, panel = plt.subplots(figsize=(5.4, 2.4), layout="constrained")
    for shift, values, colour, label in (
        (-0.27, want, "#999999", "all rows at once"),
        (0, got, "#0072B2", "yours"),
        (0.27, means, "#D55E00", "mean of means"),
    ):
        places = [i + shift for i in range(D)]
        panel.bar(places, values.tolist(), width=0.25, color=colour, edgecolor="black", label=label)
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set(xticks=range(D), xlabel="number of the weight", ylabel="gradient")
    figure.legend(loc="outside right upper", frameon=False)
    plt.close(figure)
    return (
        figure,
        "The gradient's four numbers: yours as high as all rows' at "
        "once, the mean of means elsewhere.",
    )
