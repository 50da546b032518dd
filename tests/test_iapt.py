"""IAPT: what its generators read and when, that they train and nothing else does, its files, sizes and families."""

import copy
import json
import warnings

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from test_architectures import ARCHITECTURES, base, batch_of

import minicpt
from minicpt import data
from minicpt.core.templates import Encoded
from minicpt.core.train import Recipe
from minicpt.dropin import iapt
from minicpt.engine.scores import label_scores
from minicpt.errors import MiniCPTError
from minicpt.methods import fit
from minicpt.methods.trainers import train_bilevel

FAMILIES = ["GPT2", "GPTJ", "GPTNeoX", "Bloom", "Llama", "Qwen2", "Qwen3"]
GREEDY = dict(do_sample=False, pad_token_id=0, eos_token_id=None)


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*")  # PEFT reads it
        yield


def wrapped(name="Llama", **changes):
    torch.manual_seed(1)
    return minicpt.get_peft_model(
        copy.deepcopy(base(name)), minicpt.IAPTConfig(**{"bottleneck": 8, **changes})
    )


def soft_tokens(model, **batch):
    """What the generators wrote, (L, B, S, D), in one forward."""
    seen = []
    hooks = [
        g.register_forward_hook(lambda module, args, output: seen.append(output))
        for g in model.generators
    ]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return torch.stack(seen)


def by_hand(model, ids, n_instruction):
    """Logits (T, V) of one unpadded row from the formulas: a loop over layers, a sum over tokens."""
    S, layers = model.num_virtual_tokens, list(iapt.decoder_layers(model.base_model))

    def replace(layer, args):
        g, H = model.generators[layers.index(layer)], args[0][0, S : S + n_instruction]
        soft = []
        for s in range(S):
            u = torch.stack([g.queries[:, s] @ (g.down.weight @ h) for h in H])
            weights = u.exp() / u.exp().sum()
            p = sum(w * (g.down.weight @ h) for w, h in zip(weights, H))
            top = sum(a * p**j for j, a in enumerate(g.numerator))
            bottom = 1 + sum(b * p ** (i + 1) for i, b in enumerate(g.denominator)).abs()
            soft.append(g.up.weight @ (top / bottom))
        return torch.cat((torch.stack(soft)[None], args[0][:, S:]), dim=1), *args[1:]

    hooks = [layer.register_forward_pre_hook(replace) for layer in layers]
    with torch.no_grad():
        logits = model.base_model(torch.cat((torch.full((1, S), 3), ids[None]), dim=1)).logits[
            0, S:
        ]
    for hook in hooks:
        hook.remove()
    return logits


