"""Context Tuning, CPT's options one by one, and the ablation table: against plain forwards, by property, end to end."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from by_hand import join
from hypothesis import given
from hypothesis import strategies as st

from minicpt import FewShotClassifier, data
from minicpt.__main__ import main
from minicpt.core.masks import SEPARATOR, role_of
from minicpt.core.projection import project, project_together
from minicpt.core.templates import Encoded, encode, tokenize
from minicpt.engine.base_models import BaseModel
from minicpt.errors import MiniCPTError
from minicpt.lab import ablations, statistics
from minicpt.lab.executors import run_grid
from minicpt.lab.store import Store
from minicpt.methods import fit, registry
from minicpt.methods.context_tuning import (
    OPTIONS,
    TunedCache,
    TunedContext,
    chosen_roles,
    examples_of,
    visible,
)
from minicpt.methods.prepare import Job, until_label

ROOT = Path(__file__).resolve().parent.parent
HP = {
    "lr": 0.02,
    "epochs": 3,
    "batch_size": 0,
    "epsilon": 0.5,
    "epsilon_format": 0.3,
    "epsilon_unit": "mean_norm",
    "decay": 0.9,
    "context_weight": 1.0,
}
CT = {"lr": 0.02, "epochs": 3, "token_dropout": 0.0}


@pytest.fixture(scope="module")
def split():
    return data.make_split(data.load_task("trec"), 4, 0, n_test=12)


@pytest.fixture(scope="module")
def shots(random_base, split):
    return encode(
        random_base.tokenizer, split.template, [(t, split.verbalizers[c]) for t, c in split.shots]
    )


@pytest.fixture(scope="module")
def context(shots):
    return join(shots)


def texts_of(split):
    return [text for text, _ in split.queries]


def moved(base, split, hp, method="cpt"):
    """How far every context token went, (P,), and the types."""
    fixed = {**HP, "lr": 0.0} if method != "ct_prompt" else {"lr": 0.0}
    start = fit.fit(method, base, split, fixed).prefix[0]
    return (fit.fit(method, base, split, hp).prefix[0] - start).norm(dim=1)


# ---- CPT on plain tensors is CPT ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change", [{}, {"context_weight": 0.0}, {"context_weight": 0.3}, {"batch_size": 1}]
)
@pytest.mark.parametrize("method", ["cpt", "cpt_instr"])
def test_with_default_options_it_is_the_drop_in_cpt(random_base, split, method, change):
    """Two implementations, one number: the wrapper with CPTConfig, and the options at their defaults."""
    one = fit.fit(method, random_base, split, {**HP, **change})
    two = fit.fit(method, random_base, split, {**HP, **change, **OPTIONS})
    assert two.history == pytest.approx(one.history, rel=1e-4)
    torch.testing.assert_close(two.prefix, one.prefix, rtol=1e-3, atol=1e-4)


def test_one_random_label_is_the_training_label_plus_one_of_the_contexts(random_base, split):
    """The first loss minus the training label's is one of the K weighted context losses, not always the same."""
    hp = {**HP, "epochs": 12, "lr": 0.0}
    train_only = fit.fit("cpt", random_base, split, {**hp, "context_weight": 0.0}).history[0]
    whole = fit.fit("cpt", random_base, split, hp).history[0]
    extra = [
        loss - train_only
        for loss in fit.fit("cpt", random_base, split, {**hp, "context_labels": "one"}).history
    ]
    values = sorted({round(x, 3) for x in extra})
    assert len(values) == 4  # K labels, each drawn at some step
    assert sum(values) == pytest.approx(whole - train_only, rel=1e-3)


# ---- roles ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "roles, free",
    [
        ("input", {2}),
        ("template", {1, 3}),
        ("template+input", {1, 2, 3}),
        ("template+input+label", {1, 2, 3, 4}),
        ("label", {4}),
        ("all", {0, 1, 2, 3, 4}),
    ],
)
def test_only_the_named_roles_move(random_base, split, context, roles, free):
    distance, types = moved(random_base, split, {**HP, "roles": roles}), torch.tensor(context.types)
    role = role_of(types)
    expected = torch.tensor([int(r) in free for r in role])
    # the last example's end has no later label to learn from, unless a query follows: all but exact zeros move
    assert (distance[~expected] == 0).all()
    assert (distance[expected] > 0).float().mean() > 0.9


