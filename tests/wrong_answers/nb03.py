"""Wrong answers to notebook 03 and words that the message must hold; right ones in other forms."""

import torch
from torch.nn.functional import normalize


def batch(after=False, on_mask=1, on_labels=-100, mask_too=True, labels_too=True):
    def put_before(prompt, embeds, mask, labels):
        B, P = len(embeds), len(prompt)
        both = (prompt.expand(B, -1, -1), embeds)
        mask = torch.cat((mask.new_full((B, P), on_mask), mask), 1) if mask_too else mask
        labels = (
            torch.cat((labels.new_full((B, P), on_labels), labels), 1) if labels_too else labels
        )
        return torch.cat(both[::-1] if after else both, 1), mask, labels

    return put_before


def labels_after(prompt, embeds, mask, labels):
    embeds, mask, _ = batch()(prompt, embeds, mask, labels)
    return embeds, mask, torch.cat((labels, labels.new_full((len(labels), len(prompt)), -100)), 1)


def no_batch(prompt, embeds, mask, labels):
    return torch.cat((prompt, embeds), 1), mask, labels


def mask_of_floats(prompt, embeds, mask, labels):
    embeds, _, labels = batch()(prompt, embeds, mask, labels)
    return embeds, torch.cat((torch.ones(len(mask), len(prompt)), mask), 1), labels


def cosines(prompt, embedding):
    return normalize(prompt) @ normalize(embedding).T


def took(ids_of, of=lambda rows: rows.detach().clone()):
    return lambda ids, P, embedding: of(embedding[ids_of(ids, P)])


def turns(ids, P):
    return (ids * P)[:P]


WRONG = {
    "put_before": [
        (batch(after=True), "comes after the text"),
        (batch(on_mask=0), "the mask is 0 on the prompt"),
        (batch(on_labels=0), "the prompt's labels are 0"),
        (batch(mask_too=False), "the mask is still T long"),
        (batch(labels_too=False), "the labels are still T long"),
        (labels_after, "stand after the text"),
        (no_batch, "raised RuntimeError"),
        (mask_of_floats, "has the right values, but as floating-point numbers"),
        (lambda *given: batch()(*given)[:2], "return three tensors"),
        (batch(on_labels=5), "P = 1 is wrong in 2 of 6 places"),  # no known one: the input is shown
    ],
    "from_words": [
        (
            took(lambda ids, P: [i for i in ids for _ in range(-(-P // len(ids)))][:P]),
            "repeated in place",
        ),
        (took(lambda ids, P: ids[:P]), "a place for every word"),
        (took(lambda ids, P: ids * -(-P // len(ids))), "not cut to P"),
        (took(lambda ids, P: (ids[::-1] * P)[:P]), "starts at its end"),
        (took(turns, lambda rows: rows), "hang on the embedding"),
        (took(lambda ids, P: ids[::-1] * P, lambda rows: rows[:1] / 2), "the start from the ids ["),
        (
            lambda ids, P, embedding: embedding.detach()[ids].mean(0).repeat(P, 1),
            "the mean of the words",
        ),
        (
            lambda ids, P, embedding: embedding.detach()[:P].clone(),
            "the first rows of the vocabulary",
        ),
    ],
    "nearest": [
        (
            lambda prompt, embedding, k: (prompt @ embedding.T).topk(k).indices,
            "this is the dot product",
        ),
        (
            lambda prompt, embedding, k: (
                torch.cdist(prompt, embedding).topk(k, largest=False).indices
            ),
            "Euclidean",
        ),
        (
            lambda prompt, embedding, k: (
                (prompt @ normalize(embedding).T).topk(k, largest=False).indices
            ),
            "farthest",
        ),
        (
            lambda prompt, embedding, k: cosines(prompt, embedding).topk(k).values,
            "are the cosines",
        ),
        (lambda prompt, embedding, k: cosines(prompt, embedding), "these are all cosines"),
        (
            lambda prompt, embedding, k: cosines(prompt, embedding).argsort(1)[:, -k:],
            "the best come last",
        ),
        (
            lambda prompt, embedding, k: (normalize(prompt) @ embedding.T).topk(k).indices,
            "this is the dot product",
        ),
        (
            lambda prompt, embedding, k: cosines(prompt, embedding).abs().topk(k).indices,
            "opposite direction",
        ),
        (lambda prompt, embedding, k: cosines(prompt, embedding).topk(k), "the indices alone"),
        (  # two mistakes at once: the smallest input is shown
            lambda prompt, embedding, k: (prompt @ embedding.T).topk(k).indices.flip(1),
            "its cosines to the words being",
        ),
        (
            lambda prompt, embedding, k: cosines(prompt, embedding).topk(k).indices.float(),
            "as floating-point numbers",
        ),
        (
            lambda prompt, embedding, k: (
                (normalize(embedding) @ normalize(prompt).T).topk(k, 0).indices
            ),
            "exchanged",
        ),
    ],
}

RIGHT = {
    "put_before": [lambda *given: list(batch()(*given))],
    "from_words": [
        lambda ids, P, embedding: torch.nn.Parameter(embedding[turns(ids, P)]),
        lambda ids, P, embedding: embedding.detach()[turns(ids, P)].requires_grad_(),
    ],
    "nearest": [
        lambda prompt, embedding, k: (-cosines(prompt, embedding)).argsort(1)[:, :k],
        lambda prompt, embedding, k: (prompt @ normalize(embedding).T).topk(k).indices,
    ],
}
