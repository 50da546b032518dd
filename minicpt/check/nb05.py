"""Checkers of notebook 05: freezing, the projection, the training step."""

import torch

from ..core import masks
from ..core.projection import project, project_together
from .engine import checker, expect, same
from .nb04 import coloured, types_of
from .smallest import Case
from .steps import (
    freeze_steps,
    projection_steps,
    starts_inside,
    step_steps,
)

FREE = "#0072B2"


@checker("05.2")
def freeze(student, generator):
    """Rows of labels and separators become zero; the others stay."""
    import matplotlib.pyplot as plt

    for shots in (3, 1, 4):
        types = types_of(generator, shots, label_tokens=2)
        P, D = len(types), 5
        gradient = torch.randn(P, D, generator=generator)
        free, labels = masks.is_updated(types), masks.is_label(types)

        def rows(mask):
            return gradient * mask[:, None]

        want = rows(free)
        wrong = {
            "the labels still have a gradient: types 4, 8, 12, ... "
            "are the answers and must not move.": rows(free | labels),
            "the separators still have a gradient: type 0 must not move.": rows(
                free | (types == 0)
            ),
            "nothing was frozen: the gradient came back as it was.": gradient,
            "it is the wrong way round: labels and separators are the rows that become zero.": rows(
                ~free
            ),
            "only the first example's label is frozen: labels are "
            "all types that are multiples of 4.": rows((types > 0) & (types != 4)),
            "only the inputs keep their gradient; the templates move, too.": rows(
                masks.is_input(types)
            ),
            "the templates are multiplied by their role: use a mask of "
            "zeros and ones, not `types % 4` itself.": rows(types % 4),
        }
        got = student(gradient, types)
        expect(
            not isinstance(got, torch.Tensor) or got.shape != (int(free.sum()), D),
            "the frozen rows were cut out; they stay, as zeros, "
            "so that the result is (P, D) again.",
        )
        case = Case(
            student,
            freeze_steps,
            {"gradient": gradient, "types": types},
            {"gradient": "P D", "types": "P"},
        )
        same(got, want, wrong, "the gradient", case=case)
    figure, panel = plt.subplots(figsize=(7, 2.2), layout="constrained")
    coloured(panel, got.norm(dim=1), types)
    panel.set(xlabel="position in the context", ylabel="norm of the gradient")
    plt.close(figure)
    return (
        figure,
        "Norm of the gradient that is left, coloured by role: gaps "
        "where labels and separators are frozen.",
    )


@checker("05.3")
def project_tokens(student, generator):
    """Each row outside its own ball is shortened to its radius; rows inside stay."""
    import matplotlib.pyplot as plt

    for P, D in ((9, 6), (12, 2), (7, 4)):
        delta = torch.randn(P, D, generator=generator)
        delta = delta / delta.norm(dim=1, keepdim=True) * torch.linspace(0.2, 2.5, P)[:, None]
        delta = delta[torch.randperm(P, generator=generator)]
        epsilon = 0.5 + torch.rand(P, generator=generator)
        norm, e = delta.norm(dim=1, keepdim=True), epsilon[:, None]
        want = project(delta, epsilon)
        short = norm <= e
        wrong = {
            "all tokens are projected together, by one factor: every token "
            "has its own ball and its own factor.": project_together(delta, epsilon),
            "all tokens share one factor, from the norm of the whole "
            "delta: take the norm of each row, dim=1.": delta * (e / delta.norm().clamp(min=e)),
            "every row is scaled to its radius, also those "
            "inside the ball: they stay as they are.": delta / norm * e,
            "every number is clamped by itself: that is a box; "
            "the ball limits the norm of the row.": delta.clamp(-e, e),
            "rows inside are scaled up and rows "
            "outside stay: it is the wrong way round.": torch.where(short, delta / norm * e, delta),
            "long rows come out with norm 1; their radius is epsilon.": torch.where(
                short, delta, delta / norm
            ),
            "rows outside become zero: pull them back to the surface instead.": torch.where(
                short, delta, 0.0
            ),
            "the norm is not a square root of a sum of squares: this ball is L1's.": delta
            * (e / torch.maximum(delta.abs().sum(1, keepdim=True), e)),
            "nothing was projected: delta came back as it was.": delta,
            "all rows have the first row's radius: epsilon has one for each token.": project(
                delta, epsilon[:1].expand(P)
            ),
        }
        columns = delta.norm(dim=0)
        if P >= D:
            wrong[
                "the norm runs over the tokens (dim=0); each token's "
                "norm runs over its D numbers, dim=1."
            ] = delta * (e / torch.maximum(columns, e))
        got = student(delta, epsilon)
        case = Case(
            student,
            projection_steps,
            {"delta": delta, "epsilon": epsilon},
            {"delta": "P D", "epsilon": "P"},
            # a row of zeros is asked for below, by name
            lambda delta, epsilon: bool((epsilon > 0).all() and (delta.norm(dim=1) > 0).all()),
        )
        same(got, want, wrong, "the projected delta", case=case)
        if D == 2:
            drawn = delta, got, epsilon
    zero = student(torch.zeros(2, 3), torch.ones(2))
    expect(
        bool(torch.isfinite(zero).all()),
        "a row of zeros gives NaN: 0/0. Divide by a maximum that is never zero, "
        "torch.maximum(norm, epsilon).",
    )
    expect(bool((zero == 0).all()), "a row of zeros does not stay zero.")
    figure, panel = plt.subplots(figsize=(4.2, 4), layout="constrained")
    before, after, epsilon = drawn
    turn = torch.linspace(0, 6.3, 100)
    panel.plot(turn.cos(), turn.sin(), color="black")
    for old, new in zip(before / epsilon[:, None], after / epsilon[:, None]):
        panel.plot([new[0], old[0]], [new[1], old[1]], ":", color="#777777")
        panel.plot([0, new[0]], [0, new[1]], color=FREE)
        panel.plot(*old, "o", color="white", markeredgecolor="#777777")
        panel.plot(*new, "o", color=FREE)
    panel.set(aspect="equal", title="in units of each token's radius")
    panel.set(xlim=(-2.6, 2.6), ylim=(-2.6, 2.6))  # one long arrow would make the circle small
    plt.close(figure)
    return (
        figure,
        "Arrows before (open dots) and after (blue) your projection: none ends outside the circle.",
    )