def test_the_instructions_tokens_are_a_role_of_their_own(random_base, split):
    n = len(tokenize(random_base.tokenizer, [split.instruction + split.template.inter])[0])
    frozen = moved(random_base, split, {**HP, "roles": "template+input"}, "cpt_instr")
    alone = moved(random_base, split, {**HP, "roles": "instruction"}, "cpt_instr")
    assert (frozen[:n] == 0).all() and (frozen[n:] > 0).any()
    assert (alone[:n] > 0).all() and (alone[n:] == 0).all()


# ---- projection -----------------------------------------------------------------------------------------------------


# no radius below the one of frozen tokens, 1e-10, but 0: numbers that float32 cannot hold have no direction to compare
RADII = st.lists(st.just(0.0) | st.floats(1e-10, 5), min_size=1, max_size=12)


@given(st.integers(1, 12), st.floats(0.01, 100), RADII, st.integers(0, 99))
def test_one_ball_for_all(P, scale, radii, seed):
    """Inside afterwards, the direction kept, nothing done inside, and it contains all that `project` allows."""
    delta = scale * torch.randn(P, 6, generator=torch.Generator().manual_seed(seed))
    epsilon = torch.tensor((radii * P)[:P])
    together, radius = project_together(delta, epsilon), epsilon.norm()
    assert together.norm() <= radius * (1 + 1e-5) + 1e-6
    if delta.norm() <= radius:
        torch.testing.assert_close(together, delta)
    elif radius > 0:
        torch.testing.assert_close(
            together / together.norm(), delta / delta.norm(), rtol=1e-3, atol=1e-4
        )
    by_token = project(delta, epsilon)
    torch.testing.assert_close(project_together(by_token, epsilon), by_token, rtol=1e-4, atol=1e-6)


def test_projection_together_and_none_in_training(random_base, split, context):
    hp = {**HP, "lr": 0.5}
    types = torch.tensor(context.types)
    unit = random_base.model.get_input_embeddings().weight.norm(dim=1).mean()
    radius = torch.where(types % 4 == 2, 0.5, 0.3) * unit * (types % 4 > 0)
    token, together, free = (
        moved(random_base, split, {**hp, "projection": p}) for p in ("token", "together", "none")
    )
    assert (token <= radius + 1e-4).all()
    assert (together > radius + 1e-2).any() and together.norm() <= radius.norm() + 1e-3
    assert free.norm() > 2 * radius.norm() and (free[types % 4 == 0] == 0).all()


@pytest.mark.parametrize("method", ["pt", "ipt", "pt_instr"])
def test_a_soft_prompt_with_a_ball(random_base, split, method):
    hp = {"lr": 0.5, "epochs": 4}
    if method != "pt_instr":  # its instruction decides
        hp |= {"tokens": 4, "init": "SAMPLE_VOCAB"}
    start, free, held = (
        fit.fit(method, random_base, split, change).prefix[0]
        for change in ({**hp, "lr": 0.0}, hp, {**hp, "epsilon": 0.2, "epsilon_unit": "mean_norm"})
    )
    radius = 0.2 * random_base.model.get_input_embeddings().weight.norm(dim=1).mean()
    assert ((held - start).norm(dim=1) <= radius + 1e-4).all() and (
        (held - start).norm(dim=1) > 0
    ).any()
    assert ((free - start).norm(dim=1) > radius + 0.1).any()


# ---- who sees what --------------------------------------------------------------------------------------------------


def test_every_token_belongs_to_its_example(shots, context):
    expected = [i for i, shot in enumerate(shots) for _ in shot.ids]
    assert examples_of(torch.tensor(context.types), 0).tolist() == expected
    with_instruction = join(shots, [1, 2, 3])
    assert examples_of(torch.tensor(with_instruction.types), 3).tolist() == [-1] * 3 + expected


def test_leave_one_out_hides_a_rows_own_example_and_dropout_its_share(context):
    examples = examples_of(torch.tensor(context.types), 0)
    seen = visible(examples, [2, 0, 7], True, 0.0)
    assert torch.equal(seen[0], examples != 2) and torch.equal(seen[1], examples != 0)
    assert seen[2].all()  # a training row that is no example of the context
    torch.manual_seed(0)
    dropped = visible(examples, [0] * 400, False, 0.1)
    assert 0.08 < 1 - dropped.float().mean() < 0.12 and not torch.equal(dropped[0], dropped[1])
    assert visible(examples, [0, 1], False, 0.0).all()


