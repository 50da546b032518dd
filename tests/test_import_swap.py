"""Code written for PEFT's prompt methods, run with both libraries: one function per habit, equal numbers."""

import copy
import inspect
import warnings

import peft
import pytest
import torch
import transformers

import minicpt
from minicpt.errors import MiniCPTError

BOTH = (peft, minicpt)
CONTEXT_IDS = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15]
CONTEXT_TYPES = [1, 2, 2, 3, 4, 0, 5, 6, 7, 8, 0]


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=".*(pin_memory|Position ids are not supported|pad_token).*"
        )
        yield


def cpt(lib, model, name="default", **kwargs):
    kwargs = (
        dict(
            task_type=lib.TaskType.CAUSAL_LM,
            cpt_token_ids=CONTEXT_IDS,
            cpt_mask=[1] * len(CONTEXT_IDS),
            cpt_tokens_type_mask=CONTEXT_TYPES,
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=0.95,
            opt_projection_epsilon=2.0,
            opt_projection_format_epsilon=1.0,
        )
        | kwargs
    )
    return lib.get_peft_model(copy.deepcopy(model), lib.CPTConfig(**kwargs), name)


def pt(lib, model, **kwargs):
    torch.manual_seed(1)
    config = lib.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, **kwargs)
    return lib.get_peft_model(copy.deepcopy(model), config)


def query(rows=2, T=7, seed=0):
    ids = torch.randint(1, 60, (rows, T), generator=torch.Generator().manual_seed(seed))
    types = torch.tensor([[1, 2, 2, 0, 3, 4, 4][:T]] * rows)
    return dict(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        labels=ids.clone(),
        input_type_mask=types,
    )


def moved(*models):
    """The models, their prompts moved away from the start in the same way."""
    for model in models:
        encoder = model.prompt_encoder[model.active_adapter]
        weight = getattr(encoder, "delta_embedding", encoder.embedding).weight
        weight.data = torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    return models


# ---- names ----------------------------------------------------------------------------------------------------------


def test_everything_that_prompt_code_imports_is_there():
    for name in (
        "AutoPeftModelForCausalLM PeftModel PeftConfig PeftModelForCausalLM get_peft_model CPTConfig "
        "CPTEmbedding PromptTuningConfig PromptTuningInit PromptEmbedding TaskType PeftType get_peft_config "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification "
        "get_peft_model_state_dict set_peft_model_state_dict"
    ).split():
        assert hasattr(minicpt, name), name
        theirs = getattr(peft, name, None) or getattr(peft.tuners, name)
        assert getattr(minicpt, name) is theirs or inspect.getdoc(getattr(minicpt, name)), name


def test_signatures_take_what_pefts_take():
    for name in ("get_peft_model", "CPTConfig", "get_peft_config"):
        ours, theirs = (
            list(inspect.signature(getattr(lib, name)).parameters) for lib in (minicpt, peft)
        )
        assert ours[: len(theirs)] == theirs


def test_instances_count_as_what_they_are_in_peft(gpt2):
    model = cpt(minicpt, gpt2)
    lora = minicpt.get_peft_model(
        copy.deepcopy(gpt2), minicpt.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True)
    )
    for each in (model, lora):
        assert isinstance(each, minicpt.PeftModel) and isinstance(
            each, minicpt.PeftModelForCausalLM
        )
        assert isinstance(each, peft.PeftModel)
    assert isinstance(model.peft_config["default"], minicpt.PeftConfig)
    assert not isinstance(gpt2, minicpt.PeftModel) and not isinstance(
        lora.peft_config["default"], minicpt.CPTConfig
    )


def test_get_peft_config_builds_our_config():
    fields = dict(
        peft_type="CPT", task_type="CAUSAL_LM", cpt_token_ids=[1, 2], cpt_tokens_type_mask=[1, 4]
    )
    config = minicpt.get_peft_config(fields)
    assert (
        isinstance(config, minicpt.CPTConfig)
        and config.num_virtual_tokens == 2
        and config.peft_type == "CPT"
    )
    other = minicpt.get_peft_config(
        dict(peft_type="PROMPT_TUNING", task_type="CAUSAL_LM", num_virtual_tokens=3)
    )
    assert isinstance(other, minicpt.PromptTuningConfig)