# ---- what the generators read ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_to_the_formulas_written_out(name):
    model = wrapped(name, num_virtual_tokens=3)
    ids, types = torch.randint(1, 60, (1, 7)), torch.tensor([[1, 2, 2, 0, 3, 4, 4]])
    with torch.no_grad():
        logits = model(input_ids=ids, input_type_mask=types).logits[0]
    torch.testing.assert_close(logits, by_hand(model, ids[0], 5), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("how", ["roles", "labels"])
def test_the_answer_does_not_leak_into_the_generators(how):
    model, batch = (
        wrapped(),
        batch_of(2, 7, "none", seed=0),
    )  # answers are tokens 4 and 5, tokens 6 and 7 come after
    labels = torch.full((2, 7), -100)
    labels[:, 4:6] = 1

    def soft(ids):
        told = (
            {"input_type_mask": batch["input_type_mask"]} if how == "roles" else {"labels": labels}
        )
        return soft_tokens(model, input_ids=ids, **told)

    ids = batch["input_ids"]
    before = soft(ids)
    assert before.shape == (2, 2, 4, 16)
    for position in range(7):
        changed = ids.clone()
        changed[:, position] = (changed[:, position] + 7) % 60
        same = (soft(changed) == before).all()
        assert same == (position >= 4), position  # and every token of the instruction is read
    # told nothing, all of the text is instruction
    assert not torch.equal(soft_tokens(model, input_ids=ids), before)


@pytest.mark.parametrize("name", FAMILIES)
def test_soft_tokens_stand_after_a_leading_bos_which_they_do_not_read(name):
    """[BOS, slots, text] by plain transformers; what the generators wrote is put there by hand."""
    model, S = wrapped(name, num_virtual_tokens=3, leading=1), 3
    ids = torch.tensor([[9, 10, 11, 12, 13, 14]])
    logits = model(input_ids=ids).logits[0]
    soft = soft_tokens(model, input_ids=ids)
    layers = iter(iapt.decoder_layers(model.base_model))
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, s=s: (torch.cat((args[0][:, :1], s, args[0][:, 1 + S :]), 1), *args[1:])
        )
        for layer, s in zip(layers, soft)
    ]
    whole = torch.cat((ids[:, :1], torch.full((1, S), 5), ids[:, 1:]), dim=1)
    plain = model.base_model(whole).logits[0]
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(logits, plain[S:], rtol=1e-3, atol=1e-4)
    first = soft_tokens(model, input_ids=torch.tensor([[8, 10, 11, 12, 13, 14]]))[0]
    assert torch.equal(first, soft[0])  # at layer 0 another BOS changes nothing: it is not read
    out = model.generate(ids, max_new_tokens=2, **GREEDY)
    assert torch.equal(out[:, :6], ids) and out[0, 6] == logits[-1].argmax()
    queries, candidates = (
        [Encoded(ids[0].tolist(), [0, *[2] * 5]), Encoded([9, 7], [0, 2])],
        [[1], [2, 3]],
    )
    scores = label_scores(model, None, queries, candidates, "sum")
    text = torch.tensor([[*ids[0], 2]])
    types = torch.tensor([[0, 2, 2, 2, 2, 2, 4]])
    log_p = model(input_ids=text, input_type_mask=types).logits[0].log_softmax(-1)
    torch.testing.assert_close(scores[0, 1], log_p[-2, 2] + log_p[-1, 3], rtol=1e-4, atol=1e-4)
    with pytest.raises(MiniCPTError, match="begins with padding"):
        model(input_ids=ids, attention_mask=torch.tensor([[0, 1, 1, 1, 1, 1]]))


def test_weights_and_activations_are_all_that_is_trained():
    for shared in (False, True):
        model = wrapped(share_projections=shared)
        assert {p.dim() for p in model.weights()} == {2} and {
            p.dim() for p in model.activations()
        } == {1}
        both = [*model.weights(), *model.activations()]
        assert {id(p) for p in both} == {id(p) for p in model.trained().values()}
        assert len(both) == len(model.trained())


