"""The core against PEFT and plain torch: roles, projection, loss, embeddings, wrapper, trajectory."""

import copy
import types as pytypes

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import minicpt
from minicpt.core import loss, masks, projection
from minicpt.errors import MiniCPTError

SETTINGS = settings(max_examples=40, deadline=None)


@st.composite
def contexts(draw, max_shots=4, vocabulary=60):
    """Random contexts: token ids and types of 1..max_shots examples with separators and labels of 1-3 tokens."""
    types = []
    for i in range(draw(st.integers(1, max_shots))):
        for role in (1, 2, 0, 3, 4, 0):
            types += [role + 4 * i if role else 0] * draw(st.integers(1 if role == 4 else 0, 3))
    ids = draw(st.lists(st.integers(0, vocabulary - 1), min_size=len(types), max_size=len(types)))
    return ids, types


def configs(ids, types, ours=None, **kwargs):
    """The same CPT configuration for PEFT and for us, who may get fields that PEFT does not know."""
    kwargs = dict(
        task_type="CAUSAL_LM",
        cpt_token_ids=ids,
        cpt_mask=[1] * len(ids),
        cpt_tokens_type_mask=types,
        opt_weighted_loss_type="decay",
        opt_loss_decay_factor=0.9,
        **kwargs,
    )
    return peft.CPTConfig(**kwargs), minicpt.CPTConfig(**kwargs, **(ours or {}))


def query(n_rows=2, T=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 60, (n_rows, T), generator=generator)
    types = torch.tensor([[1, 2, 2, 0, 3, 4, 4][:T]] * n_rows)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids.clone(),
        input_type_mask=types,
    )


def both(gpt2, ids, types, **kwargs):
    theirs, ours = configs(ids, types, **kwargs)
    return (
        peft.get_peft_model(copy.deepcopy(gpt2), theirs),
        minicpt.get_peft_model(copy.deepcopy(gpt2), ours),
    )


# ---- roles ----------------------------------------------------------------------------------------------------------


def test_roles_of_a_context_written_out():
    types = torch.tensor([1, 2, 0, 3, 4, 0, 5, 6, 0, 7, 8])
    assert masks.is_label(types).tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]
    assert masks.is_input(types).tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert masks.is_updated(types).tolist() == [1, 1, 0, 1, 0, 0, 1, 1, 0, 1, 0]


def test_shift_types_leaves_its_argument_alone_and_refuses_shifted_roles():
    types = torch.tensor([[1, 2, 0, 4]])
    assert masks.shift_types(torch.tensor([1, 4, 8]), types).tolist() == [[9, 10, 0, 12]]
    assert types.tolist() == [[1, 2, 0, 4]]
    with pytest.raises(MiniCPTError, match="largest type is 7"):
        masks.shift_types(torch.tensor([1, 4, 7]), types)
    assert masks.shift_types(torch.tensor([1, 4, 7]), types, strict=False).tolist() == [
        [8, 9, 0, 11]
    ]


# ---- projection -----------------------------------------------------------------------------------------------------


@SETTINGS
@given(contexts(), st.floats(0, 5), st.floats(0, 5), st.integers(0, 10**6))
def test_epsilon_and_projection_equal_peft(context, eps_input, eps_format, seed):
    ids, types = context
    theirs, ours = configs(
        ids, types, opt_projection_epsilon=eps_input, opt_projection_format_epsilon=eps_format
    )
    embedding = torch.nn.Embedding(60, 16)
    for config in (theirs, ours):
        config.token_dim = 16
    a, b = peft.tuners.cpt.CPTEmbedding(theirs, embedding), minicpt.CPTEmbedding(ours, embedding)
    delta = torch.randn(len(ids), 16, generator=torch.Generator().manual_seed(seed))
    delta[::3] = 0
    for module in (a, b):
        module.delta_embedding.weight.data = delta.clone()
    torch.testing.assert_close(a.get_epsilon(), b.get_epsilon())
    torch.testing.assert_close(a.get_projection(), b.get_projection())
    indices = torch.arange(len(ids))[None]
    torch.testing.assert_close(a(indices), b(indices))
    assert (b.delta_embedding.weight.norm(dim=1) <= b.get_epsilon() + 1e-6).all()


@SETTINGS
@given(st.integers(0, 10**6), st.floats(0.01, 3))
def test_projection_is_the_nearest_point_of_the_ball(seed, radius):
    generator = torch.Generator().manual_seed(seed)
    delta, epsilon = torch.randn(5, 8, generator=generator), torch.full((5,), radius)
    projected = projection.project(delta, epsilon)
    torch.testing.assert_close(projection.project(projected, epsilon), projected)  # idempotent
    others = torch.randn(200, 8, generator=generator)
    others = radius * others / others.norm(dim=1, keepdim=True)  # points of the ball
    assert ((delta - projected).norm(dim=1)[:, None] <= torch.cdist(delta, others) + 1e-5).all()


