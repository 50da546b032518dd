"""One model, many threads: every call gets the answer that it gets alone.

The suite asks for a few dozen calls a thread; `MINICPT_CALLS=500 pytest tests/test_threads.py` for five hundred.
"""

import copy
import functools
import os
import sys
from concurrent.futures import ThreadPoolExecutor

import joblib
import numpy as np
import pytest
import torch
from sklearn.model_selection import cross_val_score, cross_validate
from test_architectures import V, base
from test_classifier import small
from test_iapt import wrapped as iapt_on
from test_prefix import ragged, weight_of, wrap

from minicpt import data
from minicpt.methods import classifier
from minicpt.methods.fit import fit

THREADS, CALLS = 4, int(os.environ.get("MINICPT_CALLS", 10))
GREEDY = dict(max_new_tokens=3, do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(autouse=True)
def threads_that_change_often(monkeypatch):
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def together(function, arguments):
    """What the function gives for each argument, from four threads at once; an error is what it gives, too."""

    def one(argument):
        try:
            return function(argument)
        except Exception as error:
            return repr(error)

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(one, arguments))


def equal(a, b):
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    return type(a) is type(b) and np.array_equal(a, b)


def wrong(*functions):
    """How many of 4 times `CALLS` calls of each function, all at once, differ from the same call in one thread."""
    alone = [(function, i) for i in range(10) for function in functions]
    for function, i in alone[: len(functions)]:
        function(i)  # the first call of all projects the prompt onto its balls
    expected = {call: call[0](call[1]) for call in alone}
    calls = [(function, i % 10) for i in range(THREADS * CALLS) for function in functions]
    got = together(lambda call: call[0](call[1]), calls)
    assert (
        len({str(answer) for answer in expected.values()}) > 5
    )  # the calls have different answers
    return sum(not equal(answer, expected[call]) for answer, call in zip(got, calls))


def ids_of(i):
    return torch.randint(1, V, (1 + i % 3, 4 + i), generator=torch.Generator().manual_seed(i))


def forward(wrapped, i):
    return wrapped(input_ids=ids_of(i)).logits.detach()


def forward_without_gradients(wrapped, i):
    with torch.no_grad():
        return wrapped(input_ids=ids_of(i), logits_to_keep=2).logits


def gradient(wrapped, i):
    batch = ragged(3, "right", i)
    return torch.autograd.grad(wrapped(**batch).loss, weight_of(wrapped))[0]


def generated(wrapped, i):
    return wrapped.generate(input_ids=ids_of(i), **GREEDY)


def scored(wrapped, i):
    return wrapped.score(ids_of(i), [[5], [6, 7], [8, 9, 10]])


def of_the_base_model(wrapped, i):
    return wrapped.base_model(input_ids=ids_of(i)).logits.detach()


CALLS_OF_A_PROMPT = [
    forward,
    forward_without_gradients,
    gradient,
    generated,
    scored,
    of_the_base_model,
]


# ---- a prompted model ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("call", CALLS_OF_A_PROMPT, ids=lambda call: call.__name__)
def test_four_threads_get_the_answers_of_one(call):
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    assert wrong(functools.partial(call, wrapped)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["Llama", "Bloom"])
def test_all_kinds_of_calls_at_once_with_two_prompts_on_one_base_model(name):
    model = copy.deepcopy(base(name))
    both = [wrap(model, "cpt").eval(), wrap(model, "pt").eval()]
    calls = [c for c in CALLS_OF_A_PROMPT if c is not gradient]
    assert wrong(*(functools.partial(call, one) for one in both for call in calls)) == 0


@pytest.mark.slow
def test_iapts_generators_on_one_base_model():
    both = [iapt_on("Llama"), iapt_on("Llama")]
    both[1].base_model = both[0].base_model
    for weight in both[1].generators.parameters():
        weight.data *= 1.5

    def logits(model, i):
        return model(ids_of(i)[:, :8]).logits.detach()

    def text(model, i):
        return model.generate(ids_of(i)[:1], **GREEDY)

    calls = [functools.partial(call, model) for model in both for call in (logits, text)]
    assert wrong(*calls, functools.partial(of_the_base_model, both[0])) == 0