def test_scoring_does_not_leak_a_candidate_label():
    """Scores of labels of several tokens equal those of one forward a label whose generators see the query alone."""
    model = wrapped()
    queries = [Encoded(list(range(10, 10 + n)), [2] * n) for n in (3, 7, 1)]
    candidates = [[1], [2, 3], [2, 4], [5, 6, 7]]
    for batch_size in (1, 64):
        scores = label_scores(model, None, queries, candidates, "sum", batch_size)
        for n, query in enumerate(queries):
            for c, candidate in enumerate(candidates):
                logits = by_hand(model, torch.tensor(query.ids + candidate), len(query))
                log_p = logits[len(query) - 1 : -1].log_softmax(-1)
                expected = log_p.gather(1, torch.tensor(candidate)[:, None]).sum()
                torch.testing.assert_close(scores[n, c], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", FAMILIES)
def test_padding_does_not_matter(name, side):
    model, ids = wrapped(name), torch.randint(1, 60, (2, 6))
    pad = (3, 0) if side == "left" else (0, 3)
    mask = F.pad(torch.ones_like(ids), pad)
    own = slice(3, None) if side == "left" else slice(0, 6)
    alone = soft_tokens(model, input_ids=ids)
    for filler in (0, 9):  # whatever stands there
        padded = dict(input_ids=F.pad(ids, pad, value=filler), attention_mask=mask)
        torch.testing.assert_close(soft_tokens(model, **padded), alone, rtol=1e-4, atol=1e-4)
        logits = model(**padded).logits[:, own]
        torch.testing.assert_close(logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)


# ---- decoding --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_generating_with_the_cache_equals_a_forward_without_and_generates_soft_tokens_once(name):
    model = wrapped(name)
    batch = batch_of(2, 6, "left", seed=4)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    calls = []
    for generator in model.generators:
        generator.register_forward_hook(lambda *_: calls.append(1))
    out = model.generate(ids, attention_mask=mask, max_new_tokens=5, **GREEDY)
    assert len(calls) == 2 and out.shape == (2, 11)
    types = torch.zeros_like(ids)  # from here on, the whole sequence each time: no cache
    for _ in range(5):
        with torch.no_grad():
            new = model(ids, attention_mask=mask, input_type_mask=types).logits[:, -1:].argmax(-1)
        ids, mask, types = (
            torch.cat((ids, new), 1),
            F.pad(mask, (0, 1), value=1),
            F.pad(types, (0, 1), value=4),
        )
    assert torch.equal(out, ids)
    alone = [m(input_ids=batch["input_ids"]).logits for m in (model.base_model, base(name))]
    assert torch.equal(*alone)  # what hangs in the base model does nothing for others


@pytest.mark.parametrize("name", FAMILIES)
def test_a_cache_carried_by_hand(name):
    model, batch = wrapped(name), batch_of(2, 6, "left", seed=5)
    ids, mask, new = batch["input_ids"], batch["attention_mask"], torch.tensor([[7, 8], [9, 10]])
    types = F.pad(torch.zeros_like(ids), (0, 2), value=4)
    with torch.no_grad():
        whole = model(
            torch.cat((ids, new), 1), F.pad(mask, (0, 2), value=1), input_type_mask=types
        ).logits
        first = model(ids, mask, use_cache=True)
        rest = model(
            new, F.pad(mask, (0, 2), value=1), past_key_values=first.past_key_values
        ).logits
    torch.testing.assert_close(
        torch.cat((first.logits, rest), 1)[:, 2:], whole[:, 2:], rtol=1e-3, atol=1e-4
    )


def test_beams_and_dictionaries():
    model, ids = wrapped(), torch.randint(1, 60, (2, 6))
    beams = model.generate(ids, num_beams=3, num_return_sequences=2, max_new_tokens=3, **GREEDY)
    assert beams.shape == (4, 9) and torch.equal(beams[:, :6], ids.repeat_interleave(2, 0))
    alone = model.generate(ids[:1], num_beams=3, num_return_sequences=2, max_new_tokens=3, **GREEDY)
    assert torch.equal(alone, beams[:2])
    output = model.generate(ids, max_new_tokens=3, return_dict_in_generate=True, **GREEDY)
    assert torch.equal(output.sequences, model.generate(ids, max_new_tokens=3, **GREEDY))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_gradients_reach_every_part_and_the_base_model_gets_none(name, shared):
    model = wrapped(name, share_projections=shared)
    model(**batch_of(3, 7, "right", seed=0)).loss.backward()
    for key, p in model.trained().items():
        assert p.grad is not None and torch.isfinite(p.grad).all() and p.grad.abs().sum() > 0, key
    assert all(p.grad is None and not p.requires_grad for p in model.base_model.parameters())


def test_loss_is_the_cross_entropy_of_the_labels():
    model, batch = wrapped(), batch_of(2, 7, "right", seed=1)
    labels = batch["input_ids"].masked_fill(batch["input_type_mask"] != 4, -100)
    output = model(**{**batch, "labels": labels})
    log_p = output.logits.log_softmax(-1)
    picked = [
        -log_p[b, t - 1, labels[b, t]]
        for b in range(2)
        for t in range(1, 7)
        if labels[b, t] != -100
    ]
    torch.testing.assert_close(output.loss, sum(picked) / len(picked))
    halves = model(
        **{**batch, "labels": labels}, num_items_in_batch=2 * len(picked)
    ).loss  # as Trainer asks for
    torch.testing.assert_close(halves, output.loss / 2)
    kept = model(
        batch["input_ids"],
        batch["attention_mask"],
        input_type_mask=batch["input_type_mask"],
        logits_to_keep=torch.tensor([2, 5]),
    ).logits
    torch.testing.assert_close(kept, output.logits[:, [2, 5]])


def test_no_label_is_an_error_as_for_the_other_prompts():
    """transformers gives NaN; a count of items from outside (Trainer, gradient accumulation) makes it 0, as there."""
    model, ids = wrapped(), torch.randint(1, 60, (2, 6))
    nothing = torch.full_like(ids, -100)
    assert torch.isnan(base("Llama")(ids, labels=nothing).loss)
    with pytest.raises(MiniCPTError, match="the loss would be NaN. Label at least one token"):
        model(ids, labels=nothing)
    roles = torch.tensor([[2, 2, 3, 3, 4, 4]] * 2)
    with pytest.raises(
        MiniCPTError, match="after the first token are -100"
    ):  # which nothing predicts
        model(ids, labels=nothing.index_fill(1, torch.tensor([0]), 7), input_type_mask=roles)
    assert model(ids, labels=nothing, num_items_in_batch=3).loss == 0


def test_trainer_trains_the_generators_alone(tmp_path):
    model = wrapped("GPT2")
    rows = [
        {"input_ids": torch.randint(1, 60, (7,)), "labels": torch.tensor([-100] * 5 + [3, 4])}
        for _ in range(6)
    ]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = transformers.TrainingArguments(
        tmp_path,
        max_steps=3,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        gradient_accumulation_steps=2,
        learning_rate=0.05,
        save_strategy="no",
        use_cpu=True,
    )
    transformers.Trainer(model, args, train_dataset=rows).train()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith("base_model."), name


def test_the_base_model_is_not_disturbed():
    model, ids = wrapped(), torch.randint(1, 60, (2, 6))
    fresh = base("Llama")(ids).logits
    other = minicpt.get_peft_model(model.base_model, minicpt.IAPTConfig(bottleneck=4))
    before = model(ids).logits
    other(ids), other.generate(ids, max_new_tokens=2, **GREEDY)
    assert torch.equal(model(ids).logits, before) and torch.equal(
        model.base_model(ids).logits, fresh
    )
    with pytest.raises(MiniCPTError, match="vocabulary"):
        model(ids + 60)
    assert torch.equal(model.base_model(ids).logits, fresh), "a failing call leaves nothing behind"


@pytest.mark.parametrize("n_rows", [31, 32])
def test_activations_are_trained_on_held_out_rows_if_there_are_enough(n_rows):
    """Weights and activations pull at one number each; who saw which rows shows in the gradients."""
    weight, theta = (torch.nn.Parameter(torch.zeros(n_rows)) for _ in range(2))

    def loss_of(rows):
        return (weight[rows] - 1).square().sum() + (theta[rows] - 1).square().sum()

    recipe = Recipe(lr=0.1, epochs=10, batch_size=8)
    train_bilevel(
        loss_of, [weight], [theta], 0.01, n_rows, recipe, torch.Generator().manual_seed(0)
    )
    moved = weight.detach() != 0, theta.detach() != 0
    if n_rows < 32:
        assert all(m.all() for m in moved)
    else:
        assert moved[0].sum() == 24 and moved[1].sum() == 8 and not (moved[0] & moved[1]).any()
    assert theta.max() <= 0.01 * 40 + 1e-6 < weight.max()  # its own learning rate


def test_in_half_precision_the_generators_stay_in_float32():
    model, ids = wrapped(), torch.randint(1, 60, (2, 6))
    exact = soft_tokens(model, input_ids=ids)
    model.base_model.bfloat16()
    assert model(ids).logits.dtype == torch.bfloat16
    soft = soft_tokens(model, input_ids=ids)
    assert soft.dtype == torch.float32
    assert (soft[0] - exact[0]).abs().max() < 0.05 * exact[
        0
    ].abs().max()  # only what it reads is rounded
    x = torch.tensor([400.0], dtype=torch.float16)  # x^6 is far beyond float16's 65504
    assert torch.isfinite(
        iapt.rational(x, *map(torch.tensor, (iapt.GELU_NUMERATOR, iapt.GELU_DENOMINATOR)))
    ).all()


# ---- sizes and start -------------------------------------------------------------------------------------------------


def test_the_activation_starts_as_gelu_within_the_stated_error():
    a, b = torch.tensor(iapt.GELU_NUMERATOR), torch.tensor(iapt.GELU_DENOMINATOR)
    assert (len(a), len(b)) == (7, 5)  # degrees 6 and 5
    for reach, error in (
        (8, 0.0051),
        (10, 0.115),
        (12, 0.335),
    ):  # the fit's errors, rounded up in the last place
        x = torch.linspace(-reach, reach, 20001)
        assert (iapt.rational(x, a, b) - F.gelu(x)).abs().max() < error + 5e-5
    for generator in wrapped().generators:
        assert torch.equal(generator.numerator, a) and torch.equal(generator.denominator, b)


def test_parameter_count_is_the_formulas():
    """MiLoRA's run of IAPT: 32 layers, D = 4096, m = 320 and four tokens have 83.9 M parameters."""
    config = minicpt.IAPTConfig(bottleneck=320, token_dim=4096, num_layers=32)
    with torch.device("meta"):
        generators = iapt.build_generators(config)
    n = sum(p.numel() for p in generators.parameters())
    assert n == 32 * (2 * 4096 * 320 + 320 * 4 + 12) and round(n / 1e6, 1) == 83.9
    config.share_projections = True
    with torch.device("meta"):
        shared = sum(p.numel() for p in iapt.build_generators(config).parameters())
    assert shared == 2 * 4096 * 320 + 32 * (320 * 4 + 12)
    assert sum(p.numel() for p in wrapped().trained().values()) == 2 * (2 * 16 * 8 + 8 * 4 + 12)


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shared", [False, True])
def test_saved_and_loaded_bit_by_bit(tmp_path, shared):
    model, ids = (
        wrapped(share_projections=shared, num_virtual_tokens=3),
        torch.randint(1, 60, (2, 6)),
    )
    for p in model.trained().values():
        p.data += torch.randn_like(p) * 1e-3
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    n = sum(p.numel() for p in model.trained().values())
    assert (tmp_path / "adapter_model.safetensors").stat().st_size < 4 * n + 4000, (
        "the generators' weights only"
    )
    config = minicpt.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, minicpt.IAPTConfig) and config.share_projections == shared
    assert config.bottleneck == 8 and config.num_virtual_tokens == 3
    for trainable in (False, True):
        loaded = minicpt.PeftModel.from_pretrained(
            copy.deepcopy(base("Llama")), tmp_path, is_trainable=trainable
        )
        assert (
            isinstance(loaded, minicpt.PeftModel)
            and loaded.trained().keys() == model.trained().keys()
        )
        assert all(torch.equal(p, model.trained()[name]) for name, p in loaded.trained().items())
        assert all(p.requires_grad == trainable for p in loaded.trained().values())
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert minicpt.get_peft_config(config.to_dict()) == config


