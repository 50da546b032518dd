"""Every decoder-only architecture, tiny and random: our wrapper against PEFT's and against the plain forward."""

import copy
import functools
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_core import configs, contexts

import minicpt
from minicpt.core import masks

V, D = 60, 16
COMMON = dict(
    vocab_size=V,
    hidden_size=D,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=64,
    pad_token_id=0,
)
NEOX = {k: v for k, v in COMMON.items() if k not in ("num_key_value_heads", "head_dim")}
GPT = dict(vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=64)
ARCHITECTURES = {
    "GPT2": GPT,
    "GPTJ": GPT | dict(rotary_dim=4),
    "GPTNeoX": NEOX,
    "Bloom": dict(vocab_size=V, hidden_size=D, n_layer=2, n_head=2),  # ALiBi
    "OPT": dict(
        vocab_size=V,
        hidden_size=D,
        word_embed_proj_dim=D,
        ffn_dim=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
    ),  # positions offset by 2
    "Llama": COMMON,
    "Mistral": COMMON | dict(sliding_window=32),
    "Qwen2": {k: v for k, v in COMMON.items() if k != "head_dim"},
    "Qwen3": COMMON,
    "Gemma": COMMON,  # scaled embeddings
    "Gemma2": COMMON
    | dict(final_logit_softcapping=2.0, attn_logit_softcapping=5.0, query_pre_attn_scalar=8),
    "Phi": NEOX | dict(partial_rotary_factor=0.5),
    "Falcon": dict(
        vocab_size=V, hidden_size=D, num_hidden_layers=2, num_attention_heads=2, alibi=False
    ),
}
# PEFT stops at their configuration: "Please specify num_attention_heads", which no prompt needs
UNKNOWN_TO_PEFT = {
    "Mpt": dict(vocab_size=V, d_model=D, n_layers=2, n_heads=2, max_seq_len=64),  # ALiBi by place
    "XGLM": dict(
        vocab_size=V, d_model=D, ffn_dim=24, num_layers=2, attention_heads=2, init_std=0.3
    ),
}


@functools.cache
def base(name):
    torch.manual_seed(0)
    options = (ARCHITECTURES | UNKNOWN_TO_PEFT)[name]
    config = getattr(transformers, f"{name}Config")(**options, initializer_range=0.3)
    for field in vars(config):  # all dropouts off
        if "drop" in field and isinstance(getattr(config, field), float):
            setattr(config, field, 0.0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(Position ids are not supported|is_gradient_checkpointing).*"
        )
        yield


def batch_of(rows, T, padding, seed):
    """A batch with the last row padded by two; its labels -100 and its types 0 on the padding."""
    ids = torch.randint(1, V, (rows, T), generator=torch.Generator().manual_seed(seed))
    types, mask = (
        torch.tensor([[1, 2, 0, 3, 4, 4, 2, 0][:T]] * rows),
        torch.ones(rows, T, dtype=torch.long),
    )
    if padding != "none":
        mask[-1, slice(0, 2) if padding == "left" else slice(-2, None)] = 0
        shift = 2 if padding == "left" else 0
        types[-1] = torch.roll(types[-1], shift) * mask[-1]
    labels = ids.masked_fill(mask == 0, -100)
    return dict(input_ids=ids * mask, attention_mask=mask, labels=labels, input_type_mask=types)


def prompts(name, kind, context):
    """The same prompt in PEFT's wrapper and in ours, moved away from where it starts."""
    ids, types = context
    if kind == "cpt":
        both = configs(ids, types, opt_projection_epsilon=3.0, opt_projection_format_epsilon=2.0)
    else:
        both = [
            lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
            for lib in (peft, minicpt)
        ]
    models = [
        lib.get_peft_model(copy.deepcopy(base(name)), c) for lib, c in zip((peft, minicpt), both)
    ]
    weights = []
    for model in models:
        encoder = model.prompt_encoder.default
        weights.append((encoder.delta_embedding if kind == "cpt" else encoder.embedding).weight)
        weights[-1].data = torch.randn(
            weights[-1].shape, generator=torch.Generator().manual_seed(1)
        )
    return models, weights