def batch_of(base, context, rows, chosen):
    """The rows as a trainer sees them."""
    return Job(base, context, rows, {}, None, [], torch.Generator()).batch(chosen)


def plain_loss(base, shots, leave_one_out):
    """Mean cross-entropy of the training labels by plain forwards, the row's own example physically removed."""
    context, total = join(shots), 0.0
    owner = [i for i, shot in enumerate(shots) for _ in shot.ids]
    for i, row in enumerate(shots):
        row = until_label(row)
        kept = [p for p in range(len(context)) if not (leave_one_out and owner[p] == i)]
        ids = [context.ids[p] for p in kept] + row.ids
        places = kept + [
            len(context) + t for t in range(len(row))
        ]  # the others stay where they were
        with torch.no_grad():
            logits = base.model(torch.tensor([ids]), position_ids=torch.tensor([places])).logits[0]
        s = len(kept) + row.types.index(4)
        total += -logits[s - 1].log_softmax(-1)[ids[s]].item() / len(shots)
    return total


@pytest.mark.parametrize("leave_one_out", [True, False])
def test_leave_one_out_is_a_forward_without_the_example(random_base, split, shots, leave_one_out):
    hp = {**HP, "context_weight": 0.0, "leave_one_out": leave_one_out}
    ours = fit.fit("cpt", random_base, split, hp).history[0]
    assert ours == pytest.approx(plain_loss(random_base, shots, leave_one_out), rel=1e-4)
    ct_prompt = fit.fit(
        "ct_prompt", random_base, split, {**CT, "leave_one_out": leave_one_out}
    ).history[0]
    assert ct_prompt == pytest.approx(ours, rel=1e-4)


def test_leave_one_out_gradients_do_not_reach_the_hidden_example(
    random_base, split, shots, context
):
    """One training row at a time: the embeddings, or keys and values, of its twin get no gradient, the others do."""
    owner = torch.tensor([i for i, shot in enumerate(shots) for _ in shot.ids])
    hp = {**HP, **registry.hyperparameters("ct_prompt"), "token_dropout": 0.0}
    for i in range(len(shots)):
        batch = batch_of(random_base, context, [until_label(row) for row in shots], [i])
        embedded, cached = (
            kind(random_base, context, 0, hp) for kind in (TunedContext, TunedCache)
        )
        for tuned, size in (
            (embedded, lambda g: g.norm(dim=1)),
            (cached, lambda g: g.transpose(0, 2).flatten(1).norm(dim=1)),
        ):
            tuned.loss(batch, [i]).backward()
            for weight in tuned.weights:
                assert torch.isfinite(weight.grad).all()
                assert (size(weight.grad)[owner == i] == 0).all()
            assert (size(tuned.weights[-1].grad)[owner != i] > 0).any()


def test_ct_kv_before_training_is_icl_to_the_bit(random_base, split):
    icl = fit.fit("icl", random_base, split).scores(texts_of(split))[0]
    start = fit.fit("ct_kv", random_base, split, {**CT, "lr": 0.0})
    assert torch.equal(start.scores(texts_of(split))[0], icl)
    assert torch.equal(
        start.scores(texts_of(split))[0], icl
    )  # scoring leaves the trained cache as it was
    trained = fit.fit("ct_kv", random_base, split, CT)
    assert not torch.allclose(trained.scores(texts_of(split))[0], icl, atol=1e-3)


def test_ct_kv_continues_from_keys_and_values_of_every_layer(random_base, split, context):
    """The first loss equals a plain forward with the query's attention cut, by a 4-D mask, from its twin."""
    encoded = encode(
        random_base.tokenizer, split.template, [(t, split.verbalizers[c]) for t, c in split.shots]
    )
    owner = torch.tensor([i for i, shot in enumerate(encoded) for _ in shot.ids])
    total, P = 0.0, len(context)
    for i, row in enumerate(encoded):
        row = until_label(row)
        S = P + len(row)
        allowed = torch.ones(S, S).tril().bool()
        allowed[P:, :P] &= owner != i  # the context itself was read whole
        with torch.no_grad():
            mask = torch.where(allowed, 0.0, torch.finfo(torch.float32).min)[None, None]
            logits = random_base.model(
                torch.tensor([context.ids + row.ids]), attention_mask=mask
            ).logits[0]
        s = P + row.types.index(4)
        total += -logits[s - 1].log_softmax(-1)[row.ids[s - P]].item() / len(encoded)
    assert fit.fit("ct_kv", random_base, split, CT).history[0] == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("family", ["gpt2", "bloom"])