# ---- the example notebook's way: own dataset, own collator, Trainer, per-row scoring ---------------------------------


class Sentences(torch.utils.data.Dataset):
    """Sentences of 2-5 tokens between templates, each with a label of one or two tokens."""

    def __init__(self, n):
        generator = torch.Generator().manual_seed(0)
        self.rows = []
        for i in range(n):
            text = torch.randint(20, 60, (2 + i % 4,), generator=generator).tolist()
            label = [16] if i % 2 else [17, 18]
            types = [1, *[2] * len(text), 0, 3, *[4] * len(label), 0]
            self.rows.append(([1, *text, 2, 3, *label, 4], types))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        ids, types = self.rows[i]
        return {"input_ids": ids, "input_type_mask": types, "attention_mask": [1] * len(ids)}


def collate(features):
    length = max(len(f["input_ids"]) for f in features)
    batch = {
        key: torch.tensor([f[key] + [0] * (length - len(f[key])) for f in features])
        for key in features[0]
    }
    batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    return batch


def train_and_score(lib, base, folder, batch_size, **fields):
    model = cpt(lib, base, **fields)
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        num_train_epochs=2,
        learning_rate=0.05,
        seed=3,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        remove_unused_columns=False,
        disable_tqdm=True,
    )
    data = Sentences(8)
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=data, data_collator=collate
    )
    trainer.train()
    losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    model.eval()
    scores = []
    for i in range(len(data)):
        row = {key: value.to(model.device) for key, value in collate([data[i]]).items()}
        n = row["labels"].shape[1]
        with torch.no_grad():
            outputs = model(input_ids=row["input_ids"], attention_mask=row["attention_mask"])
        logits = outputs.logits[..., :-1, :][
            0, -n + 1 :
        ]  # of n query tokens all but the first are predicted
        is_label = row["input_type_mask"][0, 1:] == 4
        scores.append(logits.log_softmax(-1)[is_label, row["labels"][0, 1:][is_label]].mean())
    return model, losses, torch.stack(scores)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_trainer_with_pefts_default_context(gpt2, tmp_path, batch_size):
    """What PEFT's own tests of CPT do: all types at their default, rows with types, two epochs, delta in its ball."""
    deltas = []
    for lib in BOTH:
        fields = dict(cpt_token_ids=None, cpt_mask=None, cpt_tokens_type_mask=None)
        model, losses, _ = train_and_score(lib, gpt2, tmp_path, batch_size, **fields)
        encoder = model.prompt_encoder.default
        assert torch.equal(encoder.embedding.weight, gpt2.get_input_embeddings().weight[:1])
        deltas.append(encoder.get_projection().detach().clone())
        assert (deltas[-1].norm(dim=1) <= encoder.get_epsilon() * (1 + 1e-6)).all()
    assert deltas[0].norm() > 0
    torch.testing.assert_close(deltas[1], deltas[0], rtol=1e-2, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [1, 2])
