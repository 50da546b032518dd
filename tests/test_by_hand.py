"""The numbers that everything else rests on, worked out a second time: loops, plain forwards, seeds."""

import copy
import math
import random
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from by_hand import join
from scipy import stats
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minicpt import data
from minicpt.core.loss import IGNORE, label_loss
from minicpt.core.projection import project
from minicpt.core.templates import Template, encode
from minicpt.core.train import Recipe, train
from minicpt.engine import memory, prefix
from minicpt.engine.base_models import load_base
from minicpt.engine.scores import calibrate
from minicpt.lab.cells import Cell, run_cell
from minicpt.lab.statistics import interval
from minicpt.lab.store import Store
from minicpt.methods.fit import fit

# ---- the training loop and the ball ---------------------------------------------------------------------------------


def test_training_is_adamw_without_decay_clipped_at_one_with_a_falling_rate():
    """Three rows, two at once, so that the parts of a batch have different sizes; each step by the formulas.

    The gradient's norm falls from far above 1 to below it, so that some steps are clipped and others are not.
    """
    x = torch.tensor([[1.0, 0.5], [-0.3, 2.0], [0.7, -1.0]])
    y = torch.tensor([5.0, -5.0, 4.0])
    weight = torch.tensor([4.0, -3.0], requires_grad=True)

    def loss_of(chosen):
        return (x[chosen] @ weight - y[chosen]).square().mean()

    recipe = Recipe(lr=0.3, epochs=12, clip=1.0, at_once=2)
    history = train(loss_of, [weight], 3, recipe, torch.Generator().manual_seed(0))

    w, m, v = [4.0, -3.0], [0.0, 0.0], [0.0, 0.0]
    losses, norms = [], []
    for step in range(1, 13):
        error = [w[0] * a + w[1] * b - c for (a, b), c in zip(x.tolist(), y.tolist())]
        losses.append(sum(e * e for e in error) / 3)
        gradient = [sum(2 * e * row[i] for e, row in zip(error, x.tolist())) / 3 for i in (0, 1)]
        norms.append(math.hypot(*gradient))
        rate = 0.3 * (1 - (step - 1) / 12)
        for i in (0, 1):
            g = gradient[i] * min(1, 1 / norms[-1])
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            w[i] -= rate * (m[i] / (1 - 0.9**step)) / (math.sqrt(v[i] / (1 - 0.999**step)) + 1e-8)
    assert norms[0] > 3 and norms[-1] < 0.9
    assert history == pytest.approx(losses, rel=1e-4)
    assert weight.tolist() == pytest.approx(w, rel=1e-4)


def test_what_is_inside_its_ball_stays_and_what_is_outside_comes_to_its_border():
    delta = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    radius = torch.tensor([2.5, 5.0, 1.0, 1.0])
    expected = torch.tensor([[1.5, 2.0], [3.0, 4.0], [0.3, 0.4], [0.0, 0.0]])
    torch.testing.assert_close(project(delta, radius), expected)


# ---- what a method's loss is before its first step ------------------------------------------------------------------


@pytest.fixture(scope="module")
def long_labels():
    """Four shots whose label words have one, two, three and four tokens."""
    split = data.make_split(data.load_task("trec"), 4, 0, n_test=2)
    words = iter(("city", "big red", "very old city", "dog", "cat", "hat"))
    classes = [label for _, label in split.shots]
    classes += [label for label in split.classes if label not in classes]
    return replace(split, verbalizers={label: next(words) for label in classes})


def label_loss_of_a_row(model, before, ids, n_label):
    """-log p of the row's last `n_label` tokens, their mean, by one forward of this row alone."""
    embeds = torch.cat((before, model.get_input_embeddings()(torch.tensor([ids]))), dim=1)
    with torch.no_grad():
        log_p = model(inputs_embeds=embeds).logits[0].log_softmax(-1)  # (S, V)
    return -log_p[-n_label - 1 : -1].gather(1, torch.tensor(ids[-n_label:])[:, None]).mean().item()


