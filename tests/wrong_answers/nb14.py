"""Typical wrong answers to notebook 14, and words that the checker's message must hold."""

import torch


def scored(reduce, finish=lambda scores: scores.softmax(-1)):
    """A score for each label from its tokens' log-probabilities, then what is made of the matrix."""

    def label_probabilities(tokens):
        return finish(torch.stack([reduce(log_p) for log_p in tokens], dim=1))

    return label_probabilities


def of_sums(finish):
    return scored(lambda log_p: log_p.sum(1), finish)


def changing(**changes):
    """An honest measurement with these changes."""

    def make_worse(accuracy_of, hp):
        changed = {**hp, **changes}
        return changed, accuracy_of(hp), accuracy_of(changed)

    return make_worse


def typed(accuracy_of, hp):
    return {**hp, "lr": 5.0}, accuracy_of(hp), 50.0


def typed_before(accuracy_of, hp):
    changed = {**hp, "lr": 5.0}
    return changed, 80.0, accuracy_of(changed)


def turned(accuracy_of, hp):
    changed = {**hp, "lr": 5.0}
    after = accuracy_of(changed)
    return changed, after, accuracy_of(hp)


def measured_twice_the_same(accuracy_of, hp):
    return {**hp, "lr": 5.0}, accuracy_of(hp), accuracy_of(hp)


def in_place(accuracy_of, hp):
    before = accuracy_of(hp)
    hp["lr"] = 5.0
    return hp, before, accuracy_of(hp)


def in_two_steps(accuracy_of, hp):
    before = accuracy_of(hp)
    changes = {"epsilon": 30.0, "lr": 3}
    return [changes, before, accuracy_of({**hp, **changes})]


WRONG = {
    "label_probabilities": [
        (scored(lambda log_p: log_p.mean(1)), "the mean over a label's tokens"),
        (scored(lambda log_p: log_p[:, 0]), "only each label's first token"),
        (scored(lambda log_p: log_p[:, -1]), "only each label's last token"),
        (
            scored(lambda log_p: log_p.exp().sum(1), lambda p: p / p.sum(1, keepdim=True)),
            "the probabilities of the tokens are added",
        ),
        (scored(lambda log_p: log_p.exp().sum(1)), "softmax takes them for log-probabilities"),
        (scored(lambda log_p: log_p.prod(1)), "the log-probabilities are multiplied"),
        (of_sums(lambda scores: scores), "rows that add up to 1"),
        (scored(lambda log_p: log_p.mean(1), lambda scores: scores), "take the sum"),
        (of_sums(lambda scores: scores.exp()), "Divide each row by its sum"),
        (of_sums(lambda scores: scores.log_softmax(-1)), "softmax, not log_softmax"),
        (of_sums(lambda scores: scores.softmax(0)), "softmax runs over the queries"),
        (of_sums(lambda scores: scores.softmax(-1).T), "a row is a query"),
        (
            lambda tokens: torch.stack([log_p[:, 0] for log_p in tokens], 1).softmax(0),
            "log-probability of each word",
        ),
    ],
    "make_worse": [
        (changing(), "nothing is changed"),
        (changing(epsilom=3.0), "Did you mean 'epsilon'"),
        (changing(lr=-1.0), "'lr' must be a number from 0"),
        (changing(lr="fast"), "'lr' must be a number from 0"),
        (changing(epochs=0), "'epochs' must be a whole number from 1"),
        (changing(epsilon=0.0), "a ball needs a radius"),
        (changing(epsilon_unit="metres"), 'must be "mean_norm" or "peft"'),
        (typed, "a guess is no result"),
        (typed_before, "measure it on the hyper-parameters that you were given"),
        (turned, "the wrong way round"),
        (measured_twice_the_same, "a guess is no result"),
        (in_place, "changes its argument `hp` in place"),
        (lambda accuracy_of, hp: accuracy_of(hp), "return three things"),
    ],
}
RIGHT = {
    "label_probabilities": [
        scored(lambda log_p: log_p.exp().prod(1), lambda p: p / p.sum(1, keepdim=True))
    ],
    "make_worse": [changing(lr=0), in_two_steps],
}
