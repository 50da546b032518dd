"""Wrong answers to notebook 04 and words that the message must hold; right ones in other forms."""

import torch


def owners(pieces):
    return [role for string, role in pieces for _ in string]


def first_character(pieces, spans):
    return [owners(pieces)[start] for start, _ in spans]


def most_characters(pieces, spans):
    parts = [owners(pieces)[start:end] for start, end in spans]
    return [max(part, key=part.count) for part in parts]


def last_character(pieces, spans):
    return [owners(pieces)[end - 1] for _, end in spans]  # right, where a token ends in a letter


def label_as_template(pieces, spans):
    return [min(role, 3) for role in last_character(pieces, spans)]


def separators_carried(pieces, spans):
    roles = last_character(pieces, spans)
    for i, role in enumerate(roles):
        roles[i] = role or roles[i - 1]
    return roles


def in_place(examples):
    for i, roles in enumerate(examples):
        roles[roles > 0] += 4 * i
    return torch.cat(examples)


def joined(change):
    return lambda examples: torch.cat([change(i, roles) for i, roles in enumerate(examples)])


def is_label(types):
    return (types > 0) & (types % 4 == 0)


def weights(exponent, where=is_label):
    return lambda types, gamma: torch.where(where(types), gamma ** exponent(types).float(), 0.0)


def back(types):
    return (types.max() - types) // 4


WRONG = {
    "roles_of_tokens": [
        (first_character, "the first character decides"),
        (most_characters, "spaces are counted like letters"),
        (
            lambda pieces, spans: [role for string, role in pieces if string],
            "one role for each piece",
        ),
        (lambda pieces, spans: owners(pieces), "one role for each character"),
        (label_as_template, "the label has the output template's role"),
        (separators_carried, "the role of what stands before them"),
        (
            lambda pieces, spans: [role % 4 for role in last_character(pieces, spans)],
            "roles of each token's characters: [[4]]",
        ),
    ],
    "join_types": [
        (joined(lambda i, roles: roles + 4 * i), "separators were shifted"),
        (joined(lambda i, roles: torch.where(roles > 0, roles + 4 * (i + 1), 0)), "off by one"),
        (joined(lambda i, roles: torch.where(roles > 0, roles + i, 0)), "adds i; it must add 4"),
        (joined(lambda i, roles: roles), "nothing was added"),
        (in_place, "in place"),
        (lambda examples: torch.cat(examples).tolist(), "is a list"),
        (joined(lambda i, roles: roles + 3 * i), "examples = [[0], [0]]"),
    ],
    "updated_tokens": [
        (lambda types: types > 0, "label tokens are marked"),
        (lambda types: (types == 0) | (types % 4 > 0), "separators are marked"),
        (lambda types: types % 4 == 2, "only the inputs"),
        (lambda types: (types > 0) & (types < 4), "only the first example"),
        (lambda types: types % 4 == 0, "wrong way round"),
        (lambda types: types % 4, "booleans"),
        (lambda types: (types % 4 > 0).float(), "Return booleans"),
        (lambda types: types % 4 < 2, "types = [0]"),
    ],
    "decay_weights": [
        (weights(lambda types: types // 4 - 1), "wrong way round"),
        (weights(lambda types: back(types) + 1), "off by one"),
        (weights(back, lambda types: types % 4 == 0), "separators have a weight"),
        (weights(lambda types: is_label(types).flip(0).cumsum(0).flip(0) - 1), "count labels"),
        (weights(lambda types: types.max() - types), "divide the difference by 4"),
        (weights(lambda types: 0 * types), "gamma is not used"),
        (weights(lambda types: types // 4, lambda types: types % 4 == 0), "types = [0, 4]"),
    ],
}

RIGHT = {"updated_tokens": [lambda types: (types % 4 > 0).long()]}
