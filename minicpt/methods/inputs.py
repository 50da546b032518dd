"""What people hand over in Python, texts, labels and label words: checked once, and made plain lists."""

import copy
from collections.abc import Hashable, Mapping, Sequence

from ..errors import MiniCPTError, warn
from ..schema import check_words


def column(values: Sequence, what: str) -> list:
    """One-dimensional values that have an order, as a list; those of arrays, series and tensors as Python has them."""
    if (
        isinstance(values, str | bytes | Mapping)
        or not hasattr(values, "__getitem__")
        or getattr(values, "ndim", 1) != 1
    ):
        given = getattr(values, "shape", None) or f"{values!r:.60}"
        raise MiniCPTError(
            f"The {what} must be a one-dimensional list (or array, or series, which keep their order), got {given}."
        )
    return values.tolist() if hasattr(values, "tolist") else list(values)


def read_texts(X: Sequence[str]) -> list[str]:
    """Check that X is a list of strings."""
    texts = column(X, "texts")
    for i, text in enumerate(texts):
        if not isinstance(text, str):
            raise MiniCPTError(
                f"Text {i} is no string but {text!r}; convert the texts, or leave it out."
            )
    return [str(text) for text in texts]


def read_labels(y: Sequence[Hashable], n: int) -> list[Hashable]:
    """Check that y holds one label for each of n texts; scalars of NumPy and PyTorch become Python's."""
    labels = [
        label.item() if getattr(label, "ndim", 1) == 0 else label for label in column(y, "labels")
    ]
    if len(labels) != n:
        raise MiniCPTError(
            f"There are {n} texts and {len(labels)} labels; each text needs one label."
        )
    for i, label in enumerate(labels):
        # what is not equal to its copy would be a class for each row; NaN and pandas' NA are not even to themselves
        if (
            not isinstance(label, Hashable)
            or label is None
            or (copy.copy(label) == label) is not True
        ):
            raise MiniCPTError(
                f"Label {i} is {label!r}; labels must be hashable, equal to their copies and not missing, such as text "
                "or numbers."
            )
    return labels


def distinct(labels: Sequence[Hashable]) -> list[Hashable]:
    """The classes, sorted; labels without an order keep that of their first appearance."""
    classes = list(dict.fromkeys(labels))
    if len(classes) < 2:
        raise MiniCPTError(
            f"All labels are {labels[0]!r}; a classifier needs at least two classes."
        )
    try:
        return sorted(classes)
    except TypeError:
        return classes


def words_of(classes: Sequence[Hashable], verbalizers) -> dict[Hashable, str]:
    """The label word of each class: `verbalizers` by label, or in the order of the classes; None takes the labels.

    Raises `MiniCPTError` if a class has none, or shares it; warns if words say nothing about their classes.
    """
    if verbalizers is None:
        given = {label: str(label) for label in classes}
        if not any(char.isalpha() for char in "".join(given.values())):
            warn(
                f"The labels {', '.join(given.values())} are what the model is asked to answer, and say nothing about "
                'the classes. Give words: verbalizers=["bad", "good"] in the order of classes_ (which also suits '
                'VotingClassifier and others that encode labels), or {0: "bad", 1: "good"}.'
            )
    elif isinstance(verbalizers, list | tuple):
        if len(verbalizers) != len(classes):
            raise MiniCPTError(
                f"There are {len(verbalizers)} verbalizers and {len(classes)} classes ({classes}); give a word for "
                "each, in this order."
            )
        given = dict(zip(classes, verbalizers))
    elif hasattr(verbalizers, "get"):
        given = {label: verbalizers.get(label) for label in classes}
    else:
        raise MiniCPTError(
            "verbalizers must be a dictionary {label: word}, a list of words in the order of the classes, or None; got "
            f"{verbalizers!r}."
        )
    check_words(given)
    return {label: word.strip() for label, word in given.items()}  # spaces belong to the template