def test_trainer_and_scoring(gpt2, tmp_path, batch_size):
    (theirs, *a), (ours, *b) = (train_and_score(lib, gpt2, tmp_path, batch_size) for lib in BOTH)
    assert len(a[0]) == 16 // batch_size
    torch.testing.assert_close(a[0], b[0], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(a[1], b[1], rtol=1e-3, atol=1e-3)
    encoder = ours.prompt_encoder.default
    assert torch.equal(encoder.embedding.weight, gpt2.get_input_embeddings().weight[CONTEXT_IDS])
    delta, types = encoder.get_projection(), torch.tensor(CONTEXT_TYPES)
    assert torch.equal(delta[types % 4 == 0], torch.zeros(int((types % 4 == 0).sum()), 16))
    assert (delta[types % 4 != 0].norm(dim=1) > 0).all()
    assert (delta.norm(dim=1) <= encoder.get_epsilon() * (1 + 1e-6)).all()
    torch.testing.assert_close(encoder.get_epsilon(), theirs.prompt_encoder.default.get_epsilon())
    torch.testing.assert_close(
        delta, theirs.prompt_encoder.default.get_projection(), rtol=1e-2, atol=1e-3
    )


@pytest.mark.parametrize("make", [cpt, pt])
def test_parameter_counts(gpt2, make, capsys):
    counts, printed = [], []
    for lib in BOTH:
        model = make(lib, gpt2)
        counts.append(model.get_nb_trainable_parameters())
        model.print_trainable_parameters()
        printed.append(capsys.readouterr().out)
    assert counts[0] == counts[1] and printed[0] == printed[1] and "trainable%" in printed[0]


# ---- generation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cpt, pt])
@pytest.mark.parametrize(
    "options",
    [dict(do_sample=False), dict(do_sample=True, top_k=20), dict(num_beams=3)],
    ids=["greedy", "sampling", "beams"],
)
@pytest.mark.parametrize("with_mask", [True, False])
def test_generate(gpt2, make, options, with_mask):
    """Without padding: `test_padding.py` has what comes of padding, where PEFT differs."""
    ids, texts = query()["input_ids"], []
    for model in moved(*(make(lib, gpt2).eval() for lib in BOTH)):
        torch.manual_seed(7)
        kwargs = dict(attention_mask=torch.ones_like(ids)) if with_mask else {}
        kwargs |= dict(max_new_tokens=5, pad_token_id=0, eos_token_id=59)
        texts.append(model.generate(input_ids=ids, **kwargs, **options))
    assert torch.equal(*texts)
    assert texts[0].shape[1] > ids.shape[1]


def test_generate_honours_zeros_of_cpt_mask(gpt2):
    """Greedy generation is what repeated forward passes give, hidden context tokens included."""
    model = cpt(minicpt, gpt2, cpt_mask=[1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]).eval()
    moved(model)
    ids = query(1)["input_ids"]
    expected = ids
    for _ in range(4):
        next_id = (
            model(input_ids=expected, attention_mask=torch.ones_like(expected))
            .logits[:, -1]
            .argmax(-1)
        )
        expected = torch.cat((expected, next_id[:, None]), dim=1)
    assert torch.equal(
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, eos_token_id=None),
        expected,
    )