@checker("05.4")
def training_step(student, generator):
    """Freeze, step against the gradient, project the new delta."""
    import matplotlib.pyplot as plt

    for shots in (2, 3, 4):
        types = types_of(generator, shots)
        P, D, lr = len(types), 4, float(0.2 + 0.3 * torch.rand(1, generator=generator))
        free = masks.is_updated(types)[:, None]
        epsilon = 0.6 + 0.4 * torch.rand(P, generator=generator)
        order = torch.randperm(P, generator=generator)
        size = torch.linspace(0.2, 7, P)[order]  # some steps stay inside their ball
        gradient = size[:, None] * torch.randn(P, D, generator=generator)
        delta = project(torch.randn(P, D, generator=generator), 0.9 * epsilon) * free

        def ball(x):
            return project(x, epsilon)

        want = ball(delta - lr * gradient * free)
        wrong = {
            "it goes up: the step must go against the gradient, with a "
            "minus. (With a plus it is an attack.)": ball(delta + lr * gradient * free),
            "the labels and separators moved: freeze their gradient before the step.": ball(
                delta - lr * gradient
            ),
            "the labels moved: freeze their gradient, too.": ball(
                delta - lr * gradient * (free | masks.is_label(types)[:, None])
            ),
            "the separators moved: freeze their gradient, too.": ball(
                delta - lr * gradient * (free | (types == 0)[:, None])
            ),
            "nothing was projected: after the step each row goes back into its ball.": delta
            - lr * gradient * free,
            "the projection comes before the step; it must come after, "
            "or the step leads out of the ball.": ball(delta) - lr * gradient * free,
            "the step is projected, not the new delta: what counts is how "
            "far a token is from its word in all.": delta + ball(-lr * gradient * free),
            "the gradient is projected, not the new delta.": delta - lr * ball(gradient * free),
            "the new delta forgets the old one: a step starts from where delta is.": ball(
                -lr * gradient * free
            ),
            "the learning rate is not used.": ball(delta - gradient * free),
            "all tokens are projected together: every token has its own ball.": project_together(
                delta - lr * gradient * free, epsilon
            ),
        }
        got = student(delta, gradient, types, epsilon, lr)
        given = {"delta": delta, "gradient": gradient, "types": types, "epsilon": epsilon, "lr": lr}
        axes = {"delta": "P D", "gradient": "P D", "types": "P", "epsilon": "P"}
        case = Case(student, step_steps, given, axes, starts_inside)
        same(got, want, wrong, "the new delta", case=case)
    figure, panel = plt.subplots(figsize=(7, 2.4), layout="constrained")
    coloured(panel, got.norm(dim=1), types)
    x = torch.arange(P)
    panel.hlines(epsilon, x - 0.45, x + 0.45, color="black", label="radius ε")
    panel.set(xlabel="position in the context", ylabel="norm after the step")
    panel.legend(frameon=False, loc="upper right")
    panel.set_ylim(top=1.35)
    plt.close(figure)
    return (
        figure,
        "Norm of each token's delta after your step, under its radius; "
        "labels and separators stayed at 0.",
    )