def test_other_families_see_the_whole_context_where_nothing_is_hidden(gpt2, family):
    """Embeddings and cache give the loss of one plain forward, and finite gradients with an example hidden."""
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    model = (
        gpt2
        if family == "gpt2"
        else BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2))
    )
    base = BaseModel("tiny", model.eval().requires_grad_(False), None, "tiny")
    shots = [
        Encoded([5, 6, 7, 8, 9], [1, 2, 3, 4, 0]),
        Encoded([5, 10, 11, 7, 12, 9], [1, 2, 2, 3, 4, 0]),
    ]
    context, rows = join(shots), [until_label(shot) for shot in shots]
    with torch.no_grad():
        logits = [
            model(torch.tensor([context.ids + row.ids])).logits[0, -2].log_softmax(-1)
            for row in rows
        ]
    expected = sum(-log_p[row.ids[-1]].item() for log_p, row in zip(logits, rows)) / 2
    hp = {"roles": "all", "projection": "none", "context_weight": 0.0}
    for kind in (TunedContext, TunedCache):
        batch = batch_of(base, context, rows, [0, 1])
        assert kind(base, context, 0, hp).loss(batch, [0, 1]).item() == pytest.approx(
            expected, rel=1e-4
        )
        hidden = kind(base, context, 0, {**hp, "leave_one_out": True})
        hidden.loss(batch, [0, 1]).backward()
        assert all(torch.isfinite(weight.grad).all() for weight in hidden.weights)


@pytest.mark.slow
def test_ct_prompt_moves_everything_and_has_no_ball(random_base, split):
    distance = moved(random_base, split, {**CT, "lr": 0.5, "epochs": 6}, "ct_prompt")
    assert (distance[:-1] > 0).all() and distance.max() > 3


def test_a_ct_kv_classifier_is_saved_and_loaded(tmp_path):
    task = data.load_task("set_cls")
    texts, labels = zip(*task.train[:12])
    fitted = FewShotClassifier("ct_kv", shots=4, hp={"epochs": 2}).fit(texts, labels)
    fitted.save(tmp_path)
    again = FewShotClassifier.load(tmp_path)
    queries = [text for text, _ in task.test[:10]]
    np.testing.assert_array_equal(again.predict_proba(queries), fitted.predict_proba(queries))


@pytest.mark.parametrize(
    "method, hp, message",
    [
        ("cpt", {"roles": "inputs"}, "Unknown role 'inputs'. Did you mean 'input'"),
        ("cpt", {"projection": "tokenwise"}, '"token", "together" or "none"; got .tokenwise.'),
        ("cpt", {"context_labels": "two"}, '"all" or "one"; got .two.'),
        (
            "ct_kv",
            {"leave_one": True},
            "Unknown hyper-parameter 'leave_one'. Did you mean 'leave_one_out'",
        ),
    ],
)
def test_wrong_names_are_explained(random_base, split, method, hp, message):
    with pytest.raises(MiniCPTError, match=message):
        fit.fit(method, random_base, split, {**(HP if method == "cpt" else CT), **hp})


def test_an_unknown_role_does_not_pass_as_part_of_a_list():
    with pytest.raises(MiniCPTError, match="Unknown role ''"):
        chosen_roles("input+", torch.tensor([1, 2, 3, 4, SEPARATOR]), 0)


# ---- the table ------------------------------------------------------------------------------------------------------


def test_every_variant_is_a_valid_cell_and_changes_what_it_is_compared_with():
    for model in ("micro", "some/hub-model"):
        known = ablations.variants(model)
        for name, v in known.items():
            hp = registry.hyperparameters(v.method, model, v.hp)
            other = known[v.against]
            same = (v.method, hp) == (
                other.method,
                registry.hyperparameters(other.method, model, other.hp),
            )
            assert name == "cpt" or not same or model != "micro", name
            assert v.meaning and v.against in known
    keys = {cells[0].key() for cells in ablations.grid((), ["trec"], [4], [0]).values()}
    assert len(keys) == len(ablations.variants())