@pytest.mark.parametrize("method", ["cpt", "pt", "ipt", "lora", "ct_kv"])
def test_the_first_loss_is_the_mean_over_rows_of_each_labels_mean(method, random_base, long_labels):
    """Without a step (rate 0), what stands before the rows is still what it was when the loss was taken."""
    hp = {"lr": 0.0, "epochs": 1, "batch_size": 0, "decay": 0.9, "tokens": 3}
    hp |= {"leave_one_out": False, "token_dropout": 0.0} if method == "ct_kv" else {}
    predictor = fit(method, random_base, long_labels, hp)
    predictor.close()
    pairs = [(text, long_labels.verbalizers[label]) for text, label in long_labels.shots]
    shots = encode(random_base.tokenizer, long_labels.template, pairs)
    assert [shot.types.count(4) for shot in shots] == [1, 2, 3, 4]
    context, before = join(shots), predictor.prefix
    if method == "lora":  # whose B is zero at the start: the base model
        before = random_base.embed([])
    if method == "ct_kv":
        before = random_base.embed(context.ids)
    expected = 0.0
    for shot in shots:
        ids = shot.ids[: len(shot.ids) - shot.types[::-1].index(4)]
        expected += label_loss_of_a_row(random_base.model, before, ids, shot.types.count(4)) / 4
    if method == "cpt":  # the context's labels as well: the last weighs 0.9, the one before it 0.81
        nothing = random_base.embed([])
        for k in range(4):
            ids = join(shots[: k + 1]).ids
            ids = ids[: len(ids) - shots[k].types[::-1].index(4)]
            n = shots[k].types.count(4)
            own = label_loss_of_a_row(random_base.model, nothing, ids, n)
            expected += 0.9 ** (4 - k) * own
    assert predictor.history == pytest.approx([expected], rel=1e-4)


def test_a_fit_is_seeded_by_its_split_and_by_nothing_else(random_base, long_labels):
    """A soft prompt starts from tokens that are drawn: the same whatever was drawn before, others for another seed."""
    hp = {"lr": 0.01, "epochs": 1, "tokens": 3}
    starts = {}
    for split_seed, seed_outside in ((0, 1), (0, 2), (1, 1)):
        with torch.random.fork_rng():
            torch.manual_seed(seed_outside)
            predictor = fit("pt", random_base, replace(long_labels, seed=split_seed), hp)
        starts[split_seed, seed_outside] = predictor.history
    assert starts[0, 1] == starts[0, 2] != starts[1, 1]


# ---- one pass for many rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ids, mask",
    [
        ([[7, 8, 9]] * 3, [[1, 1, 1]] * 3),  # nothing tells the rows apart
        # a real token has the id of the padding, and the first row is the padded one
        ([[7, 8, 0, 0, 0], [7, 8, 0, 0, 9]], [[1, 1, 0, 0, 0], [1, 1, 1, 1, 1]]),
        ([[0, 0, 8, 9], [0, 0, 8, 7]], [[0, 0, 1, 1], [1, 1, 1, 1]]),
        # the rows part, and then have the same token once more
        ([[7, 8, 9, 5, 6], [7, 4, 9, 5, 3]], [[1] * 5] * 2),
    ],
    ids=["identical", "padded_right", "padded_left", "equal_again"],
)
def test_rows_that_begin_alike_have_the_loss_of_plain_forwards(ids, mask, gpt2, monkeypatch):
    monkeypatch.setattr(prefix, "WORTH_SHARING", 0)
    model = copy.deepcopy(gpt2).requires_grad_(False)  # frozen: only then may queries be shared
    prompt = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    ids, mask = torch.tensor(ids), torch.tensor(mask)
    B = len(ids)
    last = mask.shape[1] - 1 - mask.flip(1).argmax(1)  # of each row, its last real token
    types = torch.where(mask == 1, 2, 0)
    types[torch.arange(B), last] = 4
    labels = ids.masked_fill(types != 4, IGNORE)
    loss = prefix.loss_after(model, prompt, ids, mask, types, labels)
    embeds = torch.cat((prompt.expand(B, -1, -1), model.get_input_embeddings()(ids)), dim=1)
    whole = torch.cat((torch.ones(B, 5, dtype=torch.long), mask), dim=1)
    log_p = model(inputs_embeds=embeds, attention_mask=whole).logits.log_softmax(-1)  # (B, 5+T, V)
    rows = torch.arange(B)
    expected = -log_p[rows, 5 + last - 1, ids[rows, last]].mean()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)


# ---- scores ---------------------------------------------------------------------------------------------------------


def test_calibration_divides_by_the_mean_probability_after_content_free_inputs():
    """0.9 and 0.3 have the mean 0.6; the mean of their logarithms would be that of 0.52."""
    content_free = torch.tensor([[0.9, 0.1], [0.3, 0.7]]).log()
    scores = torch.tensor([[0.5, 0.5], [0.62, 0.38]]).log()
    expected = torch.tensor([[0.5 / 0.6, 0.5 / 0.4], [0.62 / 0.6, 0.38 / 0.4]]).log()
    torch.testing.assert_close(calibrate(scores, content_free), expected)


