"""Checkers of notebook 13: the gradients of LoRA's factors, the count of trained numbers, switching without a trace."""

import functools
from types import SimpleNamespace

import torch
from torch import Tensor, nn

from .engine import NotYet, checker, describe, expect, same

FACTORS = ((1, 1, 1), (2, 1, 1), (1, 3, 1), (2, 3, 2), (5, 4, 3))  # d_out, d_in, r
LARGE = 24
SIZES = ((1, torch.float32), (2, torch.float32), (LARGE, torch.float32), (LARGE, torch.bfloat16))
STARTS = {"B = 0": (1, 0), "A = 0": (0, 1), "both 0": (0, 0)}  # by what A and B are multiplied
LOOKS = (("#009E73", "-"), ("#0072B2", "--"), ("#D55E00", ":"))


@checker("13.1")
def lora_gradients(student, generator):
    """The gradients of A and B are s Bᵀ G and s G Aᵀ."""
    import matplotlib.pyplot as plt

    for d_out, d_in, r in FACTORS:  # the smallest first
        # |A| < 1 < |B| and none near zero: no two mistakes give the same numbers
        G = 0.5 + torch.rand(d_out, d_in, generator=generator)
        A = 0.5 + 0.4 * torch.rand(r, d_in, generator=generator)
        B = -1.1 - torch.rand(d_out, r, generator=generator)
        s = 1.5 + torch.rand(1, generator=generator).item()
        got = student(G, A, B, s)
        expect(
            isinstance(got, (tuple, list)) and len(got) == 2,
            f"the answer is {describe(got)}; return two tensors, the gradient of A and that of B.",
        )
        of_A, of_B = s * B.T @ G, s * G @ A.T
        wrong = {
            "the two gradients are exchanged: either the order is wrong (that of A comes first), "
            "or each holds its own factor instead of the other one.": [
                of_B,
                of_A,
            ],
            "s is missing: the matrix is W + s B A, and the chain rule keeps the factor.": [
                of_A / s,
                of_B / s,
            ],
            "s counts twice: each entry of s B A holds it once.": [s * of_A, s * of_B],
            "the sign is turned. These are the gradients; the minus belongs to the step.": [
                -of_A,
                -of_B,
            ],
            "s is missing in the gradient of A.": [of_A / s, of_B],
            "s is missing in the gradient of B.": [of_A, of_B / s],
        }
        for name, tensor, factor in (("A", got[0], A), ("B", got[1], B)):
            turned = isinstance(tensor, Tensor) and tensor.shape != factor.shape
            if turned and tensor.shape == factor.T.shape:
                raise NotYet(
                    f"the gradient of {name} has shape {tuple(tensor.shape)}, but {name} has "
                    f"{tuple(factor.shape)}: it is transposed."
                )
        what = f"with d_out = {d_out}, d_in = {d_in}, r = {r}, the list of the gradients of A and B"
        same(list(got), [of_A, of_B], wrong, what)
    figure, panel = plt.subplots(figsize=(5.5, 2.8), layout="constrained")
    for (name, factors), (colour, line) in zip(STARTS.items(), LOOKS):
        losses = descent(student, factors, generator)
        panel.plot(losses, color=colour, linestyle=line, label=name)
    panel.set(xlabel="step of gradient descent", ylabel="loss", ylim=(0, None))
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    plt.close(figure)
    return (
        figure,
        "Loss over 60 steps with your gradients, from three starts: with B = 0 and with A = 0 it "
        "falls, with both at zero it is a horizontal line.",
    )


def descent(student, factors: tuple[int, int], generator: torch.Generator) -> list[float]:
    """Fit a random 6 x 5 matrix of rank 2 by gradient descent on A and B: the loss before each of 60 steps."""
    drawn = torch.Generator().manual_seed(0)  # the same matrix for each start
    aim = torch.randn(6, 2, generator=drawn) @ torch.randn(2, 5, generator=drawn)
    A = factors[0] * torch.randn(2, 5, generator=generator)
    B = factors[1] * torch.randn(6, 2, generator=generator)
    losses = []
    for _ in range(60):
        G = (B @ A - aim) / 15  # the gradient of the squared distance, over the 30 entries
        losses.append(float((B @ A - aim).square().mean()))
        of_A, of_B = student(G, A, B, 1.0)
        A = A - 0.5 * of_A
        B = B - 0.5 * of_B
    return losses


def counts(L: int, D: int, D_kv: int, D_ff: int, r: int, m: int, P: int) -> dict[str, int]:
    """Trained numbers by method, for a model of this shape."""
    return {
        "LoRA": L * r * (3 * D + D_kv),
        "IA³": L * (2 * D_kv + D_ff),
        "BitFit": L * (3 * D + 2 * D_kv + 2 * D_ff),
        "adapter": L * 2 * (2 * D * m + m + D),
        "prompt tuning": P * D,
        "prefix tuning": L * 2 * P * D_kv,
    }


