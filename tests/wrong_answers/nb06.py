"""Wrong answers to notebook 06 and words that the message must hold; right ones in other forms."""

import torch
from torch.nn.functional import normalize


def each(delta, epsilon):
    return delta * (epsilon / torch.maximum(delta.norm(dim=1), epsilon))[:, None]


def step(
    factor=1,
    unit=lambda g: normalize(g, dim=1),
    after=lambda new, centre, e: centre + each(new - centre, e),
):
    def pgd_step(point, gradient, centre, epsilon, length, sign):
        return after(point + factor * sign * length * unit(gradient), centre, epsilon)

    return pgd_step


def always_down(point, gradient, centre, epsilon, length, sign):
    return step()(point, gradient, centre, epsilon, length, -1)


def project_first(point, gradient, centre, epsilon, length, sign):
    return centre + each(point - centre, epsilon) + sign * length * normalize(gradient, dim=1)


def examples(types, shift=1):
    return torch.where(types > 0, (types - shift) // 4, -1).cummax(0).values


def own(rows):
    return torch.tensor(rows)[:, None]


def balanced(weight, finish=each, steps=25, sign=1):
    """Adam on the shots' loss minus `weight` times the others', projected into the balls at the end of each step."""

    def break_cpt(losses, epsilon, D):
        delta = torch.zeros(len(epsilon), D, requires_grad=True)
        optimizer = torch.optim.Adam([delta], lr=0.1)
        for _ in range(steps):
            on_shots, on_others = losses(delta)
            optimizer.zero_grad()
            (sign * (on_shots - weight * on_others)).backward()
            optimizer.step()
            with torch.no_grad():
                delta.copy_(finish(delta, epsilon))
        return delta.detach()

    return break_cpt


def in_one_ball(delta, epsilon):
    free = (epsilon > 1e-6)[:, None]
    return delta * free * (epsilon.norm() / torch.maximum(delta.norm(), epsilon.norm()))


def frozen_forgotten(delta, epsilon):
    return each(delta, epsilon.clamp(min=0.5))


WRONG = {
    "pgd_step": [
        (step(factor=-1), "the sign is turned"),
        (always_down, "it goes down whatever the sign says"),
        (project_first, "the projection comes before the step"),
        (step(after=lambda new, centre, e: each(new, e)), "around the centre, not around zero"),
        (step(after=lambda new, centre, e: each(new - centre, e)), "the centre is missing"),
        (
            step(
                after=lambda new, centre, e: centre + (new - centre).clamp(-e[:, None], e[:, None])
            ),
            "that is a box",
        ),
        (step(unit=lambda g: g), "the gradient's length is still in the step"),
        (step(unit=lambda g: g / g.norm(dim=1, keepdim=True)), "NaN"),
    ],
    "hide_twin": [
        (lambda types, rows: examples(types) == own(rows), "wrong way round"),
        (
            lambda types, rows: torch.where(types > 0, (types - 1) // 4, -1) != own(rows),
            "separators are still visible",
        ),
        (
            lambda types, rows: (examples(types) != own(rows)) & (types > 0),
            "all separators are hidden",
        ),
        (
            lambda types, rows: (examples(types) != own(rows)).float(),
            "the mask has the right values, but as floating-point numbers",
        ),
        (lambda types, rows: types != 4 * (own(rows) + 1), "only the twin's label is hidden"),
        (lambda types, rows: examples(types) != own(rows) + 1, "off by one: the example after"),
        (
            lambda types, rows: examples(types) < own(rows),
            "the examples after the twin are hidden, too",
        ),
        (
            lambda types, rows: examples(types, shift=0) != own(rows),
            "labels go with the wrong example",
        ),
        (
            lambda types, rows: examples(types) != torch.arange(len(rows))[:, None],
            "it must hide example rows[b]",
        ),
    ],
    "break_cpt": [
        (lambda losses, epsilon, D: torch.zeros(len(epsilon), D), "nothing is broken"),
        (lambda losses, epsilon, D: torch.zeros(D), "return the delta"),
        (lambda losses, epsilon, D: losses(torch.zeros(len(epsilon), D))[0], "return the delta"),
        (balanced(0), "Both went down: that is training"),
        (balanced(-1), "Both went down: that is training"),
        (balanced(1, sign=-1), "the wrong way round"),
        (balanced(1, finish=lambda delta, epsilon: delta), "a frozen token has moved"),
        (balanced(1, finish=frozen_forgotten), "a frozen token has moved"),
        (balanced(1, finish=in_one_ball, steps=60), "radii away from its start"),
        (balanced(0.7, finish=lambda delta, epsilon: each(delta, 0.2 * epsilon)), "let the"),
    ],
}

RIGHT = {
    "hide_twin": [lambda types, rows: (examples(types) != own(rows)).long()],
    "break_cpt": [balanced(0.5), balanced(0.7)],
}
