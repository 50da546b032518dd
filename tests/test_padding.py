"""Padding takes no position, and a filled cache no second prompt; the oracle: plain transformers on the bare row."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import ARCHITECTURES, COMMON, CONTEXT, V, base
from test_prefix import always_share, weight_of, wrap  # noqa: F401

import minicpt
from minicpt.dropin.iapt import IAPTModel
from minicpt.errors import MiniCPTError

NAMES = sorted({*ARCHITECTURES, "XGLM"})
CANNOT = {
    "it counts padding as text": base("Mpt"),
    "in its sliding window": transformers.MistralForCausalLM(
        transformers.MistralConfig(**COMMON | dict(sliding_window=12))
    ).eval(),
}


def prompt_of(wrapped):
    return wrapped.get_prompt(1).detach()[0].float()  # (P, D)


def bare(model, prompt, ids, visible=None):
    """Logits (P+T, V) of one row without padding, by the base model alone."""
    embeds = torch.cat((prompt, model.get_input_embeddings()(torch.tensor(ids))))
    mask = torch.ones(1, len(embeds))
    mask[0, : len(prompt)] = torch.tensor(visible or [1] * len(prompt))
    with torch.no_grad():
        return model(inputs_embeds=embeds[None], attention_mask=mask).logits[0]


def padded(rows, sides):
    """Rows of ids, each padded with 7s to a common length with its padding on its side of ("left", "right")."""
    T = max(map(len, rows))
    ids, mask = torch.full((len(rows), T), 7), torch.zeros(len(rows), T, dtype=torch.long)
    for n, (row, side) in enumerate(zip(rows, sides)):
        where = slice(T - len(row), T) if side == "left" else slice(0, len(row))
        ids[n, where], mask[n, where] = torch.tensor(row), 1
    return dict(input_ids=ids, attention_mask=mask)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


ROWS = st.lists(st.lists(st.integers(1, V - 1), min_size=1, max_size=6), min_size=1, max_size=4)
SIDES = st.lists(st.sampled_from(["left", "right"]), min_size=4, max_size=4)
KIND = st.sampled_from(["cpt", "pt"])


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(NAMES), KIND, ROWS, SIDES, st.booleans(), st.booleans(), st.booleans())
def test_logits_do_not_depend_on_padding(name, kind, rows, sides, shared, grad, hole):
    visible = [1, 0, *[1] * 7] if hole and kind == "cpt" else None
    wrapped = wrap(copy.deepcopy(base(name)), kind, **{"cpt_mask": visible} if visible else {})
    wrapped.shared_prefix, prompt = shared, prompt_of(wrapped)
    batch, P = padded(rows, sides), len(prompt)
    with torch.set_grad_enabled(grad):
        logits = wrapped(**batch).logits.detach()
    for row, mask, ids in zip(logits, batch["attention_mask"], rows):
        expected = bare(base(name), prompt, ids, visible)
        close(row[P:][mask.bool()], expected[P:])


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(NAMES), KIND, ROWS, SIDES, st.booleans())
def test_the_loss_does_not_depend_on_padding(name, kind, rows, sides, shared):
    """Labels are all tokens: the first of a row comes right after the prompt, whatever padding is between them."""
    wrapped = wrap(copy.deepcopy(base(name)), kind)
    wrapped.shared_prefix, prompt = shared, prompt_of(wrapped)
    batch, P = padded(rows, sides), len(prompt)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="No input_type_mask")
        loss = wrapped(**batch, labels=labels).loss
    terms = []
    for ids in rows:
        log_p = bare(base(name), prompt, ids).log_softmax(-1)
        targets = [*[-1] * P, *ids]
        if kind == "cpt":  # its context's labels count, too
            targets[:P] = [i if t in (4, 8) else -1 for i, t in zip(*CONTEXT)]
        terms += [-log_p[s - 1, i] for s, i in enumerate(targets) if s and i >= 0]
    close(loss.detach(), torch.stack(terms).mean())
    loss.backward()
    alone = wrap(copy.deepcopy(base(name)), kind)
    for ids in rows:
        share = (len(ids) + 2 * (kind == "cpt")) / len(terms)
        row = dict(input_ids=torch.tensor([ids]), labels=torch.tensor([ids]))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="No input_type_mask")
            (share * alone(**row).loss).backward()
    close(weight_of(wrapped).grad, weight_of(alone).grad)


def test_peft_counts_the_padding():
    """The difference that docs/peft.md lists: by how much PEFT's logits of a row move when it is padded."""
    rows, moves = [[5, 9, 11], [1] * 12], []
    for lib in (peft, minicpt):
        torch.manual_seed(1)
        config = lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        model = lib.get_peft_model(copy.deepcopy(base("Llama")), config)
        alone = model(**padded(rows[:1], ["left"])).logits[0, -1]
        moves.append((model(**padded(rows, ["left"] * 2)).logits[0, -1] - alone).abs().max())
    assert moves[0] > 0.1 and moves[1] < 1e-4