def test_variants_change_no_existing_cell():
    """The options live in overrides: nothing was added to what CPT, PT and the others are."""
    for method in ("cpt", "cpt_instr", "pt", "ipt", "lora", "cpt_paper_eps", "cpt_train_label"):
        assert not OPTIONS.keys() & registry.hyperparameters(method).keys()


def fake(name, seed, accuracy, dataset="trec", split="s"):
    config = {"model": "micro", "dataset": dataset, "labels": "canonical", "shots": 4, "seed": seed}
    return {"config": config, "accuracy": accuracy, "split_sha256": f"{split}{dataset}{seed}"}


def test_compare_pairs_seeds_and_adjusts_for_many_comparisons():
    base, two = [0.5, 0.6, 0.4, 0.7], ("trec", "sst2")
    results = {
        "cpt": [fake("cpt", s, a, d) for s, a in enumerate(base) for d in two],
        "train_label": [
            fake("t", s, a + 0.1 + 0.001 * s, d) for s, a in enumerate(base) for d in two
        ],
        "icl": [fake("i", s, a + (-1) ** s * 0.1, d) for s, a in enumerate(base) for d in two],
        "loo_train_label": [fake("l", s, a, d) for s, a in enumerate(base) for d in two],
    }
    table = ablations.compare(results).set_index("variant")
    assert list(table.index) == ["cpt", "icl", "train_label", "loo_train_label"]  # reading order
    row = table.loc["train_label"]
    assert row.difference == pytest.approx(10.15) and row.ci_low > 9.5 and row.n == 4
    assert table.loc["loo_train_label"].difference == 0 and table.loc["loo_train_label"].p == 1
    assert (
        table.loc["loo_train_label"].gap == pytest.approx(-10.15)
        and table.loc["loo_train_label"].against == "train_label"
    )
    assert row.holm == pytest.approx(3 * row.p) and np.isnan(table.loc["cpt"].holm)
    lower, higher, lone, rest = ablations.reading(table.reset_index())
    assert (
        "train_label (+10.1" in higher.replace("10.2", "10.1")
        and "none" in lower
        and "none" in lone
        and "icl" in rest
    )
    results["icl"][0] = fake("i", 0, 0.5, "trec", split="other")
    with pytest.raises(MiniCPTError, match="icl saw another split"):
        ablations.compare(results)


