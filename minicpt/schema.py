"""What people write by hand, a task's files and hyper-parameters, against the shapes in `assets/*.schema.json`.

A schema's descriptions say what is valid in words that end the sentence "this must be …".
"""

import json
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

import fastjsonschema

from .errors import MiniCPTError, unknown

ASSETS = Path(__file__).parent / "assets"


@lru_cache
def _validator(schema: str):
    text = (ASSETS / f"{schema}.schema.json").read_text(encoding="utf-8")
    return fastjsonschema.compile(json.loads(text))


def conform(value, schema: str, kind: str, where: str = "") -> None:
    """Check a value as JSON has it; `kind` is what its keys are called, `where` (with a colon) what it was read from.

    Raises `MiniCPTError` with the key, what is valid and what was given.
    """
    try:
        _validator(schema)(value)
    except fastjsonschema.JsonSchemaValueException as error:
        rule, given, place = error.definition, error.value, error.path[1:]
        said = f"got {given!r:.80}"
        if error.rule == "additionalProperties":
            name = next(key for key in given if key not in rule["properties"])
            raise MiniCPTError(f"{where}{unknown(kind, name, rule['properties'])}") from None
        if error.rule == "required":
            name = next(key for key in rule["required"] if key not in given)
            place, rule, said = [*place, name], rule["properties"][name], "it is missing"
        subject = f"The {kind} {'.'.join(place)!r}" if place else "This"
        raise MiniCPTError(f"{where}{subject} must be {rule['description']}; {said}.") from None


def check_words(words: dict[Hashable, str]) -> None:
    """Raise `MiniCPTError` unless each class has a label word of its own, and not just in other capitals."""
    class_of = {}
    for label, word in words.items():
        if not isinstance(word, str) or not word.strip():
            raise MiniCPTError(
                f"There is no word for the label {label!r}, but {word!r}; give every label a text."
            )
        same = word.strip().casefold()
        if same in class_of:
            raise MiniCPTError(
                f"The labels {class_of[same]!r} and {label!r} share the label word {word!r} (capitals do not count); "
                "give each its own."
            )
        class_of[same] = label


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark; `MiniCPTError` for another encoding."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # as UTF-16 has it
        raise MiniCPTError(
            f"{path} is not in UTF-8, but in another encoding such as UTF-16 or a Windows code page. Save it as UTF-8."
        )
    return text


def parse(text: str, where: str):
    """A JSON value; `MiniCPTError` for what is no JSON, and for a key that stands twice in an object."""

    def once(pairs: list[tuple]) -> dict:
        keys = [key for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise MiniCPTError(f"{where}The key {key!r} stands there twice; keep one of them.")
        return dict(pairs)

    try:
        return json.loads(text, object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise MiniCPTError(f"{where}This is not valid JSON: {error}.") from error