def miscounts(method: str, L: int, D: int, D_kv: int, D_ff: int, r: int, m: int, P: int) -> dict:
    """What the known mistakes give, by their words."""
    count = functools.partial(counts, r=r, m=m, P=P)
    right = count(L, D, D_kv, D_ff)[method]
    wrong = {
        "k and v do not map D numbers to D here: they map D to D_kv.": count(L, D, D, D_ff)[method],
        "it is the count of one block; there are L of them.": right / L,
    }
    others = {
        "LoRA": {
            "that is A alone, or q alone; q and v have both factors, A and B.": L * r * 2 * D,
            "that is r for each number of q and v; the factors have r · (inputs + outputs).": L
            * r
            * (D * D + D * D_kv),
            "LoRA's factors have no biases.": right + L * (r + r + D + D_kv),
        },
        "IA³": {
            "the factors of the feed-forward network multiply what goes into down, D_ff numbers, "
            "not what comes out.": L * (2 * D_kv + D),
            "k and v have a vector each.": L * (D_kv + D_ff),
            "the feed-forward network has one vector, before down.": L * (2 * D_kv + 2 * D_ff),
            "the feed-forward network has a vector, too.": L * 2 * D_kv,
        },
        "BitFit": {
            "a bias has a number for each output of its layer; these are the inputs.": L
            * (6 * D + D_ff),
            "only the four layers of the attention are counted.": L * (2 * D + 2 * D_kv),
            "gate is missing: it is a linear layer, too.": right - L * D_ff,
        },
        "adapter": {
            "there are two adapters in a block.": right / 2,
            "the adapter's two biases are missing.": L * 4 * D * m,
            "the adapter has two matrices, one down and one up.": L * 2 * (D * m + m + D),
        },
        "prompt tuning": {
            "the soft prompt enters once, at the bottom of the model, and not in each block.": L
            * P
            * D,
        },
        "prefix tuning": {
            "each soft token has a key and a value.": right / 2,
            "the prefix enters in each block; this is the count of one vector for each token.": P
            * D,
        },
    }
    return wrong | others[method]


@checker("13.2")
def trained_numbers(student, generator):
    """Sum of the sizes of the trained tensors, from the model's shape."""
    import matplotlib.pyplot as plt

    def drawn(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    small = {"L": 1, "D": 4, "D_kv": 2, "D_ff": 7, "r": 1, "m": 1, "P": 1}
    large = {"L": drawn(2, 9), "D": 64, "D_kv": 16, "D_ff": drawn(150, 300)}
    large |= {"r": drawn(2, 9), "m": drawn(9, 16), "P": drawn(17, 30)}
    for shape in (small, small | {"L": 3}, small | {"r": 2, "m": 3, "P": 5}, large):
        for method, want in counts(**shape).items():
            got = student(method, **shape)
            for words, value in miscounts(method, **shape).items():
                expect(got != value or value == want, f"{method}: {words}")
            given = ", ".join(f"{name} = {value}" for name, value in shape.items())
            expect(got == want, f"{method} with {given}: you count {got}, there are {want}.")
    llama = {"L": 32, "D": 4096, "D_kv": 4096, "D_ff": 11008, "r": 8, "m": 64, "P": 20}
    yours = {method: student(method, **llama) for method in counts(**llama)}
    figure, panel = plt.subplots(figsize=(6.5, 2.6), layout="constrained")
    panel.barh(list(yours), list(yours.values()), color="#0072B2")
    for row, value in enumerate(yours.values()):
        panel.text(value, row, f" {value:,}", va="center")
    panel.set(xscale="log", xlabel="numbers trained, r = 8, m = 64, P = 20", xlim=(1e4, 1e9))
    panel.invert_yaxis()
    plt.close(figure)
    return (
        figure,
        "Bars on a logarithmic axis for a model of the shape of Llama 2 with 7 billion numbers: "
        + ", ".join(f"{method} {value:,}" for method, value in yours.items())
        + ".",
    )


def kept_tensors(memory: SimpleNamespace) -> list[Tensor]:
    """All tensors in a student's memory, also those in its lists and dictionaries."""
    found, left = [], [vars(memory)]
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, (list, tuple)):
            left += value
    return found