# ---- generation -----------------------------------------------------------------------------------------------------


def greedy(model, prompt, ids, n, visible=None):
    """The next n tokens by repeated plain forward passes without a cache."""
    ids = list(ids)
    for _ in range(n):
        ids.append(int(bare(model, prompt, ids, visible)[-1].argmax()))
    return ids[-n:]


PLAIN = dict(do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.mark.parametrize("hole", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_generation_does_not_depend_on_padding(name, hole):
    visible = [1, 0, *[1] * 7] if hole else [1] * 9
    wrapped = wrap(copy.deepcopy(base(name)), "cpt", cpt_mask=visible).eval()
    rows = [[5, 9, 11], [3, 8, 1, 2, 44, 31], [17]]
    batch = padded(rows, ["left"] * 3)
    expected = [greedy(base(name), prompt_of(wrapped), row, 4, visible) for row in rows]
    for shared in (True, False):
        wrapped.shared_prefix = shared
        for options in ({}, {"use_cache": False}):
            output = wrapped.generate(**batch, max_new_tokens=4, **PLAIN, **options)
            assert output[:, 6:].tolist() == expected


@settings(max_examples=10, deadline=None)
@given(st.sampled_from(NAMES), KIND, ROWS, st.sampled_from([{}, {"num_beams": 3}]))
def test_a_batch_generates_what_its_rows_do(name, kind, rows, how):
    wrapped = wrap(copy.deepcopy(base(name)), kind).eval()
    batch, T = padded(rows, ["left"] * 4), max(map(len, rows))
    output = wrapped.generate(**batch, max_new_tokens=3, **PLAIN, **how)
    for row, ids in zip(output, rows):
        alone = wrapped.generate(torch.tensor([ids]), max_new_tokens=3, **PLAIN, **how)
        assert row[T:].tolist() == alone[0, len(ids) :].tolist()


def test_generation_after_padding_on_the_right_warns_once():
    wrapped = wrap(copy.deepcopy(base("GPT2")), "cpt").eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            batch = padded([[1, 2], [3]], ["right"] * 2)
            wrapped.generate(**batch, max_new_tokens=1, **PLAIN)
    assert len([w for w in caught if "ends in padding" in str(w.message)]) == 1


def test_a_static_cache_is_an_error_that_says_so():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    with pytest.raises(MiniCPTError, match="Leave cache_implementation out"):
        wrapped.generate(
            torch.tensor([[1]]), max_new_tokens=2, cache_implementation="static", **PLAIN
        )


# ---- a filled cache -------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(NAMES),
    KIND,
    ROWS,
    SIDES,
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.booleans(),
)
def test_a_cache_carried_by_hand_holds_the_prompt_once(name, kind, rows, sides, steps, hole):
    visible = [1, 0, *[1] * 7] if hole and kind == "cpt" else None
    wrapped = wrap(
        copy.deepcopy(base(name)), kind, **{"cpt_mask": visible} if visible else {}
    ).eval()
    prompt, batch = prompt_of(wrapped), padded(rows, sides)
    mask, P, generator = batch["attention_mask"], len(prompt), torch.Generator().manual_seed(0)
    with torch.no_grad():
        cache = wrapped(**batch, use_cache=True).past_key_values
        for n in steps:
            new = torch.randint(1, V, (len(rows), n), generator=generator)
            mask = torch.cat((mask, torch.ones_like(new)), dim=1)
            output = wrapped(input_ids=new, attention_mask=mask, past_key_values=cache)
            rows = [row + more for row, more in zip(rows, new.tolist())]
            assert output.logits.shape == (len(rows), n, V)
            assert output.past_key_values.get_seq_length() == P + mask.shape[1]
            for logits, ids in zip(output.logits, rows):
                close(logits, bare(base(name), prompt, ids, visible)[-n:])


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("kind", ["cpt", "pt"])
def test_generation_goes_on_from_a_cache_given_by_the_caller(kind, whole):
    """With the whole text or its new tokens alone; PEFT runs the last token and leaves the others out."""
    wrapped = wrap(copy.deepcopy(base("Llama")), kind).eval()
    rows, more = [[5, 9, 11], [3, 8, 1, 2, 4]], torch.tensor([[21, 22, 23], [31, 32, 33]])
    batch = padded(rows, ["left"] * 2)
    with torch.no_grad():
        cache = wrapped(**batch, use_cache=True).past_key_values
    mask = torch.cat((batch["attention_mask"], torch.ones_like(more)), dim=1)
    ids = torch.cat((batch["input_ids"], more), dim=1) if whole else more
    output = wrapped.generate(
        input_ids=ids, attention_mask=mask, past_key_values=cache, max_new_tokens=3, **PLAIN
    )
    for n, row in enumerate(rows):
        expected = greedy(base("Llama"), prompt_of(wrapped), row + more[n].tolist(), 3)
        assert output[n, -3:].tolist() == expected


def test_what_does_not_fit_a_cache_is_an_error():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        cache = wrapped(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(MiniCPTError, match="labels need whole rows"):
        wrapped(input_ids=ids, labels=ids, past_key_values=cache)
    with pytest.raises(MiniCPTError, match=r"attention_mask has shape \(1, 3\).*\(1, 6\)"):
        wrapped(input_ids=ids, attention_mask=torch.ones(1, 3), past_key_values=cache)
    with torch.no_grad():
        cache = base("Llama")(ids, use_cache=True).past_key_values
    with pytest.raises(MiniCPTError, match="holds 3 tokens: it must begin with the prompt's 9"):
        wrapped(input_ids=ids, past_key_values=cache)


# ---- models that cannot be told --------------------------------------------------------------------------------------


@pytest.mark.parametrize("why", CANNOT)
def test_a_model_that_would_count_the_padding_refuses(why):
    wrapped, rows = wrap(copy.deepcopy(CANNOT[why]), "cpt").eval(), [[5, 9, 11, 2], [17]]
    left, right = (padded(rows, [side] * 2) for side in ("left", "right"))
    with pytest.raises(MiniCPTError, match=why):
        wrapped(**left)
    with pytest.raises(MiniCPTError, match=why):
        wrapped.generate(**left, max_new_tokens=2, **PLAIN)
    close(wrapped(**right).logits[1, 9], bare(wrapped.base_model, prompt_of(wrapped), [17])[9])
    expected = bare(wrapped.base_model, prompt_of(wrapped), [17, 3])[-1].log_softmax(-1)[4]
    first = bare(wrapped.base_model, prompt_of(wrapped), [17])[-1].log_softmax(-1)[3]
    scores = wrapped.score(left["input_ids"], [[3, 4], [5]], left["attention_mask"])
    close(scores[1, 0], expected + first)
    config = minicpt.IAPTConfig(num_virtual_tokens=9, bottleneck=4)
    with pytest.raises(MiniCPTError, match=why):
        IAPTModel(copy.deepcopy(CANNOT[why]), config)(**left)


def test_iapt_counts_no_label_that_padding_predicts():
    model = IAPTModel(copy.deepcopy(base("Llama")), minicpt.IAPTConfig(bottleneck=4)).eval()
    row, longer = [5, 9, 11, 2], [1] * 7
    types = torch.tensor([[0] * 3 + [1, 2, 3, 4], [1] * 6 + [4]])
    batch = padded([row, longer], ["left"] * 2)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    labels[1] = -100
    loss = model(**batch, labels=labels, input_type_mask=types).loss
    alone = torch.tensor([row])
    close(loss, model(alone, labels=alone, input_type_mask=types[:1, 3:]).loss)


# ---- scores ----------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None)
@given(
    st.sampled_from([*NAMES, "Mpt"]),
    ROWS,
    SIDES,
    st.lists(st.booleans(), min_size=9, max_size=9).filter(lambda seen: seen[0] and seen[-1]),
)
def test_scores_honour_zeros_of_cpt_mask(name, rows, sides, seen):
    visible, labels = [int(s) for s in seen], [[5], [6, 7], [6, 8, 3]]
    wrapped = wrap(copy.deepcopy(base(name)), "cpt", cpt_mask=visible).eval()
    batch, prompt = padded(rows, sides), prompt_of(wrapped)
    scores = wrapped.score(batch["input_ids"], labels, batch["attention_mask"])
    for row, ids in zip(scores, rows):
        for score, label in zip(row, labels):
            log_p = bare(base(name), prompt, ids + label, visible).log_softmax(-1)
            log_p = log_p[-len(label) - 1 : -1]
            close(score, log_p.gather(1, torch.tensor(label)[:, None]).sum())