def plain(name, model, kind, context, batch):
    """Logits, loss and the prompt's gradient from the base model alone: one cross-entropy per label token."""
    encoder, embed = model.prompt_encoder.default, base(name).get_input_embeddings()
    start = embed(torch.tensor(context[0])) if kind == "cpt" else encoder.embedding.weight
    move = encoder.get_projection() if kind == "cpt" else 0.0
    prompt = (start + move).detach().requires_grad_()
    B, P = len(batch["input_ids"]), len(prompt)
    mask = torch.cat((torch.ones(B, P), batch["attention_mask"]), dim=1)
    inputs = torch.cat((prompt.expand(B, P, D), embed(batch["input_ids"])), dim=1)
    logits = base(name)(inputs_embeds=inputs, attention_mask=mask).logits
    log_p = logits.log_softmax(-1)
    terms = []
    for b in range(B):
        ids, types = batch["labels"][b].tolist(), batch["input_type_mask"][b].tolist()
        if kind == "cpt":
            last = max(context[1])
            ids, types = context[0] + ids, context[1] + [t + last if t else 0 for t in types]
        else:
            ids, types = [-100] * P + ids, [4] * (P + len(ids))
        order = sorted({t for s, t in enumerate(types) if t and t % 4 == 0 and s})
        for s, t in enumerate(types):
            if s and t and t % 4 == 0 and ids[s] != -100:
                weight = 0.9 ** (len(order) - 1 - order.index(t)) if kind == "cpt" else 1.0
                terms.append(-weight * log_p[b, s - 1, ids[s]])
    loss = sum(terms) / len(terms)
    (grad,) = torch.autograd.grad(loss, prompt)
    if kind == "cpt":
        grad = grad * masks.is_updated(torch.tensor(context[1]))[:, None]
    return logits, loss, grad


def check(name, kind, context, batch):
    (theirs, ours), (a, b) = prompts(name, kind, context)
    logits, loss, grad = plain(name, ours, kind, context, batch)
    if kind == "pt":
        batch = {k: v for k, v in batch.items() if k != "input_type_mask"}
    expected, output = theirs(**copy.deepcopy(batch)), ours(**batch)
    expected.loss.backward(), output.loss.backward()
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=2e-5)
    close(output.logits, expected.logits)
    close(output.logits, logits)
    close(output.loss, expected.loss)
    close(output.loss, loss)
    close(b.grad, a.grad)
    close(b.grad, grad)
    close(ours(input_ids=batch["input_ids"]).logits, theirs(input_ids=batch["input_ids"]).logits)


CONTEXT = [5, 6, 7, 8, 9, 10, 11, 12, 13], [1, 2, 3, 4, 0, 5, 6, 7, 8]


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("kind", ["cpt", "pt"])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equal_to_peft_and_to_the_plain_forward(name, kind, padding):
    """Padding on the left PEFT counts as text: see `test_padding.py`."""
    check(name, kind, CONTEXT, batch_of(2, 7, padding, seed=3))


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(ARCHITECTURES)),
    st.sampled_from(["cpt", "pt"]),
    contexts(),
    st.integers(1, 3),
    st.integers(7, 8),
    st.sampled_from(["none", "right"]),
    st.integers(0, 10**6),
)
def test_equal_on_random_contexts(name, kind, context, rows, T, padding, seed):
    check(name, kind, context, batch_of(rows, T, padding, seed))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generates_as_peft_does(name):
    batch = batch_of(2, 6, "none", seed=4)
    (theirs, ours), _ = prompts(name, "cpt", CONTEXT)
    kwargs = dict(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=4,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
    )
    assert torch.equal(ours.generate(**kwargs), theirs.generate(**kwargs))


def test_embeddings_narrower_than_the_hidden_size():
    """OPT-350m's kind: PEFT takes the hidden size for the prompt's width and fails; ours reads it off the model."""
    config = transformers.OPTConfig(**ARCHITECTURES["OPT"] | dict(hidden_size=32), dropout=0.0)
    model = transformers.OPTForCausalLM(config).eval()
    batch = batch_of(2, 7, "none", seed=0)
    theirs, ours = configs(*CONTEXT)
    with pytest.raises(RuntimeError):
        peft.get_peft_model(copy.deepcopy(model), theirs)(**copy.deepcopy(batch))
    embeds = model.get_input_embeddings()(
        torch.cat((torch.tensor([CONTEXT[0]] * 2), batch["input_ids"]), dim=1)
    )
    torch.testing.assert_close(
        minicpt.get_peft_model(copy.deepcopy(model), ours)(**batch).logits,
        model(inputs_embeds=embeds).logits,
    )


