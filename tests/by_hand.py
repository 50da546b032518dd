"""What tests build without the library's help."""

from minicpt.core.templates import Context, Encoded


def join(examples: list[Encoded], instruction: list[int] = ()) -> Context:
    """Encoded examples one after the other: example i adds 4*i to its roles, an instruction has role 1."""
    ids, types = list(instruction), [1] * len(instruction)
    for i, example in enumerate(examples):
        ids += example.ids
        types += [role + 4 * i if role else 0 for role in example.types]
    return Context(ids, types, n_instruction=len(instruction))
