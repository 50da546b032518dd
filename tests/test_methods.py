"""Scoring against a plain forward, and what each method promises, on a random model."""

import copy
import dataclasses
import math
import warnings

import pytest
import torch
from by_hand import join
from transformers import OpenAIGPTConfig, OpenAIGPTLMHeadModel

from minicpt import data
from minicpt.core.templates import (
    Encoded,
    Template,
    encode,
    tokenize,
)
from minicpt.core.train import Recipe, train
from minicpt.engine.prefix import tokens_of
from minicpt.engine.scores import (
    accuracy,
    calibrate,
    check_candidates,
    label_scores,
    label_token_scores,
    reduce_tokens,
)
from minicpt.errors import MiniCPTError, TrainingDiverged
from minicpt.methods import fit, registry, trainers
from minicpt.methods.prepare import cut_texts, fit_text_length, prepare, until_label

HP = {
    "lr": 0.02,
    "epochs": 2,
    "batch_size": 0,
    "tokens": 4,
    "init": "SAMPLE_VOCAB",
    "rank": 2,
    "alpha": 4,
    "bottleneck": 8,
    "activation_lr": 1e-4,
    "epsilon": 0.5,
    "epsilon_format": 0.5,
    "epsilon_unit": "mean_norm",
    "decay": 0.95,
    "context_weight": 1.0,
}
# HP holds what all methods read together
pytestmark = pytest.mark.filterwarnings("ignore:.* does not read .*, which changes nothing")
TRAINED = [m for m, spec in registry.METHODS.items() if spec.trains]


@pytest.fixture(scope="module")
def split():
    return data.make_split(data.load_task("trec"), 4, 0, n_test=12)


def texts_of(split):
    return [text for text, _ in split.queries]


# ---- scoring --------------------------------------------------------------------------------------------------------


def plain_scores(model, prefix_ids, queries, candidates, how):
    """One forward per (query, label), no cache, no padding: the oracle."""
    scores = torch.zeros(len(queries), len(candidates))
    for n, query in enumerate(queries):
        for c, candidate in enumerate(candidates):
            ids = prefix_ids + query.ids + candidate
            with torch.no_grad():
                log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            first = len(ids) - len(candidate)
            tokens = [log_p[first + t - 1, token].item() for t, token in enumerate(candidate)]
            scores[n, c] = {
                "mean": sum(tokens) / len(tokens),
                "sum": sum(tokens),
                "first": tokens[0],
            }[how]
    return scores


@pytest.mark.parametrize("how", ["mean", "sum", "first"])
@pytest.mark.parametrize("prefix_ids", [[], [5, 6, 7, 8, 9]])
@pytest.mark.parametrize("fixture", ["gpt2", "bloom", "opt"])
def test_scores_equal_a_plain_forward_for_labels_of_any_length(request, fixture, prefix_ids, how):
    model = request.getfixturevalue(fixture)
    queries = [Encoded(list(range(10, 10 + n)), [2] * n) for n in (3, 7, 4, 1)]
    candidates = [[1], [2, 3], [4, 3] if how == "first" else [2, 4], [5, 6, 7]]
    prefix = model.get_input_embeddings()(torch.tensor([prefix_ids])) if prefix_ids else None
    expected = plain_scores(model, prefix_ids, queries, candidates, how)
    for batch_size in (1, 3, 64):  # a score never depends on its batch
        ours = label_scores(model, prefix, queries, candidates, how, batch_size)
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def bloom():
    from transformers import BloomConfig, BloomForCausalLM

    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=60, hidden_size=16, n_layer=2, n_head=2)).eval()


@pytest.fixture(scope="module")
def opt():
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    config = OPTConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        ffn_dim=32,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    )
    return OPTForCausalLM(config).eval()


def test_first_tokens_that_coincide_are_refused_where_only_they_count(gpt2):
    query, candidates = [Encoded([1], [2])], [[5], [5, 6]]
    assert label_scores(gpt2, None, query, candidates, "sum").shape == (1, 2)
    with pytest.raises(MiniCPTError, match="same first token"):
        label_scores(gpt2, None, query, candidates, "first")


def test_all_label_scores_come_from_one_pass(gpt2):
    queries, candidates = [Encoded([8, 9], [2, 2]), Encoded([7], [2])], [[1], [2, 3], [4, 5, 6]]
    tokens = label_token_scores(gpt2, None, queries, candidates)
    assert [t.shape for t in tokens] == [(2, 1), (2, 2), (2, 3)]
    for how in ("mean", "sum", "first"):
        expected = plain_scores(gpt2, [], queries, candidates, how)
        torch.testing.assert_close(reduce_tokens(tokens, how), expected, rtol=1e-4, atol=1e-5)