def test_a_cells_losses_are_those_of_the_queries_and_of_the_shots_apart():
    """Figure 1 draws both. ICL on the micro model, whose prompt is one string; its labels are one token each."""
    cell = Cell("trec", "icl", 2, 0, n_test=3, device="cpu")
    result, base, split = run_cell(cell), load_base("micro", "cpu"), cell.split()
    template: Template = split.template

    def written(text, label):
        answer = template.output.format(split.verbalizers[label])
        return template.input.format(text) + template.intra + answer

    context = "".join(written(*shot) + template.inter for shot in split.shots)
    losses = []
    for row in [*split.queries, *split.shots]:
        ids = base.tokenizer(context + written(*row)).input_ids
        losses.append(label_loss_of_a_row(base.model, base.embed([]), ids, 1))
    assert result["loss"]["test"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-4)
    assert result["loss"]["train"] == pytest.approx(sum(losses[3:]) / 2, rel=1e-4)


# ---- memory ---------------------------------------------------------------------------------------------------------


class LiveBytes(TorchDispatchMode):
    """The most bytes that the tensors made meanwhile held at one time, in the backward pass too."""

    def __init__(self):
        super().__init__()
        self.sizes, self.peak = {}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        given = {
            StorageWeakRef(x.untyped_storage()) for x in tree_leaves(args) if torch.is_tensor(x)
        }
        result = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if torch.is_tensor(tensor):
                storage = tensor.untyped_storage()
                if StorageWeakRef(storage) not in given:
                    self.sizes[StorageWeakRef(storage)] = storage.nbytes()
        self.sizes = {ref: size for ref, size in self.sizes.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self.sizes.values()))
        return result


def test_the_logits_of_a_step_are_counted_as_often_as_they_are_held():
    """LoRA's step, which has logits at every token, with a vocabulary beside which nothing else counts."""
    from transformers import GPT2Config, GPT2LMHeadModel

    V, rows, query = 20_000, 4, 16
    config = GPT2Config(
        vocab_size=V, n_embd=8, n_layer=1, n_head=1, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    model = GPT2LMHeadModel(config).eval().requires_grad_(False)
    ids = torch.randint(1, V, (rows, query))
    embeds = model.get_input_embeddings()(ids).requires_grad_()
    types = torch.tensor([[2] * (query - 1) + [4]] * rows)
    with LiveBytes() as live:
        logits = model(inputs_embeds=embeds).logits
        label_loss(logits, ids.masked_fill(types != 4, IGNORE), types, reduction="sum").backward()
    # an index's gradient is written into zeros; under a watch torch copies these first
    held = live.peak - 4 * rows * query * V
    assert held < memory.training_bytes(model, rows, 0, query) < 1.6 * held


# ---- splits ---------------------------------------------------------------------------------------------------------


def test_no_query_is_a_training_row_and_no_shot_a_test_row():
    labels = {"a": "good", "b": "bad"}
    train = [(f"train {i}", "ab"[i % 2]) for i in range(30)]
    test = [(f"test {i}", "ab"[i % 2]) for i in range(30)]
    task = data.Task("t", train, test, labels, [Template()])
    for seed in range(20):
        split = data.make_split(task, 6, seed, n_test=25)
        assert len(set(split.queries)) == 25 and set(split.queries) <= set(test)
        assert len(set(split.shots)) == 6 and set(split.shots) <= set(train)
        assert Counter(label for _, label in split.shots) == {"a": 3, "b": 3}


def test_where_a_shot_stands_among_two_says_nothing_about_where_it_stands_among_four():
    """So that an order which is lucky with two shots is not the same luck with four: each number draws its own.

    Eight pairs of places in 400 seeds: about 50 of each, a standard deviation is 6.6.
    """
    pairs = Counter()
    for seed in range(400):
        (first,) = data.sample_shots(["a"] * 9, 1, seed)
        among = [data.sample_shots(["a"] * 9, k, seed).index(first) for k in (2, 4)]
        pairs[tuple(among)] += 1
    assert len(pairs) == 8 and 25 < min(pairs.values()) and max(pairs.values()) < 80


# ---- intervals and the store ----------------------------------------------------------------------------------------


def test_the_bootstrap_has_the_seed_zero_and_gives_the_same_ends_every_time():
    values = random.Random(0).sample(range(1000), 12)
    resamples = np.random.default_rng(0).choice(sorted(values), (10_000, 12)).mean(axis=1)
    tail = stats.norm.cdf(stats.t.ppf(0.025, 11) * math.sqrt(12 / 11))
    first, again = interval(values), interval(values)
    assert first == again
    assert first[2:] == pytest.approx(np.quantile(resamples, [tail, 1 - tail]), rel=1e-12)


def test_reading_the_results_leaves_the_errors_where_they_are(tmp_path):
    store, cell = Store(tmp_path), Cell("trec", "icl", 2, 0)
    store.put(cell, {"config": cell.config(), "accuracy": 0.5})
    store.put_error(replace(cell, seed=1), ValueError("no"))
    before = sorted(path.name for path in tmp_path.iterdir())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [result["accuracy"] for result in store.results()] == [0.5]
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    assert store.error(replace(cell, seed=1)) == "ValueError: no" and len(store.errors()) == 1
