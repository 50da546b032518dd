"""A GPU that is none: PyTorch's device "pretend", whose numbers a CPU computes and whose manners are those of CUDA.

    python tests/pretend_gpu.py        what tests/test_fake_cuda.py looks at, as JSON

Two questions about a GPU can be answered without one: does an operation mix devices, and does it make Python wait?

The first is put to PyTorch's own FakeTensorMode, once for each operation and each way in which its arguments lie on
`cuda` and `cpu`. It cannot run a training by itself: a PyTorch that was built without CUDA has no gradients for fake
CUDA tensors, and a fake has no numbers from which a size could follow. So the numbers are computed on the CPU, and the
device is PyTorch's slot for backends of one's own (PrivateUse1). It is registered for good, hence a process of its own.

Python waits where a number comes back (`item`, `tolist`, `bool`), where a shape depends on numbers (`nonzero`, a mask
as index), and where a copy to or from the GPU is not asked to be asynchronous (`non_blocking`).
"""

import copy
import json
import sys
import traceback
import warnings
from collections import Counter

import torch
from torch._subclasses.fake_tensor import (
    FakeTensor,
    FakeTensorDeviceMismatchError,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

aten = torch.ops.aten
READ = {  # their result, or its shape, is a number that Python has to know
    aten._local_scalar_dense.default,
    aten._unique2.default,
    aten.equal.default,
    aten.is_nonzero.default,
    aten.masked_select.default,
    aten.nonzero.default,
}
INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEX |= {aten._index_put_impl_.default}
COPY = {aten._to_copy.default, aten.copy_.default}


class Backend(_DummyBackendModule):
    """What torch asks a device's module for: it draws no random numbers of its own."""

    def get_rng_state(self, device=None):
        return torch.empty(0)

    def set_rng_state(self, state, device=None):
        pass


_setup_privateuseone_for_python_backend("pretend", Backend())
GPU = torch.device("pretend", 0)


class OnGPU(torch.Tensor):
    """A tensor that says it is on the GPU; its numbers are in `real`, on the CPU."""

    @staticmethod
    def __new__(cls, real):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            real.size(),
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=GPU,
        )

    def __init__(self, real):
        self.real_ = real

    def __repr__(self):
        return f"OnGPU{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return PretendedGPU.now.run(func, args, kwargs or {})


def is_gpu(x) -> bool:
    return isinstance(x, OnGPU) or (isinstance(x, torch.device) and x.type == GPU.type)


class PretendedGPU(TorchDispatchMode):
    """While it lasts, tensors may be made on `GPU`; `waits` counts who made Python wait: (in the loop?, who)."""

    now = None

    def __init__(self):
        super().__init__()
        self.fake, self.verdicts, self.waits = FakeTensorMode(), {}, Counter()
        self.in_loop = False

    def __enter__(self):
        PretendedGPU.now = self
        torch._C._set_only_lift_cpu_tensors(
            True
        )  # torch.tensor(..., device=GPU): made here, then copied
        return super().__enter__()

    def __exit__(self, *args):
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*args)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if any(map(is_gpu, tree_leaves((args, kwargs)))):
            return self.run(func, args, kwargs)
        return func(*args, **kwargs)

    def run(self, func, args, kwargs):
        """Ask where the result lies (or whether the operation is refused), note a wait, and compute on the CPU."""
        if self.makes_wait(func, args, kwargs):
            self.waits[self.in_loop, who()] += 1
        on_gpu = self.lies_on_gpu(func, args, kwargs)
        real_args, real_kwargs = tree_map(as_on_cpu, (args, kwargs))
        out = func(*real_args, **real_kwargs)
        if on_gpu:
            out = tree_map(as_on_gpu, out)
        return return_and_correct_aliasing(func, args, kwargs, out)

    def makes_wait(self, func, args, kwargs) -> bool:
        if func in COPY:
            there = args[0] if func is aten.copy_.default else kwargs.get("device", args[0].device)
            source = args[1] if func is aten.copy_.default else args[0]
            if is_gpu(source) == is_gpu(there) or not source.numel():
                return False
            asynchronous = kwargs.get("non_blocking") or (
                func is aten.copy_.default and args[2:] == (True,)
            )
            return is_gpu(source) or not asynchronous  # to ordinary memory: always
        if func in INDEX and is_gpu(args[0]):
            # a mask is turned into numbers, and numbers that lie on the CPU are copied first
            return any(x.dtype == torch.bool or not is_gpu(x) for x in args[1] if x is not None)
        return func in READ and any(map(is_gpu, tree_leaves((args, kwargs))))

    def lies_on_gpu(self, func, args, kwargs) -> bool:
        """FakeTensorMode's verdict; it raises for what mixes devices."""
        if func in READ or func in INDEX:
            return is_gpu(args[0])
        leaves = tree_leaves((args, kwargs))
        case = (func, tuple((is_gpu(x), getattr(x, "dim", int)() == 0) for x in leaves))
        if case not in self.verdicts:
            with self.fake:
                fakes, options = tree_map(self.as_fake, (args, kwargs))
                out = tree_leaves(func(*fakes, **options))
            self.verdicts[case] = any(getattr(x, "device", GPU).type == "cuda" for x in out)
        return self.verdicts[case]

    def as_fake(self, x):
        if isinstance(x, torch.device):
            return torch.device("cuda", 0) if is_gpu(x) else x
        if not isinstance(x, torch.Tensor):
            return x
        shape = torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device="meta")
        return FakeTensor(self.fake, shape, torch.device("cuda:0" if is_gpu(x) else "cpu"))