# ---- what people do to models ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cpt, pt])
def test_modes_and_types(gpt2, make):
    theirs, ours = moved(*(make(lib, gpt2) for lib in BOTH))
    batch = query()
    if make is pt:
        batch.pop("input_type_mask")
    ours.train()
    assert ours.training and ours.base_model.training and ours.prompt_encoder.default.training
    ours.eval()
    assert not ours.base_model.training
    outputs = []
    for model in (theirs.eval(), ours):
        model.half().to("cpu")
        assert model.prompt_encoder.default.embedding.weight.dtype == torch.float16
        outputs.append(model(**copy.deepcopy(batch)))
    assert outputs[0].logits.dtype == outputs[1].logits.dtype == torch.float16
    torch.testing.assert_close(outputs[0].logits, outputs[1].logits, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(
        outputs[0].loss.float(), outputs[1].loss.float(), rtol=1e-2, atol=1e-2
    )


@pytest.mark.parametrize("base_dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_with_a_float32_prompt(gpt2, base_dtype):
    outputs = []
    for lib in BOTH:
        model = cpt(lib, copy.deepcopy(gpt2).to(base_dtype))
        moved(model)
        assert model.prompt_encoder.default.delta_embedding.weight.dtype == torch.float32
        outputs.append(model(**query()))
        outputs[-1].loss.backward()
        outputs[-1] = outputs[-1].logits, model.prompt_encoder.default.delta_embedding.weight.grad
    torch.testing.assert_close(outputs[0][0], outputs[1][0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(outputs[0][1], outputs[1][1], rtol=5e-2, atol=5e-3)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradient(gpt2, reentrant):
    grads = []
    for checkpointing in (False, True):
        model = cpt(minicpt, gpt2)
        moved(model)
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": reentrant}
            )
        model.train()
        model(**query()).loss.backward()
        grads.append(model.prompt_encoder.default.delta_embedding.weight.grad)
    torch.testing.assert_close(*grads)


def test_a_deep_copy_freezes_labels_too(gpt2):
    model = copy.deepcopy(cpt(minicpt, gpt2))
    model(**query()).loss.backward()
    grad = model.prompt_encoder.default.delta_embedding.weight.grad
    assert torch.equal(grad.norm(dim=1) > 0, torch.tensor(CONTEXT_TYPES) % 4 != 0)


def test_caller_gives_embeddings_instead_of_ids(gpt2):
    batch = query()
    embeds = gpt2.get_input_embeddings()(batch.pop("input_ids")).detach()
    a, b = (cpt(lib, gpt2)(inputs_embeds=embeds, **copy.deepcopy(batch)) for lib in BOTH)
    torch.testing.assert_close(a.logits, b.logits)
    torch.testing.assert_close(a.loss, b.loss)


def test_several_adapters_of_any_name(gpt2):
    """Each adapter computes what PEFT computes with that adapter alone; PEFT knows the name `default` only."""
    other = dict(
        cpt_token_ids=[20, 21, 22, 23],
        cpt_mask=[1] * 4,
        cpt_tokens_type_mask=[1, 2, 3, 4],
        opt_loss_decay_factor=0.5,
    )
    with pytest.raises(KeyError):
        cpt(peft, gpt2, name="first")(**query())
    model = cpt(minicpt, gpt2, name="first")
    model.add_adapter("second", cpt(minicpt, gpt2, **other).peft_config["default"])
    expected = {"first": cpt(peft, gpt2)(**query()), "second": cpt(peft, gpt2, **other)(**query())}
    for name in ("first", "second", "first"):
        model.set_adapter(name)
        output = model(**query())
        torch.testing.assert_close(output.logits, expected[name].logits)
        torch.testing.assert_close(output.loss, expected[name].loss)
    model(**query()).loss.backward()
    assert model.prompt_encoder["first"].delta_embedding.weight.grad is not None
    assert model.prompt_encoder["second"].delta_embedding.weight.grad is None
    ids = query()["input_ids"]
    with model.disable_adapter():
        torch.testing.assert_close(model(input_ids=ids).logits, gpt2(ids).logits)
        plain = model.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(
        plain, gpt2.generate(input_ids=ids, max_new_tokens=3, do_sample=False, pad_token_id=0)
    )
    torch.testing.assert_close(model(input_ids=ids).logits, expected["first"].logits)
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("third")


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["type mask", "labels"])
def test_finite_but_doubtful_gives_pefts_number_and_one_warning(gpt2, missing):
    batch = query()
    if missing == "labels":
        batch["labels"] = torch.full_like(batch["labels"], -100)
    else:
        del batch["input_type_mask"]
    expected = cpt(peft, gpt2)(**copy.deepcopy(batch)).loss
    model = cpt(minicpt, gpt2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        values = [model(**copy.deepcopy(batch)).loss for _ in range(3)]
    assert len([w for w in caught if "as in PEFT" in str(w.message)]) == 1
    for value in values:
        torch.testing.assert_close(value, expected)


@pytest.mark.parametrize("largest", [1, 2, 3, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_an_unfinished_context_gives_pefts_number_and_one_warning(gpt2, largest, shared):
    """PEFT's default, all ones, and contexts whose last example has no label: roles shift, and it is said."""
    types = {1: None, 2: [1, 2, 2, 2], 3: [1, 2, 2, 3], 5: [1, 3, 4, 5]}[largest]
    fields = dict(cpt_token_ids=[5, 6, 7, 8], cpt_mask=[1] * 4, cpt_tokens_type_mask=types)
    theirs, ours = moved(*(cpt(lib, gpt2, **fields) for lib in BOTH))
    ours.shared_prefix = shared
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses = [ours(**query()).loss for _ in range(2)]
    losses[0].backward()
    said = [str(w.message) for w in caught if "unfinished example" in str(w.message)]
    assert len(said) == 1 and f"of type {4 - largest % 4} count as its label" in said[0]
    expected = theirs(**query()).loss
    expected.backward()
    torch.testing.assert_close(losses, [expected] * 2)
    torch.testing.assert_close(
        *(m.prompt_encoder.default.delta_embedding.weight.grad for m in (ours, theirs))
    )
    no_types = {k: v for k, v in query().items() if k != "input_type_mask"}
    if largest != 5:
        assert theirs(**copy.deepcopy(no_types)).loss.isnan()
        with pytest.raises(MiniCPTError, match="the loss would be NaN"):
            ours(**no_types)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(input_ids=torch.full((2, 7), 60)), "outside the model's vocabulary of 60"),
        (
            dict(labels=torch.full((2, 7), 99)),
            "labels: token ids .* outside the model's vocabulary",
        ),
        (dict(labels=torch.ones(2, 18, dtype=torch.long)), "labels has shape"),
        (dict(input_type_mask=torch.ones(2, 5, dtype=torch.long)), "input_type_mask has shape"),
        (dict(return_dict=False), "return_dict=True"),
    ],
)
def test_bad_batches_raise_with_advice(gpt2, change, message):
    with pytest.raises(MiniCPTError, match=message):
        cpt(minicpt, gpt2)(**{**query(), **change})


def test_where_peft_gives_nan_we_raise(gpt2):
    """No label anywhere: not in the context's types, or (prompt tuning) not in the batch."""
    no_label = dict(cpt_token_ids=[5, 6, 7], cpt_mask=[1] * 3, cpt_tokens_type_mask=[0, 0, 0])
    batch = query() | dict(labels=torch.full((2, 7), -100))
    assert cpt(peft, gpt2, **no_label)(**copy.deepcopy(batch)).loss.isnan()
    with pytest.raises(MiniCPTError, match="the loss would be NaN"):
        cpt(minicpt, gpt2, **no_label)(**batch)
    del batch["input_type_mask"]
    assert pt(peft, gpt2)(**batch).loss.isnan()
    with pytest.raises(MiniCPTError, match="the loss would be NaN"):
        pt(minicpt, gpt2)(**batch)


@pytest.mark.parametrize("make", [cpt, pt])
def test_generate_refuses_ids_outside_the_vocabulary(gpt2, make):
    with pytest.raises(MiniCPTError, match="outside the model's vocabulary"):
        make(minicpt, gpt2).generate(input_ids=torch.tensor([[1, 77]]), max_new_tokens=2)


def test_neither_ids_nor_embeddings(gpt2):
    for lib in BOTH:
        with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
            cpt(lib, gpt2)(labels=query()["labels"])


# ---- a documentation example, word for word but for the import line --------------------------------

SCRIPT = """
from peft import (PeftConfig, PeftModel, PromptTuningConfig, PromptTuningInit, TaskType, get_peft_config,
                  get_peft_model)
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(micro)
model = AutoModelForCausalLM.from_pretrained(base)
config = PromptTuningConfig(
    task_type=TaskType.CAUSAL_LM, prompt_tuning_init=PromptTuningInit.TEXT, num_virtual_tokens=8,
    prompt_tuning_init_text="Classify if the review is good or bad:", tokenizer_name_or_path=micro)
model = get_peft_model(model, config)
model.print_trainable_parameters()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-2)
batch = tokenizer(["the movie was good", "the movie was bad"], return_tensors="pt")
for epoch in range(3):
    loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
model.save_pretrained(out)

config = PeftConfig.from_pretrained(out)
assert config.base_model_name_or_path == base
model = AutoModelForCausalLM.from_pretrained(config.base_model_name_or_path)
model = PeftModel.from_pretrained(model, out)
model.eval()
text = model.generate(**batch, max_new_tokens=5, do_sample=False, pad_token_id=0)
again = get_peft_config(config.to_dict())
"""


def test_a_documentation_example_runs_with_the_import_line_swapped(random_base, tmp_path, capsys):
    from minicpt.engine.base_models import MICRO

    random_base.model.save_pretrained(tmp_path / "base")
    results = []
    for script in (SCRIPT, SCRIPT.replace("from peft import", "from minicpt import")):
        names = dict(micro=str(MICRO), base=str(tmp_path / "base"), out=str(tmp_path / "out"))
        exec(script, names)
        results.append(
            (names["loss"].detach(), names["text"], capsys.readouterr().out, names["again"])
        )
    (loss, text, printed, config), ours = results
    torch.testing.assert_close(ours[0], loss)
    assert torch.equal(ours[1], text) and ours[2] == printed and ours[3] == config
