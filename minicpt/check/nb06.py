"""Checkers of notebook 06: a projected step with a sign, the hidden twin, a prompt broken on purpose."""

import torch
from torch.nn.functional import normalize, softplus

from ..core.masks import is_label
from ..core.projection import FROZEN_RADIUS, project, project_together
from ..methods.context_tuning import examples_of, visible
from .engine import checker, describe, expect, same
from .nb04 import types_of

DOWN, UP = "#0072B2", "#D55E00"


def step_case(generator: torch.Generator, P: int, D: int, sign: int) -> tuple:
    """Draw a step: the student's arguments, the right answer, typical wrong ones by their words."""
    centre = 3 * torch.randn(P, D, generator=generator)
    epsilon = 0.5 + torch.rand(P, generator=generator)
    length = 0.3 + 0.2 * torch.rand(1, generator=generator).item()
    point = centre + project(torch.randn(P, D, generator=generator), 0.8 * epsilon)
    gradient = (0.3 + 3 * torch.rand(P, 1, generator=generator)) * torch.randn(
        P, D, generator=generator
    )
    outward = normalize(point[: P // 2] - centre[: P // 2], dim=1)
    # half of the points would leave the ball; the first lies outside already, so far along an axis
    # that a box shows
    outward[0] = normalize(torch.tensor([1.0] + [0.2] * (D - 1)), dim=0)
    far = torch.tensor([1.6] + [0.95] * (P // 2 - 1))
    point[: P // 2] = centre[: P // 2] + (far * epsilon[: P // 2])[:, None] * outward
    gradient[: P // 2] = sign * (outward + 0.2 * torch.randn(P // 2, D, generator=generator))
    unit, e = normalize(gradient, dim=1), epsilon[:, None]

    def moved(direction=unit, factor=sign, start=point):
        return start + factor * length * direction

    def ball(x):
        return centre + project(x - centre, epsilon)

    want = ball(moved())
    wrong = {
        "the sign is turned: +1 goes up the gradient (an attack), -1 goes down (training).": ball(
            moved(factor=-sign)
        ),
        "nothing was projected: after the step each token goes back into its ball.": moved(),
        "the projection comes before the step; it must come after, "
        "or the step leads out of the ball.": moved(start=ball(point)),
        "the point itself is projected: the ball is around the centre, not "
        "around zero. Project point - centre.": project(moved(), epsilon),
        "the centre is missing: what is projected is the "
        "distance to it; add the centre again.": project(moved() - centre, epsilon),
        "every number is clamped by itself: that is a box (the "
        "ball of the maximum norm); this ball limits the "
        "Euclidean norm of a token's delta.": centre + (moved() - centre).clamp(-e, e),
        "the gradient's length is still in the step: divide each row by its norm.": ball(
            moved(gradient)
        ),
        "the gradient is divided by its norm over all tokens: each "
        "token has a step of its own, dim=1.": ball(moved(gradient / gradient.norm())),
        "this is the step with the gradient's signs (FGSM, for the box); this "
        "one goes along the gradient itself.": ball(moved(gradient.sign())),
        "the step is projected, not the new delta: what counts is how far "
        "a token is from its centre in all.": point + project(sign * length * unit, epsilon),
        "the step starts from the centre; it starts from where the point is.": ball(
            moved(start=centre)
        ),
        "all tokens are projected together: every token has its own ball.": centre
        + project_together(moved() - centre, epsilon),
        "the length of the step is not used.": ball(point + sign * unit),
    }
    return (point, gradient, centre, epsilon, length, sign), want, wrong


@checker("06.1")
def pgd_step(student, generator):
    """Step of one length along each row's gradient, up or down, then back into the ball."""
    import matplotlib.pyplot as plt

    always = {
        1: "it goes up whatever the sign says: with -1 it must go down.",
        -1: "it goes down whatever the sign says: with +1 it must go up.",
    }
    cases = [step_case(generator, P, D, sign) for P, D in ((8, 5), (6, 2)) for sign in (1, -1)]
    got = [student(*given) for given, _, _ in cases]
    turned = "the sign is turned: +1 goes up the gradient (an attack), -1 goes down (training)."
    right = [
        torch.is_tensor(x) and x.shape == want.shape and torch.allclose(x, want, atol=1e-3)
        for x, (_, want, _) in zip(got, cases)
    ]
    for (given, want, wrong), answer in zip(cases, got):
        if any(right):  # one direction works: then it is the sign that is not used
            wrong = {
                always[-given[-1]] if words == turned else words: value
                for words, value in wrong.items()
            }
        same(answer, want, wrong, "the new point")
    (point, gradient, centre, epsilon, length, sign), _, _ = cases[0]
    point = centre + project(point - centre, 0.9 * epsilon)
    still = student(point, torch.zeros_like(gradient), centre, epsilon, length, sign)
    expect(
        bool(torch.isfinite(still).all()),
        "a gradient of zeros gives NaN: 0/0. Frozen tokens have one; divide by "
        "the norm with a small lower limit, or use torch.nn.functional.normalize.",
    )
    expect(
        torch.allclose(still, point, atol=1e-4), "a token without a gradient must stay where it is."
    )
    figure, panel = plt.subplots(figsize=(4.2, 4), layout="constrained")
    turn = torch.linspace(0, 6.3, 100)
    panel.plot(turn.cos(), turn.sin(), color="black")
    for ((point, _, centre, epsilon, _, sign), _, _), new in zip(cases[2:], got[2:]):
        old, new = ((x - centre) / epsilon[:, None] for x in (point, new))
        colour, marker = (UP, "^") if sign > 0 else (DOWN, "o")
        for k, (a, b) in enumerate(zip(old, new)):
            panel.plot([a[0], b[0]], [a[1], b[1]], color=colour)
            panel.plot(*a, marker, color="white", markeredgecolor=colour)
            label = ("up: attack" if sign > 0 else "down: training") if k == 0 else None
            panel.plot(*b, marker, linestyle="", color=colour, label=label)
    panel.set(aspect="equal", title="around each centre, in units of the radius")
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    plt.close(figure)
    return (
        figure,
        "Your steps from open to filled marks, triangles up and circles "
        "down; none ends outside the circle.",
    )


@checker("06.2")
def hide_twin(student, generator):
    """Row i sees every token but those of example i, its separators included."""
    import matplotlib.pyplot as plt

    for shots in (3, 5, 4):
        types = types_of(generator, shots)
        rows = list(range(shots - 1))  # a batch need not hold all examples
        while (
            len({row - b for b, row in enumerate(rows)}) == 1
        ):  # in an order that no shift explains
            rows = torch.randperm(shots, generator=generator).tolist()[:-1]
        example, own = examples_of(types, 0), torch.tensor(rows)[:, None]
        want = visible(example, rows, True, 0.0)
        separator = types == 0
        careless = torch.where(types > 0, types // 4, -1).cummax(0).values
        wrong = {
            "it is the wrong way round: True is where the row may look, and it "
            "may look everywhere but at its twin.": ~want,
            "the twin's separators are still visible: a "
            "separator belongs to the example before it.": want | separator,
            "all separators are hidden, in every row; only the twin's own may be.": want
            & ~separator,
            "only the twin's label is hidden: hide the whole "
            "example, its text and templates, too.": ~(~want & is_label(types)),
            "the twin's label can still be seen, and copied: hide it, too.": want | is_label(types),
            "off by one: the example after the twin is hidden. "
            "Rows and examples both count from 0.": example != own + 1,
            "off by one: the example before the twin is hidden. "
            "Rows and examples both count from 0.": example != own - 1,
            "the examples after the twin are hidden, too; only the twin must be.": example < own,
            "the examples before the twin are hidden, too; only the twin must be.": example > own,
            "labels go with the wrong example: a label has type 4 * (i + "
            "1), so count with (types - 1) // 4.": careless != own,
            "row b hides example b; it must hide example "
            "rows[b]: a batch comes in any order.": example != torch.arange(len(rows))[:, None],
            "nothing is hidden.": torch.ones_like(want),
        }
        got = student(types, rows)
        expect(
            not torch.is_tensor(got) or got.shape != want.T.shape or got.shape == want.shape,
            "it is transposed: a row for each training row, a column for each token, (B, P).",
        )
        same(got, want, wrong, "the mask")
    figure, panel = plt.subplots(figsize=(7, 2), layout="constrained")
    panel.imshow(
        got.float().numpy(),
        cmap="cividis",
        aspect="auto",
        interpolation="nearest",
        vmin=0,
        vmax=1.4,
    )
    panel.set(xlabel="position in the context", ylabel="training row", yticks=range(len(rows)))
    panel.set_yticklabels([f"example {row}" for row in rows])
    for b, row in enumerate(rows):
        hidden = (~got[b].bool()).nonzero()[:, 0].float()
        panel.text(hidden.mean(), b, "hidden", color="white", ha="center", va="center", fontsize=9)
    plt.close(figure)
    return (
        figure,
        "Your mask: a line for each training row, light where it "
        "may look, dark at its own example.",
    )


def two_losses(generator: torch.Generator, P: int, D: int) -> tuple:
    """Draw two losses of a delta (P, D) and radii: shots and others want directions that are alike, as in training.

    Token by token, `others` falls along a vector at 78 degrees to the one along which
    `shots` does: descent lowers both, and there is room to lower the one and raise the other.
    """
    epsilon = 0.5 + 0.8 * torch.rand(P, generator=generator)
    epsilon[::3] = FROZEN_RADIUS
    first = normalize(torch.randn(P, D, generator=generator), dim=1)
    second = torch.randn(P, D, generator=generator)
    second = normalize(second - (second * first).sum(1, keepdim=True) * first, dim=1)
    second = 0.2 * first + 0.98 * second

    def loss_along(direction, start):
        def loss(delta):
            share = (direction * delta).sum(1) / epsilon.clamp(min=0.5)
            return softplus(start - 6 * share.mean())

        return loss

    on_shots, on_others = loss_along(first, 3.0), loss_along(second, 2.0)

    def losses(delta):
        return on_shots(delta), on_others(delta)

    return losses, epsilon


@checker("06.3")
def break_cpt(student, generator):
    """Inside the balls, one loss comes down and the other goes up, on three pairs of cheap losses."""
    import matplotlib.pyplot as plt

    for P, D in ((30, 16), (24, 32), (36, 24)):
        losses, epsilon = two_losses(generator, P, D)
        delta = student(losses, epsilon, D)
        expect(
            torch.is_tensor(delta) and delta.shape == (P, D),
            f"the answer is {describe(delta)}; return the delta, a tensor of shape {(P, D)}.",
        )
        delta = delta.detach().float()
        norms = delta.norm(dim=1)
        expect(bool(norms.isfinite().all()), "delta holds NaN or infinity: is the step too long?")
        frozen = epsilon < 1e-6
        moved = norms[frozen].max().item()
        expect(
            moved < 1e-4,
            f"a frozen token has moved by {moved:.3g}: its radius is practically zero. Project after "
            "the last step, too.",
        )
        far = (norms / epsilon)[~frozen].max().item()
        expect(
            far < 1.001,
            f"a token is {far:.3g} radii away from its start: project every token into its own ball, "
            "after each step.",
        )
        start, end = ([loss.item() for loss in losses(x)] for x in (0 * delta, delta))
        found = (
            f"The loss on the shots went from {start[0]:.2f} to {end[0]:.2f}, on other texts from "
            f"{start[1]:.2f} to {end[1]:.2f}."
        )
        down, up = end[0] < start[0], end[1] > start[1]
        expect(
            norms.max().item() > 1e-6, "delta is zero everywhere: that is ICL, nothing is broken."
        )
        expect(
            down or not up,
            f"{found} Both went up: that is the attack of section 5, and whoever looks at the "
            "training loss sees it.",
        )
        expect(
            up or not down,
            f"{found} Both went down: that is training. The loss on other texts enters with a minus "
            "sign.",
        )
        expect(
            down and up,
            f"{found} It is the wrong way round: down on the shots, up on the other texts.",
        )
        goals = start[0] - 0.8, start[1] + 0.3
        expect(
            end[0] <= goals[0],
            f"{found} The shots should come down to {goals[0]:.2f} at least: let the other loss "
            "count less, or take more steps.",
        )
        expect(
            end[1] >= goals[1],
            f"{found} The other texts should go up to {goals[1]:.2f} at least: let their loss count "
            "more, or take more steps.",
        )
    figure, panel = plt.subplots(figsize=(5.5, 2.6), layout="constrained")
    x = torch.arange(2.0)
    panel.bar(x - 0.2, start, 0.38, color="#C8C8C8", edgecolor="#555555", label="before")
    panel.bar(x + 0.2, end, 0.38, color=DOWN, label="after")
    panel.set(xticks=x.tolist(), xticklabels=["on the shots", "on other texts"], ylabel="loss")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    plt.close(figure)
    return (
        figure,
        "Two pairs of bars, before and after your delta: the loss on the shots came down, the loss "
        "on other texts went up.",
    )
