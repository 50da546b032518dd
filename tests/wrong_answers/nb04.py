"""Wrong answers to notebook 04 and words that the message must hold; right ones in other forms."""

import torch


def one_string(pieces, ids_of):
    ids = ids_of("".join(string for string, _ in pieces))
    return ids, [role for string, role in pieces for _ in ids_of(string)]


def one_role_a_piece(pieces, ids_of):
    return [i for string, _ in pieces for i in ids_of(string)], [role for _, role in pieces]


def label_as_template(pieces, ids_of):
    pairs = [(i, min(role, 3)) for string, role in pieces for i in ids_of(string)]
    return [i for i, _ in pairs], [role for _, role in pairs]


def roles_first(pieces, ids_of):
    pairs = [(i, role) for string, role in pieces for i in ids_of(string)]
    return [role for _, role in pairs], [i for i, _ in pairs]


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
    "roles_of_example": [
        (one_string, "joined to one string"),
        (one_role_a_piece, "one role a piece"),
        (label_as_template, "the label has the output template's role"),
        (roles_first, "wrong order"),
        (lambda pieces, ids_of: ids_of(pieces[0][0]), "return two things"),
    ],
    "join_types": [
        (joined(lambda i, roles: roles + 4 * i), "separators were shifted"),
        (joined(lambda i, roles: torch.where(roles > 0, roles + 4 * (i + 1), 0)), "off by one"),
        (joined(lambda i, roles: torch.where(roles > 0, roles + i, 0)), "adds i; it must add 4"),
        (joined(lambda i, roles: roles), "nothing was added"),
        (in_place, "in place"),
        (lambda examples: torch.cat(examples).tolist(), "is a list"),
    ],
    "updated_tokens": [
        (lambda types: types > 0, "label tokens are marked"),
        (lambda types: (types == 0) | (types % 4 > 0), "separators are marked"),
        (lambda types: types % 4 == 2, "only the inputs"),
        (lambda types: (types > 0) & (types < 4), "only the first example"),
        (lambda types: types % 4 == 0, "wrong way round"),
        (lambda types: types % 4, "booleans"),
        (lambda types: (types % 4 > 0).float(), "Return booleans"),
    ],
    "decay_weights": [
        (weights(lambda types: types // 4 - 1), "wrong way round"),
        (weights(lambda types: back(types) + 1), "off by one"),
        (weights(back, lambda types: types % 4 == 0), "separators have a weight"),
        (weights(lambda types: is_label(types).flip(0).cumsum(0).flip(0) - 1), "count labels"),
        (weights(lambda types: types.max() - types), "divide the difference by 4"),
        (weights(lambda types: 0 * types), "gamma is not used"),
    ],
}

RIGHT = {"updated_tokens": [lambda types: (types % 4 > 0).long()]}
