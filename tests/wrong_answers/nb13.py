"""Typical wrong answers to notebook 13, and words that the checker's message must hold."""

import torch

# ---- 13.1: the gradients of two factors ----------------------------------------------------------


def by_entries(G, A, B, s):
    """The solution, sum by sum, as a list."""
    of_A, of_B = torch.zeros_like(A), torch.zeros_like(B)
    for k in range(len(A)):
        for j in range(A.shape[1]):
            of_A[k, j] = sum(G[i, j] * s * B[i, k] for i in range(len(B)))
        for i in range(len(B)):
            of_B[i, k] = sum(G[i, j] * s * A[k, j] for j in range(A.shape[1]))
    return [of_A, of_B]


def by_autograd(G, A, B, s):
    A, B = A.clone().requires_grad_(), B.clone().requires_grad_()
    return torch.autograd.grad((G * (s * B @ A)).sum(), [A, B])


# ---- 13.2: how many numbers? ---------------------------------------------------------------------


def counted(method, L, D, D_kv, D_ff, r, m, P):
    """The solution, in another form."""
    formulas = {
        "LoRA": lambda: L * r * (3 * D + D_kv),
        "IA³": lambda: L * (2 * D_kv + D_ff),
        "BitFit": lambda: L * (3 * D + 2 * D_kv + 2 * D_ff),
        "adapter": lambda: 2 * L * (2 * D * m + m + D),
        "prompt tuning": lambda: P * D,
        "prefix tuning": lambda: 2 * L * P * D_kv,
    }
    return formulas[method]()


def but(which, formula):
    """All right, but for one method."""

    def trained_numbers(method, L, D, D_kv, D_ff, r, m, P):
        if method == which:
            return formula(L, D, D_kv, D_ff, r, m, P)
        return counted(method, L, D, D_kv, D_ff, r, m, P)

    return trained_numbers


def all_heads(method, L, D, D_kv, D_ff, r, m, P):
    return counted(method, L, D, D, D_ff, r, m, P)


def one_block(method, L, D, D_kv, D_ff, r, m, P):
    return counted(method, 1, D, D_kv, D_ff, r, m, P)


# ---- 13.3: switch without a trace ----------------------------------------------------------------


def product(adapter):
    A, B, s = adapter
    return s * B @ A


def subtracting(layer, adapter, memory):
    if getattr(memory, "last", None) is not None:
        layer.weight -= product(memory.last)
    if adapter is not None:
        layer.weight += product(adapter)
    memory.last = adapter
    return layer


def adding_only(layer, adapter, memory):
    if adapter is not None:
        layer.weight += product(adapter)
    return layer


def no_clone(layer, adapter, memory):
    if not hasattr(memory, "base"):
        memory.base = layer.weight
    layer.weight.copy_(memory.base)
    if adapter is not None:
        layer.weight += product(adapter)
    return layer


def new_parameter(layer, adapter, memory):
    if not hasattr(memory, "base"):
        memory.base = layer.weight.clone()
    weight = memory.base.clone()
    if adapter is not None:
        weight += product(adapter)
    layer.weight = torch.nn.Parameter(weight)
    return layer


def copied_at_each_call(layer, adapter, memory):
    memory.base = layer.weight.clone()
    if adapter is not None:
        layer.weight += product(adapter)
    return layer


def a_copy_for_each_task(layer, adapter, memory):
    if not hasattr(memory, "of_task"):
        memory.of_task = {None: layer.weight.clone()}
    key = None if adapter is None else id(adapter)
    if key not in memory.of_task:
        memory.of_task[key] = memory.of_task[None] + product(adapter)
    layer.weight.copy_(memory.of_task[key])
    return layer


def without_s(layer, adapter, memory):
    if not hasattr(memory, "base"):
        memory.base = layer.weight.clone()
    layer.weight.copy_(memory.base)
    if adapter is not None:
        layer.weight += adapter[1] @ adapter[0]
    return layer


def with_data(layer, adapter, memory):
    """Right: the numbers are put into the same tensor through `data`."""
    if not hasattr(memory, "base"):
        memory.base = layer.weight.detach().clone()
    change = 0 if adapter is None else product(adapter)
    layer.weight.data[:] = memory.base + change
    return layer


WRONG = {
    "lora_gradients": [
        (lambda G, A, B, s: (s * G @ A.T, s * B.T @ G), "the order is wrong"),
        (lambda G, A, B, s: (B.T @ G, G @ A.T), "s is missing"),
        (lambda G, A, B, s: (s * s * B.T @ G, s * s * G @ A.T), "s counts twice"),
        (lambda G, A, B, s: (-s * B.T @ G, -s * G @ A.T), "sign is turned"),
        (lambda G, A, B, s: (s * B.T @ G, G @ A.T), "s is missing in the gradient of B"),
        (lambda G, A, B, s: (s * G.T @ B, s * A @ G.T), "it is transposed"),
        (lambda G, A, B, s: s * B.T @ G, "return two tensors"),
        (lambda G, A, B, s: (s * G * A, s * G * B), "holds its own factor"),
        # no mistake that it knows: the smallest input, and both values
        (lambda G, A, B, s: (s * B.T @ G + 1, s * G @ A.T), "with d_out = 1, d_in = 1, r = 1"),
    ],
    "trained_numbers": [
        (all_heads, "they map D to D_kv"),
        (one_block, "there are L of them"),
        (but("LoRA", lambda L, D, kv, ff, r, m, P: L * r * D * (D + kv)), "inputs + outputs"),
        (but("LoRA", lambda L, D, kv, ff, r, m, P: L * r * 2 * D), "LoRA:"),
        (but("IA³", lambda L, D, kv, ff, r, m, P: L * (2 * kv + D)), "not what comes out"),
        (but("BitFit", lambda L, D, kv, ff, r, m, P: L * (6 * D + ff)), "these are the inputs"),
        (but("adapter", lambda L, D, kv, ff, r, m, P: L * 4 * D * m), "two biases are missing"),
        (but("adapter", lambda L, D, kv, ff, r, m, P: L * (2 * D * m + m + D)), "two adapters"),
        (but("prompt tuning", lambda L, D, kv, ff, r, m, P: L * P * D), "enters once"),
        (but("prefix tuning", lambda L, D, kv, ff, r, m, P: L * P * kv), "a key and a value"),
        (
            but("BitFit", lambda L, D, kv, ff, r, m, P: L * (3 * D + 2 * kv + 2 * ff) + 5),
            "BitFit with L = 1, D = 4, D_kv = 2, D_ff = 7, r = 1, m = 1, P = 1: you count 35, there",
        ),
    ],
    "switch": [
        (subtracting, "subtract"),
        (adding_only, "Look at what the weight was before this switch"),
        (no_clone, "is the weight itself and not a copy"),
        (new_parameter, "layer.weight is another tensor now"),
        (copied_at_each_call, "Look at what the weight was before this switch"),
        (a_copy_for_each_task, "one copy is enough"),
        (without_s, "after base → a, on a layer of 1 x 1"),
    ],
}
RIGHT = {
    "lora_gradients": [by_entries, by_autograd],
    "trained_numbers": [counted],
    "switch": [with_data],
}