def test_epsilon_in_units_of_the_mean_embedding_norm():
    embedding = torch.nn.Embedding(60, 16)
    _, config = configs(
        [1, 2, 3, 4], [1, 2, 3, 4], dict(opt_epsilon_unit="mean_norm"), opt_projection_epsilon=0.5
    )
    config.token_dim = 16
    epsilon = minicpt.CPTEmbedding(config, embedding).get_epsilon()
    assert epsilon[1].item() == pytest.approx(
        0.5 * embedding.weight.norm(dim=1).mean().item(), rel=1e-5
    )


# ---- loss -----------------------------------------------------------------------------------------------------------


@SETTINGS
@given(st.lists(contexts(), min_size=1, max_size=4), st.floats(0.1, 1), st.integers(0, 10**6))
def test_mean_loss_and_gradient_equal_peft(rows, decay, seed):
    S = max(len(ids) for ids, _ in rows)
    types = torch.tensor([t + [0] * (S - len(t)) for _, t in rows])
    labels = torch.tensor([i + [0] * (S - len(i)) for i, _ in rows])
    labels = torch.where(masks.is_label(types), labels, -100)
    if not (labels[:, 1:] != -100).any():
        return
    logits = torch.randn(
        len(rows), S, 60, generator=torch.Generator().manual_seed(seed), requires_grad=True
    )
    config = pytypes.SimpleNamespace(opt_weighted_loss_type="decay", opt_loss_decay_factor=decay)
    output = peft.tuners.cpt.CPTEmbedding.calculate_loss(
        pytypes.SimpleNamespace(logits=logits), labels, types, config
    )
    (expected_grad,) = torch.autograd.grad(output.loss, logits)
    ours = loss.label_loss(logits, labels, types, decay)
    torch.testing.assert_close(ours, output.loss)
    torch.testing.assert_close(torch.autograd.grad(ours, logits)[0], expected_grad)


@SETTINGS
@given(contexts(max_shots=5), st.floats(0.1, 1), st.floats(0, 1), st.integers(0, 10**6))
def test_sum_loss_is_the_papers_formula_term_by_term(context, decay, context_weight, seed):
    ids, types = context
    ids, types = [0] + ids, [0] + types  # nothing predicts the first token
    K = max(types) // 4 - 1  # the last example is the training example
    logits = torch.randn(1, len(ids), 60, generator=torch.Generator().manual_seed(seed))
    log_p = logits.log_softmax(-1)
    expected = 0.0
    for k in range(1, K + 2):
        places = [s for s, t in enumerate(types) if t == 4 * k]
        mean = sum(-log_p[0, s - 1, ids[s]].item() for s in places) / len(places)
        expected += mean * (1 if k == K + 1 else context_weight * decay ** (K + 1 - k))
    types = torch.tensor([types])
    labels = torch.where(masks.is_label(types), torch.tensor([ids]), -100)
    value = loss.label_loss(logits, labels, types, decay, "sum", context_weight)
    assert value.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


# ---- embeddings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["RANDOM", "SAMPLE_VOCAB"])
@pytest.mark.parametrize("submodules", [1, 2])
def test_prompt_embedding_equals_peft(init, submodules):
    embedding = torch.nn.Embedding(60, 16)
    kwargs = dict(
        task_type="CAUSAL_LM",
        num_virtual_tokens=5,
        prompt_tuning_init=init,
        token_dim=16,
        num_transformer_submodules=submodules,
    )
    modules = []
    for library in (peft, minicpt):
        torch.manual_seed(3)
        modules.append(library.PromptEmbedding(library.PromptTuningConfig(**kwargs), embedding))
    indices = torch.arange(5 * submodules).expand(3, -1)
    assert modules[1](indices).shape == (3, 5 * submodules, 16)
    torch.testing.assert_close(modules[0](indices), modules[1](indices))


def test_prompt_embedding_text_equals_peft_with_t5s_shared_embedding():
    from transformers import T5Config, T5ForConditionalGeneration

    from minicpt.engine.base_models import MICRO

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=2000, d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8)
    )
    kwargs = dict(
        task_type="SEQ_2_SEQ_LM",
        num_virtual_tokens=6,
        prompt_tuning_init="TEXT",
        token_dim=16,
        num_transformer_submodules=2,
        tokenizer_name_or_path=str(MICRO),
        prompt_tuning_init_text="the movie was good",
    )
    a, b = (
        lib.PromptEmbedding(lib.PromptTuningConfig(**kwargs), model.shared)
        for lib in (peft, minicpt)
    )
    torch.testing.assert_close(a.embedding.weight, b.embedding.weight)


def test_cpt_embedding_freezes_labels_and_separators():
    embedding = torch.nn.Embedding(60, 16)
    _, config = configs([7, 8, 9, 10, 11], [1, 2, 0, 3, 4])
    config.token_dim = 16
    module = minicpt.CPTEmbedding(config, embedding)
    module.set_updated_tokens()  # a second call must not stack hooks
    module(torch.arange(5)[None]).sum().backward()
    assert module.embedding.weight.grad is None
    assert module.delta_embedding.weight.grad.sum(1).tolist() == [16, 16, 0, 16, 0]
    torch.testing.assert_close(module.embedding.weight, embedding.weight[[7, 8, 9, 10, 11]])