def test_scores_that_are_not_finite_are_an_error(gpt2):
    broken = copy.deepcopy(gpt2)
    broken.lm_head.weight = torch.nn.Parameter(broken.lm_head.weight * torch.nan)
    with pytest.raises(MiniCPTError, match="float32 and gave scores that are not finite"):
        label_scores(broken, None, [Encoded([1], [2])], [[1], [2]])


def test_calibration_undoes_a_constant_bias():
    """If content-free inputs prefer a label as much as the queries do, calibration removes just that."""
    fair = torch.log(torch.tensor([[0.6, 0.4], [0.3, 0.7]]))
    bias = torch.log(torch.tensor([0.8, 0.2]))
    calibrated = calibrate(fair + bias, bias[None])
    torch.testing.assert_close(calibrated.softmax(-1), fair.softmax(-1))
    assert accuracy(calibrated, [0, 1]) == 1.0 and accuracy(fair + bias, [0, 1]) == 0.5


def test_labels_that_cannot_be_told_apart():
    with pytest.raises(MiniCPTError, match="same tokens"):
        check_candidates({"a": [1, 2], "b": [1, 2]})
    with pytest.raises(MiniCPTError, match="no token"):
        check_candidates({"": []})


def test_unknown_label_score(gpt2):
    with pytest.raises(MiniCPTError, match="Unknown label score 'men'. Did you mean 'mean'"):
        label_scores(gpt2, None, [Encoded([1], [2])], [[1], [2]], "men")


# ---- methods --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", registry.METHODS)
def test_every_method_scores_every_query_and_leaves_the_base_model_as_it_was(
    random_base, split, method
):
    before = {k: v.clone() for k, v in random_base.model.state_dict().items()}
    state = torch.random.get_rng_state()
    predictor = fit.fit(method, random_base, split, HP)
    raw, calibrated = predictor.scores(texts_of(split))
    predictor.close()
    assert raw.shape == calibrated.shape == (12, 6)
    assert torch.isfinite(raw).all() and torch.isfinite(calibrated).all()
    assert set(predictor.predict(texts_of(split))) <= set(split.classes)
    after = random_base.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    assert not any(p.requires_grad for p in random_base.model.parameters())
    assert torch.equal(state, torch.random.get_rng_state())


@pytest.mark.slow
@pytest.mark.parametrize("method", TRAINED)
def test_training_lowers_the_loss_and_is_reproducible(random_base, split, method):
    def run():
        predictor = fit.fit(method, random_base, split, {**HP, "epochs": 8})
        scores = predictor.scores(texts_of(split))[0]
        predictor.close()
        return predictor.history, scores

    (history, scores), (again, scores_again) = run(), run()
    assert history[-1] < history[0]
    assert history == again and torch.equal(scores, scores_again)