@checker("13.3")
@torch.no_grad()
def switch(student, generator):
    """The base weights are copied once, and every task starts from this copy."""
    import matplotlib.pyplot as plt

    for size, dtype in SIZES:
        layer = nn.Linear(size, size, bias=False).to(dtype)
        layer.weight.copy_(0.1 * torch.randn(size, size, generator=generator))
        walk(student, layer, generator)
    drift, exact = drifts(student, layer, generator)
    figure, panel = plt.subplots(figsize=(6, 2.6), layout="constrained")
    panel.plot(drift, color=LOOKS[2][0], linestyle="--", label="adding and subtracting")
    panel.plot(exact, color=LOOKS[0][0], label="yours")
    panel.set(xlabel="switches", ylabel="largest error")
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    plt.close(figure)
    return (
        figure,
        "Largest distance from the base weights in 16 bits over 200 switches: adding and "
        "subtracting the products leaves an error, your switch none.",
    )


def an_adapter(
    layer: nn.Linear, r: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, float]:
    """Draw (A, B, s) for a layer, in its dtype; no factor is near zero, so no mistake hides."""
    A = (0.5 + torch.rand(r, layer.in_features, generator=generator)).to(layer.weight.dtype)
    B = (0.5 + torch.rand(layer.out_features, r, generator=generator)).to(layer.weight.dtype)
    return A, B, 1.7


def walk(student, layer: nn.Linear, generator: torch.Generator) -> None:
    """Switch to and fro; raise `NotYet` at the first weight that is not what its task alone would give."""
    base, memory, seen, place = layer.weight.clone(), SimpleNamespace(), {}, layer.weight.data_ptr()
    tasks = {"a": an_adapter(layer, 1, generator), "b": an_adapter(layer, 2, generator), None: None}
    order = [None, "a", None, "b", "a", "b", None, "a", "a", None]
    for k, task in enumerate(order):
        student(layer, tasks[task], memory)
        so_far = " → ".join("base" if name is None else name for name in order[: k + 1])
        where = f"after {so_far}, on a layer of {len(base)} x {len(base)} in {layer.weight.dtype},"
        same_place = isinstance(layer.weight, nn.Parameter) and layer.weight.data_ptr() == place
        expect(
            same_place,
            "layer.weight is another tensor now. Other parts of the program hold the old one: "
            "change its numbers in place, with copy_ or +=.",
        )
        kept = {tensor.untyped_storage().data_ptr(): tensor for tensor in kept_tensors(memory)}
        expect(
            layer.weight.untyped_storage().data_ptr() not in kept,
            "what your memory holds is the weight itself and not a copy, so it changes with it: "
            "take layer.weight.clone().",
        )
        want = base
        if task is not None:
            A, B, s = tasks[task]
            want = base + s * B @ A
        compare(layer.weight, want, where, task, layer.weight.dtype)
        expect(
            task not in seen or torch.equal(seen[task], layer.weight),
            f"{where} the weights of task {task} are not those of its first visit, bit for bit: "
            "what came between has left a trace. Do not subtract what you added; start each time "
            "from the same numbers.",
        )
        seen[task] = layer.weight.clone()
    much = sum(tensor.nbytes for tensor in kept.values()) / layer.weight.nbytes
    expect(
        len(base) < LARGE or much <= 1,  # an adapter itself is larger than a tiny layer
        f"your memory holds {much:.1f} times the weight's bytes; one copy is enough.",
    )


def compare(weight: Tensor, want: Tensor, where: str, task: str | None, dtype: torch.dtype) -> None:
    """Raise `NotYet` where the base is not met bit for bit, or a task not within rounding."""
    coarse = (
        1e-4 if dtype == torch.float32 else 0.1
    )  # more than rounding makes, less than an adapter
    tolerance = 0.0 if task is None else coarse
    far = (weight - want).abs().float()
    if bool((far <= tolerance * (1 + want.abs())).all()):
        return
    row, column = divmod(int(far.argmax()), far.shape[1])
    values = f"[{row}, {column}] is {weight[row, column]:.9g} and should be {want[row, column]:.9g}"
    expect(
        task is not None or float(far.max()) > coarse,
        f"{where} the base weights are not back: {values}. In floating point, adding a number and "
        "subtracting it again does not give back what was there; keep a copy.",
    )
    raise NotYet(f"{where} the weight at {values}. Look at what the weight was before this switch.")


def drifts(
    student, layer: nn.Linear, generator: torch.Generator
) -> tuple[list[float], list[float]]:
    """Largest error of the base weights after each of 200 switches: by adding and subtracting, and by the student."""
    base, memory = layer.weight.clone(), SimpleNamespace()
    walked = base.clone()
    drift, exact = [], []
    for _ in range(200):
        A, B, s = an_adapter(layer, 1, generator)
        walked += s * B @ A
        walked -= s * B @ A
        drift.append(float((walked - base).abs().max()))
        student(layer, (A, B, s), memory)
        student(layer, None, memory)
        exact.append(float((layer.weight - base).abs().max()))
    return drift, exact