def as_on_cpu(x):
    if isinstance(x, OnGPU):
        return x.real_
    return torch.device("cpu") if is_gpu(x) else x


def as_on_gpu(x):
    return OnGPU(x) if isinstance(x, torch.Tensor) and not isinstance(x, OnGPU) else x


def who() -> str:
    """The innermost function of a package that asked for it; "gradient" where only torch is on the stack."""
    for frame in reversed(traceback.extract_stack()):
        for package in ("minicpt", "peft", "transformers"):
            if f"/{package}/" in frame.filename and "/torch/" not in frame.filename:
                return f"{package}/{frame.filename.split(f'/{package}/')[-1]}:{frame.name}"
    return "gradient"


# ---- what is run on it ----------------------------------------------------------------------------------------------


def refused(function) -> str | None:
    """The first words of the refusal, None if there is none."""
    try:
        function()
    except (FakeTensorDeviceMismatchError, RuntimeError) as error:
        return str(error)[:60]
    return None


def mixtures() -> dict:
    """What CUDA refuses and what it allows."""
    with PretendedGPU():
        there, here = torch.ones(3, device=GPU), torch.ones(3)
        matrix, ids = torch.ones(3, 3, device=GPU), torch.tensor([0, 2])
        functions = {
            "a sum": lambda: there + here,
            "a product": lambda: matrix @ here,
            "a choice": lambda: torch.where(there > 0, there, here),
            "an embedding": lambda: torch.nn.functional.embedding(ids, matrix),
            "a gather": lambda: matrix.gather(1, torch.zeros(3, 1, dtype=torch.long)),
            "allowed: a number": lambda: there + torch.tensor(1.0),
            "allowed: an index": lambda: matrix[ids],
            "allowed: a copy": lambda: there.copy_(here),
            "allowed: a copy, then a sum": lambda: there + here.to(GPU),
        }
        return {name: refused(function) for name, function in functions.items()}


def core_functions() -> dict:
    """Greatest difference of the core's tensor functions on the GPU from the CPU."""
    from minicpt.core import loss, masks, projection

    torch.manual_seed(0)
    types = torch.tensor([[1, 2, 3, 4, 0, 5, 6, 7, 8, 0], [1, 2, 3, 4, 4, 0, 5, 6, 7, 8]])
    labels = torch.arange(20).view(2, 10).masked_fill(~masks.is_label(types), loss.IGNORE)
    logits, delta, radius = torch.randn(2, 10, 20), torch.randn(10, 4), torch.rand(10)
    functions = {
        "roles": lambda d: masks.role_of(types.to(d)),
        "examples": lambda d: masks.example_of(types.to(d)),
        "updated": lambda d: masks.is_updated(types.to(d)),
        "shifted": lambda d: masks.shift_types(types[0, :5].to(d), types.to(d)),
        "distance": lambda d: loss.distance_to_last(types.to(d)),
        "radius": lambda d: projection.token_epsilon(types[0].to(d), 0.2, 0.1, 3.0),
        "project": lambda d: projection.project(delta.to(d), radius.to(d)),
        "project together": lambda d: projection.project_together(delta.to(d), radius.to(d)),
        "loss, mean": lambda d: loss.label_loss(logits.to(d), labels.to(d), types.to(d), 0.9),
        "loss, sum": lambda d: loss.label_loss(logits.to(d), labels, types, 0.9, "sum"),
    }
    with PretendedGPU():
        return {
            name: (function(GPU).cpu().float() - function("cpu").float()).abs().max().item()
            for name, function in functions.items()
        }