def test_icl_is_the_written_out_prompt(random_base, split):
    """ICL's scores are those of the text that a person would type."""
    predictor = fit.fit("icl", random_base, split)
    t = split.template
    prompt = "".join(
        t.input.format(x) + t.intra + t.output.format(split.verbalizers[y]) + t.inter
        for x, y in split.shots
    )
    text, _ = split.queries[0]
    whole = prompt + t.input.format(text) + t.intra + t.output.split("{}")[0].rstrip()
    ids = random_base.tokenizer(whole, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        log_p = random_base.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    words = [random_base.tokenizer(" " + split.verbalizers[c])["input_ids"] for c in split.classes]
    assert all(len(w) == 1 for w in words)
    expected = torch.stack([log_p[w[0]] for w in words])
    torch.testing.assert_close(predictor.scores([text])[0][0], expected, rtol=1e-4, atol=1e-4)


def test_cpt_with_no_room_to_move_is_icl(random_base, split):
    """ "As epsilon goes to 0, CPT becomes ICL" (paper 3.2.2)."""
    icl = fit.fit("icl", random_base, split).scores(texts_of(split))[0]
    tiny = fit.fit("cpt", random_base, split, {**HP, "epsilon": 0.0, "epsilon_format": 0.0})
    torch.testing.assert_close(tiny.scores(texts_of(split))[0], icl)
    moved = fit.fit("cpt", random_base, split, HP).scores(texts_of(split))[0]
    assert not torch.allclose(moved, icl, atol=1e-3)


def test_cpt_moves_tokens_inside_their_balls_and_labels_not_at_all(random_base, split):
    start = fit.fit("icl", random_base, split).prefix[0]
    predictor = fit.fit(
        "cpt", random_base, split, {**HP, "lr": 1.0, "epsilon": 0.3, "epsilon_format": 0.1}
    )
    moved = (predictor.prefix[0] - start).norm(dim=1)
    shots = encode(
        random_base.tokenizer, split.template, [(t, split.verbalizers[c]) for t, c in split.shots]
    )
    types = torch.tensor(join(shots).types)
    unit = random_base.model.get_input_embeddings().weight.norm(dim=1).mean()
    assert (moved[(types % 4 == 0)] == 0).all()  # separators and labels
    assert (moved[types % 4 == 2] <= 0.3 * unit + 1e-4).all() and (
        moved[types % 4 == 2] > 0.2 * unit
    ).any()
    assert (moved[(types % 4 == 1) | (types % 4 == 3)] <= 0.1 * unit + 1e-4).all()


def test_cpt_loss_at_the_start_is_the_papers_sum(random_base, split):
    """First loss = mean over training examples of [context labels with decay + own label], by plain forwards."""
    predictor = fit.fit("cpt", random_base, split, {**HP, "epochs": 1})
    shots = encode(
        random_base.tokenizer, split.template, [(t, split.verbalizers[c]) for t, c in split.shots]
    )
    K, total = len(shots), 0.0
    for row in shots:
        sequence = join([*shots, row])
        with torch.no_grad():
            log_p = random_base.model(torch.tensor([sequence.ids])).logits[0].log_softmax(-1)
        for k in range(1, K + 2):
            s = sequence.types.index(4 * k)  # labels are one token here
            total += 0.95 ** (K + 1 - k) * -log_p[s - 1, sequence.ids[s]].item() / K
    assert predictor.history[0] == pytest.approx(total, rel=1e-4)


def test_instruction_stands_where_we_say(random_base, split):
    ids = tokenize(random_base.tokenizer, [split.instruction + split.template.inter])[0]
    embedded = random_base.embed(ids)[0]
    zero_lr = {**HP, "lr": 0.0}
    for method in ("pt_instr", "ipt_instr", "cpt_instr"):
        prefix = fit.fit(method, random_base, split, zero_lr).prefix[0]
        torch.testing.assert_close(prefix[: len(ids)], embedded)
    assert len(fit.fit("pt_instr", random_base, split, zero_lr).prefix[0]) == len(ids)


@pytest.mark.parametrize(
    "method, message", [("lora", "PEFT puts it by default"), ("ct_kv", "does not go on from them")]
)
def test_a_method_that_an_architecture_cannot_have_is_refused(random_base, split, method, message):
    config = OpenAIGPTConfig(vocab_size=len(random_base.tokenizer), n_embd=8, n_layer=1, n_head=1)
    base = dataclasses.replace(random_base, model=OpenAIGPTLMHeadModel(config).eval())
    with pytest.raises(MiniCPTError, match=message):
        fit.fit(method, base, split, HP)


# ---- long texts, bad input ------------------------------------------------------------------------------------------


def test_long_texts_are_cut_to_fit_and_it_is_said(random_base):
    task = data.load_task("trec")
    shots = [(("why " * 300).strip(), "entity"), ("where is it", "location")]
    split = data.Split(
        "trec",
        shots,
        [(("who " * 300).strip(), "human")],
        task.verbalizers,
        task.templates[0],
        "",
        0,
    )
    with pytest.warns(UserWarning, match="2 of 3 texts were cut to .* labels are never cut"):
        predictor = fit.fit("icl", random_base, split)
    with pytest.warns(UserWarning, match="1 of 1 texts were cut"):
        (query,) = predictor.encode_queries([split.queries[0][0]])
    assert predictor.prefix.shape[1] + len(query) + 1 <= 512
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        short = fit.fit("icl", random_base, split, max_length=60)
        (query,) = short.encode_queries([split.queries[0][0]])
    assert short.prefix.shape[1] + len(query) + 1 <= 60
    label = tokenize(random_base.tokenizer, [" entity"])[0]
    embedded = random_base.embed(label)[0, 0]
    assert any(torch.equal(row, embedded) for row in short.prefix[0])  # the label is still there
    with pytest.raises(MiniCPTError, match="does not fit"):
        fit.fit("icl", random_base, split, max_length=10)


@pytest.mark.parametrize("method", ["zero", "icl", "pt", "cpt"])
def test_a_cap_of_text_length_is_as_if_the_texts_had_been_short(random_base, split, method):
    """Texts, query and shot, lose their end before anything is built, silently: it was asked for."""
    tokenizer, template = random_base.tokenizer, split.template

    def cut(rows):
        return [
            (text, c) for (text, _), (_, c) in zip(cut_texts(tokenizer, template, rows, 3), rows)
        ]

    short = dataclasses.replace(split, shots=cut(split.shots), queries=cut(split.queries))
    assert short.shots != split.shots and short.queries != split.queries
    hp = {"lr": 0.02, "epochs": 2}
    expected = fit.fit(method, random_base, short, hp)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        predictor = fit.fit(method, random_base, split, hp, text_tokens=3)
        scores, _ = predictor.scores(texts_of(split))
    assert predictor.history == expected.history
    assert torch.equal(scores, expected.scores(texts_of(short))[0])
    with pytest.raises(MiniCPTError, match="at least 1, or None; got 0"):
        fit.fit(method, random_base, split, HP, text_tokens=0)


def test_cut_length_is_the_longest_that_fits():
    shots = [Encoded([0] * n, [2] * (n - 2) + [3, 4]) for n in (5, 20, 9)]
    queries = [Encoded([0] * n, [2] * (n - 1) + [3]) for n in (3, 30)]
    for limit in range(13, 64):
        cap = fit_text_length(2, shots, queries, limit)

        def total(cap):
            return (
                2
                + sum(min(n - 2, cap) + 2 for n in (5, 20, 9))
                + max(min(n - 1, cap) + 1 for n in (3, 30))
            )

        assert total(math.inf) <= limit if cap is None else total(cap) <= limit < total(cap + 1)


def test_a_training_row_ends_with_its_label():
    row = Encoded([5, 6, 7, 8, 9, 10], [1, 2, 3, 4, 4, 0])
    assert until_label(row) == Encoded([5, 6, 7, 8, 9], [1, 2, 3, 4, 4])


def test_every_text_is_tokenised_once(random_base, split):
    """One call for the label words, one for all rows, and for a context two that do not grow with the rows."""
    calls = []

    class Counting:
        is_fast = True

        def __call__(self, strings, **kwargs):
            calls.append(len(strings))
            return random_base.tokenizer(strings, **kwargs)

    base = dataclasses.replace(random_base, tokenizer=Counting())
    rows = len(split.queries) + len(split.shots)
    for method in ("zero", "icl", "cpt", "cpt_instr"):
        calls.clear()
        prepare(method, base, split, HP, "sum", None, [], 64)
        assert calls.count(rows) == 1
        assert sum(calls) == rows + len(split.classes) + (2 if method != "zero" else 0)


@pytest.mark.parametrize("method", ["zero", "icl", "pt", "ipt_instr", "iapt", "cpt_instr", "ct_kv"])
def test_what_stands_before_a_query_is_counted_and_its_room_is_what_is_left(
    random_base, split, method
):
    predictor = fit.fit(method, random_base, split, HP, max_length=200)
    held = 0 if predictor.prefix is None else tokens_of(predictor.prefix)
    assert predictor.prefix_length == held + (HP["tokens"] if method == "iapt" else 0)
    with pytest.warns(UserWarning, match="1 of 2 texts were cut .* fits into 200 tokens"):
        short, long = predictor.encode_queries(["why", "banana " * 300])
    assert len(short) < 20
    assert predictor.prefix_length + len(long) + max(map(len, predictor.candidates)) <= 200
    assert predictor.prefix_length + len(long) + max(map(len, predictor.candidates)) > 195


def test_a_text_longer_than_the_model_is_cut_and_the_others_do_not_notice(random_base, split):
    predictor = fit.fit("icl", random_base, split)
    texts = texts_of(split)[:2]
    expected, _ = predictor.scores(texts)
    with pytest.warns(UserWarning, match="were cut at their end") as caught:
        together, _ = predictor.scores([*texts, "banana " * 900])
    assert caught[0].filename == __file__  # it points to who asked, not into the library
    torch.testing.assert_close(together[:2], expected)
    assert torch.isfinite(together).all()
    with pytest.warns(UserWarning, match="were cut to") as caught:
        fit.fit("icl", random_base, split, max_length=50)
    assert caught[0].filename == __file__


def test_zero_shot_needs_no_query_to_be_fitted(random_base, split):
    bare = data.Split("t", [], [], split.verbalizers, split.template, "", 0)
    ours = fit.fit("zero", random_base, bare).scores(texts_of(split))[0]
    assert torch.equal(ours, fit.fit("zero", random_base, split).scores(texts_of(split))[0])


def test_labels_that_the_chosen_score_cannot_tell_apart_are_refused_before_training(random_base):
    words = {"a": "who is", "b": "who was"}
    split = data.Split("t", [("why", "a"), ("who", "b")], [], words, Template(), "", 0)
    fit.fit("icl", random_base, split)
    with pytest.raises(MiniCPTError, match="have the same first token"):
        fit.fit("icl", random_base, split, label_score="first")
    with pytest.raises(MiniCPTError, match="Unknown label score 'men'. Did you mean 'mean'"):
        fit.fit("cpt", random_base, split, label_score="men")


def test_unknown_method_and_missing_instruction(random_base, split):
    with pytest.raises(MiniCPTError, match="Unknown method 'ctp'. Did you mean 'cpt'"):
        fit.fit("ctp", random_base, split)
    bare = data.Split("t", split.shots, split.queries, split.verbalizers, split.template, "", 0)
    with pytest.raises(MiniCPTError, match="needs an instruction"):
        fit.fit("cpt_instr", random_base, bare, HP)


def test_divergence_stops_within_ten_steps_names_the_step_and_takes_lora_off(
    random_base, split, monkeypatch
):
    calls = []

    def loss_of(chosen):
        calls.append(1)
        return torch.tensor(float("nan") if len(calls) == 13 else 1.0, requires_grad=True)

    recipe = Recipe(0.1, 25)
    with pytest.raises(TrainingDiverged, match="nan at step 13 of 25"):
        train(loss_of, [torch.zeros(1, requires_grad=True)], 4, recipe, torch.Generator())
    assert len(calls) == 20  # the losses are read every ten steps
    monkeypatch.setattr(
        trainers, "label_loss", lambda *_, **__: torch.tensor(math.inf, requires_grad=True)
    )
    with pytest.raises(TrainingDiverged, match="inf at step 1"):
        fit.fit("lora", random_base, split, HP)
    assert not any("lora" in name for name, _ in random_base.model.named_modules())


def test_epochs_pass_once_over_all_rows():
    seen = []

    def loss_of(chosen):
        seen.append(chosen)
        return torch.ones((), requires_grad=True) * 1.0

    train(
        loss_of,
        [torch.zeros(1, requires_grad=True)],
        5,
        Recipe(0.1, 3, batch_size=2),
        torch.Generator(),
    )
    assert [len(s) for s in seen] == [2, 2, 1] * 3
    for epoch in range(3):
        assert sorted(i for s in seen[3 * epoch : 3 * epoch + 3] for i in s) == list(range(5))


@pytest.mark.parametrize(
    "method, unread",
    [
        ("pt", "decay"),
        ("lora", "epsilon"),
        ("pt_instr", "tokens"),
        ("cpt", "rank"),
        ("ct_kv", "roles"),
    ],
)
def test_a_hyperparameter_that_a_method_does_not_read_is_named(random_base, split, method, unread):
    values = {**HP, "roles": "input"}
    with pytest.warns(UserWarning, match=f"{method} does not read {unread}, which changes nothing"):
        fit.fit(method, random_base, split, {"epochs": 1, unread: values[unread]})


@pytest.mark.parametrize("place", ["micro", "hub"])
def test_methods_read_the_hyperparameters_that_were_chosen_for_them(place, recwarn):
    for method, values in registry.hyperparameter_file()[place].items():
        if method in registry.METHODS:
            registry.warn_of_unread(method, values)
    assert not recwarn.list


@pytest.mark.parametrize(
    "method, hp, missing",
    [
        ("ct_prompt", {"projection": "token"}, "epsilon_unit"),
        ("ct_prompt", {"context_weight": 1.0}, "decay"),
        ("pt", {"epsilon": 0.5}, "epsilon_unit"),
    ],
)
def test_a_hyperparameter_that_another_one_needs_is_asked_for(
    random_base, split, method, hp, missing
):
    with pytest.raises(MiniCPTError, match=f"'{missing}' is missing: another one .* Give both"):
        fit.fit(method, random_base, split, {"epochs": 1, **hp})