def test_damaged_and_foreign_files(tmp_path):
    model = wrapped()
    model.save_pretrained(tmp_path)
    with pytest.raises(
        MiniCPTError, match=r"cannot load IAPT.* use PeftModel.from_pretrained\(model, folder\)"
    ):
        minicpt.AutoPeftModelForCausalLM.from_pretrained(tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    with pytest.raises(MiniCPTError, match="token_dim is 16, the model's is 32"):
        other = transformers.LlamaConfig(**ARCHITECTURES["Llama"] | dict(hidden_size=32))
        minicpt.PeftModel.from_pretrained(transformers.LlamaForCausalLM(other), tmp_path)
    with pytest.raises(MiniCPTError, match="num_layers is 2, the model's is 3"):
        other = transformers.LlamaConfig(**ARCHITECTURES["Llama"] | dict(num_hidden_layers=3))
        minicpt.PeftModel.from_pretrained(transformers.LlamaForCausalLM(other), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"bottleneck": 9}))
    with pytest.raises(MiniCPTError, match="other weights than this configuration"):
        minicpt.PeftModel.from_pretrained(base("Llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"from_the_future": 1}))
    with pytest.warns(
        UserWarning,
        match="IAPT configuration holds fields that minicpt does not know.*from_the_future",
    ):
        minicpt.PeftModel.from_pretrained(base("Llama"), tmp_path)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(MiniCPTError, match="damaged"):
        minicpt.PeftModel.from_pretrained(base("Llama"), tmp_path)
    weights.unlink()
    with pytest.raises(MiniCPTError, match="does not exist"):
        minicpt.PeftModel.from_pretrained(base("Llama"), tmp_path)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(num_virtual_tokens=0), "num_virtual_tokens must be a whole number from 1, got 0"),
        (dict(bottleneck=2.5), "bottleneck must be a whole number from 1, got 2.5"),
        (dict(task_type="SEQ_2_SEQ_LM"), "task_type CAUSAL_LM only"),
    ],
)
def test_bad_configurations(fields, message):
    with pytest.raises(MiniCPTError, match=message):
        minicpt.IAPTConfig(**fields)