def replicated(model):
    """What DataParallel makes for a device: modules that share all dictionaries, with weights as plain tensors."""
    replicas = {module: module._replicate_for_data_parallel() for module in model.modules()}
    for module, replica in replicas.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(replica, name, replicas[child])
        for name, weight in module._parameters.items():
            replica._parameters[name] = None
            if weight is not None:
                del replica._parameters[name]
                setattr(replica, name, weight.clone())
    return replicas[model]


@pytest.mark.parametrize("grad", [True, False])
def test_replicas_as_data_parallel_makes_them(grad):
    wrapped, batch = wrap(copy.deepcopy(base("Llama")), "cpt").eval(), ragged(8, "right", 0)

    def run(model_and_first):
        model, first = model_and_first
        rows = {name: values[first::THREADS] for name, values in batch.items()}
        with torch.set_grad_enabled(grad):
            output = model(**rows)
            return output.loss, output.logits

    for _ in range(max(5, CALLS // 10)):
        parts = [(replicated(wrapped), i) for i in range(THREADS)]
        losses, logits = zip(*together(run, parts))
        expected, expected_logits = zip(*[run((wrapped, i)) for i in range(THREADS)])
        torch.testing.assert_close(logits, expected_logits)
        torch.testing.assert_close(losses, expected)
        if grad:
            ours, theirs = (
                torch.autograd.grad(sum(x), weight_of(wrapped))[0] for x in (losses, expected)
            )
            assert (ours - theirs).norm() <= 1e-4 * theirs.norm()


def test_the_base_model_keeps_nothing_of_a_call():
    model = copy.deepcopy(base("Llama"))
    before = vars(model).copy(), model(input_ids=ids_of(3)).logits
    wrapped = wrap(model, "cpt").eval()
    generated(wrapped, 1), scored(wrapped, 1), forward(wrapped, 1)
    assert vars(model) == before[0]
    assert torch.equal(model(input_ids=ids_of(3)).logits, before[1])


# ---- classifiers -----------------------------------------------------------------------------------------------------


@pytest.fixture
def rows(monkeypatch, random_base):
    """Sixteen texts and their labels; the classifiers' base model is a tiny random one."""
    monkeypatch.setattr(classifier, "_shared_base", lambda model: random_base)
    return map(list, zip(*data.load_task("set_cls").train[:16]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "methods",
    [("cpt", "icl"), ("lora", "iapt"), ("iapt", "iapt"), ("ct_kv", "pt")],
    ids="-".join,
)
def test_two_classifiers_share_a_base_model_and_four_threads(rows, methods):
    texts, labels = rows
    fitted = [small(m, random_state=i).fit(texts, labels) for i, m in enumerate(methods)]

    def probabilities(one, i):
        return one.predict_proba(texts[i : i + 1 + i % 3])

    assert wrong(*(functools.partial(probabilities, one) for one in fitted)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cpt", "pt", "lora", "iapt"])
def test_scikit_learns_threads_give_the_folds_of_one(rows, method):
    """Fits draw from torch's one random state, so they wait for each other; predictions do not."""
    texts, labels = rows
    args = dict(X=texts, y=labels, cv=2, error_score="raise", return_estimator=True)
    one = cross_validate(small(method), **args)
    with joblib.parallel_backend("threading", n_jobs=THREADS):
        two = cross_validate(small(method), **args)
        scores = cross_val_score(small(method), texts, labels, cv=2, error_score="raise")
    assert (one["test_score"] == two["test_score"]).all() and (scores == two["test_score"]).all()
    for a, b in zip(one["estimator"], two["estimator"]):
        assert a.predictor_.history == b.predictor_.history
        assert (a.predict_proba(texts) == b.predict_proba(texts)).all()


def test_loras_matrices_are_not_in_the_base_model_that_others_use(random_base):
    split = data.make_split(data.load_task("set_cls"), 4, seed=0, n_test=6)
    texts = [text for text, _ in split.queries]
    icl = fit("icl", random_base, split)
    before = icl.scores(texts)[0]
    lora = fit("lora", random_base, split, {"epochs": 3, "lr": 0.1})
    assert torch.equal(icl.scores(texts)[0], before)  # though the other one is still in use
    own = dict(lora.model.named_parameters())
    shared = {weight.data_ptr() for weight in random_base.model.parameters()}
    assert {name for name, weight in own.items() if weight.data_ptr() not in shared} == {
        name for name in own if "lora_" in name
    }