# ---- the wrapped model ----------------------------------------------------------------------------------------------


@SETTINGS
@given(contexts(), st.integers(1, 3), st.integers(0, 100))
def test_forward_loss_and_gradients_equal_peft(gpt2, context, rows, seed):
    theirs, ours = both(gpt2, *context)
    batch = query(rows, seed=seed)
    a, b = theirs(**{k: v.clone() for k, v in batch.items()}), ours(**batch)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss)
    a.loss.backward(), b.loss.backward()
    grads = [m.prompt_encoder.default.delta_embedding.weight.grad for m in (theirs, ours)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("optimiser", [torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("eager", [False, True])
def test_twenty_steps_follow_pefts_trajectory(gpt2, optimiser, eager):
    """Same deltas and losses over 20 steps, projecting lazily in forward or eagerly after each step."""
    ids, types = [5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 5, 6, 7, 8]
    models = both(gpt2, ids, types, opt_projection_epsilon=3.0, opt_projection_format_epsilon=1.5)
    deltas = []
    for model in models:
        encoder = model.prompt_encoder.default
        opt = optimiser([p for p in model.parameters() if p.requires_grad], lr=0.05)
        losses = []
        for step in range(20):
            loss_ = model(**{k: v.clone() for k, v in query(2, seed=step).items()}).loss
            opt.zero_grad()
            loss_.backward()
            opt.step()
            if eager and hasattr(encoder, "project_"):
                encoder.project_()
            losses.append(loss_.item())
        deltas.append((torch.tensor(losses), encoder.get_projection()))
    torch.testing.assert_close(deltas[0][0], deltas[1][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(deltas[0][1], deltas[1][1], rtol=1e-3, atol=1e-5)


def test_any_adapter_name_works_and_types_are_not_changed(gpt2):
    _, config = configs([5, 6, 7, 8], [1, 2, 3, 4])
    model, batch = minicpt.get_peft_model(copy.deepcopy(gpt2), config, adapter_name="mine"), query()
    before = batch["input_type_mask"].clone()
    assert torch.isfinite(model(**batch).loss)
    assert torch.equal(batch["input_type_mask"], before)


def test_cpt_mask_zeros_hide_tokens(gpt2):
    """A context token whose cpt_mask is 0 must not influence the query: a listed difference from PEFT."""
    logits = []
    for hidden_id in (20, 21):
        _, config = configs([5, hidden_id, 7, 8], [1, 2, 3, 4])
        config.cpt_mask = [1, 0, 1, 1]
        model = minicpt.get_peft_model(copy.deepcopy(gpt2), config)
        logits.append(
            [model(**query()).logits[:, 4:], model(input_ids=query()["input_ids"]).logits[:, 4:]]
        )
    torch.testing.assert_close(logits[0], logits[1])
    theirs = peft.get_peft_model(copy.deepcopy(gpt2), configs([5, 21, 7, 8], [1, 2, 3, 4])[0])
    assert not torch.allclose(theirs(**query()).logits[:, 4:], logits[1][0])


def test_saved_by_us_loads_in_peft_with_equal_logits(gpt2, tmp_path):
    _, config = configs(
        [5, 6, 7, 8], [1, 2, 3, 4], dict(opt_loss_reduction="sum"), opt_projection_epsilon=3.0
    )
    model = minicpt.get_peft_model(copy.deepcopy(gpt2), config)
    model.prompt_encoder.default.delta_embedding.weight.data.normal_()
    model.save_pretrained(tmp_path)
    with pytest.warns(
        UserWarning, match="opt_loss_reduction"
    ):  # PEFT names the field it does not know
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path)
    ids = query()["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(task_type="SEQ_CLS"), "only supports task_type = CAUSAL_LM"),
        (dict(cpt_mask=[1]), "must have the same length"),
        (dict(cpt_tokens_type_mask=[1, 2]), "must have the same length"),
        (dict(opt_loss_reduction="max"), "opt_loss_reduction must be one of"),
        (dict(opt_weighted_loss_type="linear"), "opt_weighted_loss_type must be one of"),
        (dict(opt_projection_epsilon=-1.0), "must be >= 0"),
    ],
)
def test_bad_configurations(change, message):
    good = dict(
        task_type="CAUSAL_LM",
        cpt_token_ids=[1, 2, 3, 4],
        cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
    )
    with pytest.raises(ValueError, match=message):
        minicpt.CPTConfig(**{**good, **change})


def test_ids_outside_the_vocabulary_raise(gpt2):
    with pytest.raises(MiniCPTError, match="outside the model's vocabulary of 60"):
        minicpt.get_peft_model(copy.deepcopy(gpt2), configs([1, 2, 3, 60], [1, 2, 3, 4])[1])


def test_missing_type_mask_gives_pefts_number_and_a_warning(gpt2):
    theirs, ours = both(gpt2, [5, 6, 7, 8], [1, 2, 3, 4])
    batch = query()
    batch.pop("input_type_mask")
    with pytest.warns(UserWarning, match="No input_type_mask"):
        value = ours(**batch).loss
    torch.testing.assert_close(theirs(**batch).loss, value)