def base_model():
    """The tests' random Llama of two layers, with the micro model's tokenizer."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from minicpt.engine.base_models import MICRO, BaseModel

    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return BaseModel("random", model, tokenizer, "random")


def on_gpu(base):
    """The same base model on the pretended GPU."""
    return copy.copy(base).__class__(
        base.name, copy.deepcopy(base.model).to(GPU), base.tokenizer, base.fingerprint
    )


def fit_and_score(method, base, split, hp, extra=()) -> tuple[list, torch.Tensor]:
    from minicpt import fit

    predictor = fit(method, base, split, hp, extra=extra)
    return predictor, lambda: predictor.scores([text for text, _ in split.queries])[0]


def methods(split, base) -> dict:
    """Every method: how far losses and scores are from the CPU's, and who made Python wait, where."""
    from minicpt.methods import trainers
    from minicpt.methods.registry import METHODS

    plain = trainers.train

    def train(*args, **kwargs):
        gpu = PretendedGPU.now
        gpu.in_loop = True
        history = plain(*args, **kwargs)
        gpu.in_loop = False
        return history

    trainers.train = train
    cases = {name: (name, {}, ()) for name in METHODS}
    cases["cpt, two rows a step"] = ("cpt", {"batch_size": 2}, ())
    cases["pt, eleven steps"] = ("pt", {"epochs": 11}, ())
    cases["pt in a ball"] = ("pt", {"epsilon": 0.5, "epsilon_unit": "mean_norm"}, ())
    cases["iapt, held-out rows"] = ("iapt", {}, (split.queries * 11)[:32])
    cases["ct_prompt, other rows each"] = ("ct_prompt", {"leave_one_out": True}, ())
    found = {}
    for name, (method, changes, extra) in cases.items():
        hp = {"epochs": 3, "lr": 0.01, "batch_size": 0} | changes if METHODS[method].trains else {}
        PretendedGPU.now = PretendedGPU()
        expected, score = fit_and_score(method, base, split, hp, extra)
        scores = score()
        with PretendedGPU() as gpu:
            predictor, score = fit_and_score(method, on_gpu(base), split, hp, extra)
            fitted = Counter(gpu.waits)
            gpu.waits.clear()
            difference = (score() - scores).abs().max().item()
        pairs = zip(predictor.history, expected.history, strict=True)
        found[name] = {
            "steps": len(predictor.history),
            "losses differ by": max((abs(a - b) for a, b in pairs), default=0.0),
            "scores differ by": difference,
            "waits in the loop": {who: n for (loop, who), n in fitted.items() if loop},
            "waits outside": {who: n for (loop, who), n in fitted.items() if not loop},
            "waits of scoring": {who: n for (_, who), n in gpu.waits.items()},
        }
    return found


def planted_bug(split, base) -> str | None:
    """A line that forgets to move its tensor: `send` leaves it where it is."""
    from minicpt.engine import prefix

    right = prefix.send
    prefix.send = lambda tensor, device: tensor
    try:
        with PretendedGPU():
            return refused(lambda: fit_and_score("pt", on_gpu(base), split, {"epochs": 1}))
    finally:
        prefix.send = right


def wrapped_model(split, base) -> dict:
    """The drop-in class as a Trainer calls it, every tensor on the GPU: loss, gradient, scores, generated text."""
    import minicpt
    from minicpt import CPTConfig, get_peft_model

    context = minicpt.build_context(
        base.tokenizer, split.template, [(text, split.verbalizers[c]) for text, c in split.shots]
    )
    config = {"task_type": "CAUSAL_LM", "cpt_token_ids": context.ids}
    config["cpt_tokens_type_mask"] = context.types
    ids = torch.randint(5, 60, (3, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    types = torch.tensor([[1, 2, 2, 3, 4, 0, 0]]).repeat(3, 1)

    def call(device, of):
        model = get_peft_model(of.model, CPTConfig(**config))
        there = [x.to(device) for x in (ids, mask, ids, types)]
        if PretendedGPU.now:
            PretendedGPU.now.waits.clear()
        names = ("input_ids", "attention_mask", "labels", "input_type_mask")
        loss = model(**dict(zip(names, there))).loss
        waits = dict(PretendedGPU.now.waits) if PretendedGPU.now else {}
        loss.backward()
        gradient = model.prompt_encoder["default"].delta_embedding.weight.grad
        scores = model.score(there[0], [[7], [8, 9]], there[1])
        written = model.generate(
            input_ids=there[0][:1], attention_mask=there[1][:1], max_new_tokens=3, do_sample=False
        )
        return loss.item(), gradient.cpu(), scores, written.cpu(), sum(waits.values())

    PretendedGPU.now = None
    expected = call("cpu", base)
    with PretendedGPU():
        got = call(GPU, on_gpu(base))
    return {
        "loss": abs(got[0] - expected[0]),
        "gradient": (got[1] - expected[1]).abs().max().item(),
        "scores": (got[2] - expected[2]).abs().max().item(),
        "same text": got[3].tolist() == expected[3].tolist(),
        "waits": got[4],
    }


def main() -> None:
    from minicpt import load_task, make_split

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    split, base = make_split(load_task("trec"), 4, 0, 3), base_model()
    results = {
        "mixtures": mixtures(),
        "core": core_functions(),
        "methods": methods(split, base),
        "bug": planted_bug(split, base),
        "wrapped": wrapped_model(split, base),
    }
    json.dump(results, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