def test_holm_by_hand():
    adjusted = statistics.holm(pd.Series([0.04, 0.01, np.nan, 0.03]))
    assert (
        adjusted.round(6).tolist()[:2] == [0.06, 0.03]
        and np.isnan(adjusted[2])
        and adjusted[3] == pytest.approx(0.06)
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Four variants on Set Classification, two seeds, in a store."""
    store = Store(tmp_path_factory.mktemp("ablations"))
    cells = ablations.grid(["icl", "loo_train_label"], ["set_cls"], [4], range(2), n_test=20)
    assert run_grid([cell for group in cells.values() for cell in group], store) == []
    return cells, store


@pytest.mark.slow
def test_the_baselines_of_a_variant_come_along(tiny):
    assert list(tiny[0]) == ["cpt", "icl", "train_label", "loo_train_label"]
    with pytest.raises(MiniCPTError, match="Unknown variant 'lo'"):
        ablations.grid(["lo"], ["trec"])


@pytest.mark.slow
def test_incomplete_variants_are_left_out_and_without_cpt_nothing_can_be_said(tiny, tmp_path):
    cells, store = tiny
    assert set(ablations.collect(cells, store)) == set(cells)
    more = ablations.grid(["icl", "train_label"], ["set_cls"], [4], range(2), n_test=20)
    more["icl"] = more["icl"] + [dataclasses.replace(more["icl"][0], seed=9)]
    assert set(ablations.collect(more, store)) == {"cpt", "train_label"}
    with pytest.raises(MiniCPTError, match="Plain CPT is incomplete"):
        ablations.collect(cells, Store(tmp_path))


@pytest.mark.slow
def test_copy_probe_by_hand(tiny):
    cells, store = tiny
    results = ablations.collect(cells, store)
    probe = ablations.copy_probe(results).set_index("variant")
    expected = {"all": [], "shared": [], "new": [], "copy": []}
    for result in results["icl"]:
        split = data.make_split(data.load_task("set_cls"), 4, result["config"]["seed"], 20)
        words = {word for text, _ in split.shots for word in text.split()}
        hits = [
            max(range(4), key=row.__getitem__) == t
            for row, t in zip(result["log_scores"], result["truth"])
        ]
        shares = [bool(words & set(text.split())) for text, _ in split.queries]
        expected["all"].append(np.mean(hits))
        for part, flag in (("shared", True), ("new", False)):
            expected[part].append(np.mean([h for h, s in zip(hits, shares) if s == flag]))
        copied = []
        for text, truth in split.queries:
            n = [len(set(text.split()) & set(shot.split())) for shot, _ in split.shots]
            best = [label for (_, label), m in zip(split.shots, n) if m == max(n)]
            copied.append(best.count(truth) / len(best))
        expected["copy"].append(np.mean(copied))
    for part in ("all", "shared", "new"):
        assert probe.loc["icl", part] == pytest.approx(100 * np.mean(expected[part]))
    assert probe.loc["copy", "all"] == pytest.approx(100 * np.mean(expected["copy"]))
    other_task = [
        {**r, "config": {**r["config"], "task_sha256": "another"}} for r in results["cpt"]
    ]
    assert ablations.copy_probe({"cpt": other_task}).empty
    losses = ablations.twin_losses(results)
    assert set(losses) == {"twin visible", "twin hidden", "a query"}
    assert losses["twin visible"] < losses["twin hidden"]


@pytest.mark.slow
def test_results_from_a_csv_are_compared_and_left_out_where_scores_are_asked_for(tiny, tmp_path):
    """`Store.refill` brings accuracies, neither scores nor a history."""
    cells, store = tiny
    results = ablations.collect(cells, store)
    lacking = {"log_scores", "truth", "history"}
    bare = {key: value for key, value in results["icl"][0].items() if key not in lacking}
    refilled = results | {"icl": [bare, results["icl"][1]]}
    pd.testing.assert_frame_equal(ablations.compare(refilled), ablations.compare(results))
    assert set(ablations.copy_probe(refilled).variant) == set(results) - {"icl"}
    assert set(ablations.twin_losses(refilled)) == {"twin visible", "twin hidden"}
    assert ablations.write(refilled, tmp_path, "Ablations")["ablations.md"].exists()


@pytest.mark.slow
def test_files_and_figure(tiny, tmp_path):
    cells, store = tiny
    paths = ablations.write(ablations.collect(cells, store), tmp_path, "Ablations")
    tables = {"ablations.csv", "ablations.md", "cells.csv", "copy_probe.csv"}
    assert set(paths) == {*tables, "figure"} and all(p.stat().st_size for p in paths.values())
    text = paths["ablations.md"].read_text()
    assert (
        "| leave-one-out | loo_train_label |" in text
        and "Copy probe" in text
        and "twin hidden" in text
    )
    assert list(pd.read_csv(paths["ablations.csv"]).variant) == list(cells)


@pytest.mark.slow
def test_the_list_of_cells_holds_the_methods_as_chosen_and_none_of_their_variants(tiny, tmp_path):
    cells, store = tiny
    paths = ablations.write(ablations.collect(cells, store), tmp_path, "Ablations")
    plain = [cell for name in cells if not ablations.variants()[name].hp for cell in cells[name]]
    assert plain and set(pd.read_csv(paths["cells.csv"]).key) == {cell.key() for cell in plain}


@pytest.mark.slow
def test_the_command_resumes_and_explains_wrong_names(tmp_path, monkeypatch, capsys):
    def command(*args):
        return subprocess.run(
            [
                sys.executable,
                "-m",
                "minicpt",
                "ablations",
                "--datasets",
                "trec",
                "--seeds",
                "2",
                "--n-test",
                "8",
                "--out",
                str(tmp_path),
                *args,
            ],
            capture_output=True,
            text=True,
            cwd=ROOT,
        )

    first = command("--variants", "icl", "epsilon_3")
    assert first.returncode == 0, first.stderr
    assert (
        "6 cells, 0 already in" in first.stdout and "Not separable from plain CPT" in first.stdout
    )
    more = command("--variants", "icl", "epsilon_3", "decay_none")
    assert "2 to compute" in more.stdout
    monkeypatch.setattr(sys, "argv", ["minicpt", "ablations", "--variants", "epsilon_2"])
    assert main() == 2 and "Unknown variant 'epsilon_2'" in capsys.readouterr().err