def test_models_and_calls_that_cannot_work():
    t5 = transformers.T5Config(
        vocab_size=60, d_model=16, d_ff=24, d_kv=8, num_layers=2, num_heads=2
    )
    with pytest.raises(
        MiniCPTError, match="T5ForConditionalGeneration has no one list of decoder layers"
    ):
        minicpt.get_peft_model(transformers.T5ForConditionalGeneration(t5), minicpt.IAPTConfig())
    with pytest.raises(MiniCPTError, match="in a new configuration leave token_dim out"):
        wrapped(token_dim=8)
    model, ids = wrapped(), torch.randint(1, 60, (2, 6))
    with pytest.raises(MiniCPTError, match="no instruction to read"):
        model(ids, labels=ids)  # every token a label: nothing is left to read
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers is about to rename it
        model.base_model.gradient_checkpointing_enable()
    with pytest.raises(MiniCPTError, match="gradient_checkpointing_disable"):
        model.base_model.train() and model(ids)


# ---- as a method -----------------------------------------------------------------------------------------------------


HP = dict(lr=0.01, epochs=3, batch_size=0, tokens=4, bottleneck=8, activation_lr=1e-3)


def test_fit_is_seeded_and_learns(random_base):
    split = data.make_split(data.load_task("trec"), 4, 0, n_test=6)
    texts = [text for text, _ in split.queries]
    first, again = (fit.fit("iapt", random_base, split, {**HP, "epochs": 8}) for _ in range(2))
    assert torch.equal(first.scores(texts)[0], again.scores(texts)[0])
    assert first.history[-1] < first.history[0] and first.prefix is None
    start = torch.tensor(iapt.GELU_NUMERATOR)
    assert all(not torch.equal(g.numerator, start) for g in first.model.generators)
    fixed = fit.fit("iapt", random_base, split, {**HP, "activation_lr": 0.0})
    assert all(torch.equal(g.numerator, start) for g in fixed.model.generators)


def test_classifier_fits_saves_and_loads(tmp_path):
    texts = ["good film", "bad film", "a joy", "a bore", "fine", "dull", "great fun", "no fun"] * 5
    labels = ["good", "bad"] * 20
    classifier = minicpt.FewShotClassifier("iapt", hp={"epochs": 2}).fit(
        texts, labels
    )  # 40 rows: some are held out
    expected = classifier.predict_proba(texts[:8])
    other = minicpt.FewShotClassifier("iapt", hp={"epochs": 1}, random_state=1).fit(texts, labels)
    assert not (other.predict_proba(texts[:8]) == expected).all()
    assert (classifier.predict_proba(texts[:8]) == expected).all(), (
        "two classifiers on one base model"
    )
    classifier.save(tmp_path)
    loaded = minicpt.FewShotClassifier.load(tmp_path)
    assert (loaded.predict_proba(texts[:8]) == expected).all()


def test_peft_itself_does_not_know_iapt(tmp_path):
    wrapped().save_pretrained(tmp_path)
    with pytest.raises((KeyError, ValueError)):
        peft.PeftModel.from_pretrained(copy.deepcopy(base("Llama")), tmp_path)