@pytest.mark.parametrize("kind", ["cpt", "pt"])
@pytest.mark.parametrize("name", UNKNOWN_TO_PEFT)
def test_models_whose_sizes_peft_does_not_find(name, kind, tmp_path):
    """PEFT asks for `num_attention_heads`, which CPT's configuration resets; no prompt needs it."""
    batch = batch_of(2, 7, "right", seed=3)
    theirs, ours = configs(*CONTEXT)
    if kind == "pt":
        theirs, ours = (
            lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
            for lib in (peft, minicpt)
        )
    with pytest.raises(ValueError, match="num_attention_heads"):
        peft.get_peft_model(copy.deepcopy(base(name)), theirs)
    model = minicpt.get_peft_model(copy.deepcopy(base(name)), ours)
    weight = model.prompt_encoder.default
    weight = (weight.delta_embedding if kind == "cpt" else weight.embedding).weight
    weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    logits, loss, grad = plain(name, model, kind, CONTEXT, batch)
    if kind == "pt":
        del batch["input_type_mask"]
    close = functools.partial(torch.testing.assert_close, rtol=1e-3, atol=2e-5)
    for shared in (True, False):
        model.shared_prefix, weight.grad = shared, None
        output = model(**batch)
        output.loss.backward()
        close(output.logits, logits)
        close(output.loss, loss)
        close(weight.grad, grad)
    model.save_pretrained(tmp_path)
    again = minicpt.PeftModel.from_pretrained(copy.deepcopy(base(name)), tmp_path)
    del batch["labels"]
    close(again(**batch).logits, model(**batch).logits)


# ---- what PEFT's own wrapper does ------------------------------------------------------------------------------------


@pytest.mark.parametrize("submodules", [1, 2])
def test_prompt_tuning_of_t5(submodules, tmp_path):
    torch.manual_seed(0)
    config = transformers.T5Config(
        vocab_size=V,
        d_model=D,
        d_ff=24,
        d_kv=8,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    model = transformers.T5ForConditionalGeneration(config).eval()
    ids, labels = torch.randint(1, V, (2, 6)), torch.randint(1, V, (2, 3))
    mask, results = torch.ones_like(ids), []
    for lib in (peft, minicpt):
        torch.manual_seed(1)
        config = lib.PromptTuningConfig(
            task_type=lib.TaskType.SEQ_2_SEQ_LM,
            num_virtual_tokens=4,
            num_transformer_submodules=submodules,
        )
        tuned = lib.get_peft_model(copy.deepcopy(model), config)
        assert isinstance(tuned, lib.PeftModelForSeq2SeqLM) and isinstance(tuned, lib.PeftModel)
        output = tuned(input_ids=ids, attention_mask=mask, labels=labels)
        output.loss.backward()
        weight = tuned.prompt_encoder.default.embedding.weight
        assert weight.shape == (4 * submodules, D) and weight.grad.abs().sum() > 0
        text = tuned.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4)
        tuned.save_pretrained(tmp_path)
        again = lib.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path)
        torch.testing.assert_close(
            again(input_ids=ids, attention_mask=mask, labels=labels).loss, output.loss
        )
        results.append((output.logits, output.loss, weight.grad, text))
    for theirs, ours in zip(*results):
        torch.testing.assert_close(theirs, ours)


@pytest.mark.parametrize("task", ["SEQ_CLS", "TOKEN_CLS"])
def test_prompt_tuning_of_classifiers(task):
    kind = "SequenceClassification" if task == "SEQ_CLS" else "TokenClassification"
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=V,
        hidden_size=D,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_dropout_prob=0.0,
        num_labels=3,
    )
    model = getattr(transformers, f"BertFor{kind}")(config).eval()
    ids, results = torch.randint(1, V, (2, 6)), []
    # a class per text, or per token; the prompt's tokens get none, which PEFT leaves to the caller
    labels = (
        torch.tensor([0, 2])
        if task == "SEQ_CLS"
        else torch.tensor([[-100] * 4 + [0, 1, 2] * 2] * 2)
    )
    for lib in (peft, minicpt):
        torch.manual_seed(1)
        config = lib.PromptTuningConfig(task_type=task, num_virtual_tokens=4)
        tuned = lib.get_peft_model(copy.deepcopy(model), config)
        assert isinstance(tuned, getattr(lib, f"PeftModelFor{kind}")) and isinstance(
            tuned, lib.PeftModel
        )
        output = tuned(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels)
        output.loss.backward()
        results.append(
            (output.logits, output.loss, tuned.prompt_encoder.default.embedding.weight.grad)
        )
    for theirs, ours in zip(*results):
        torch.testing.assert_close(theirs, ours)
