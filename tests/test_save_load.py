"""Adapters in PEFT's format: both ways, trained further, resumed bit by bit, damaged, interrupted."""

import copy
import json
import os
import shutil
import tempfile
import warnings

import peft
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from test_architectures import ARCHITECTURES, base
from test_core import configs, contexts
from test_import_swap import CONTEXT_IDS, Sentences, collate, cpt, moved, pt, query

import minicpt
from minicpt.dropin import saving
from minicpt.errors import MiniCPTError

BOTH = (peft, minicpt)
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def quiet():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Unexpected keyword arguments|pin_memory).*")
        yield


def logits(model, seed=2):
    model.shared_prefix = False  # PEFT's forward: bit by bit means one order of sums
    with torch.no_grad():
        return model.eval()(input_ids=query(seed=seed)["input_ids"]).logits


def train(model, steps, lr=0.05):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    batch = query()
    if model.peft_type != "CPT":
        del batch["input_type_mask"]
    for _ in range(steps):
        optimizer.zero_grad()
        model(**copy.deepcopy(batch)).loss.backward()
        optimizer.step()
    return model


# ---- both ways -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [cpt, pt])
@pytest.mark.parametrize("source, target", [(minicpt, peft), (peft, minicpt), (minicpt, minicpt)])
def test_logits_survive(gpt2, make, source, target, tmp_path):
    """Bit by bit, whichever library saves or loads, and when the loaded one is saved and loaded again."""
    model = train(make(source, gpt2), 3)
    model.save_pretrained(tmp_path / "a")
    loaded = target.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path / "a")
    assert torch.equal(logits(loaded), logits(model)) and not loaded.training
    loaded.save_pretrained(tmp_path / "b")
    again = source.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path / "b")
    assert torch.equal(logits(again), logits(model))
    if target is minicpt:
        assert isinstance(loaded, minicpt.PeftModelForCausalLM)
        ids = query()["input_ids"]
        a, b = (
            m.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
            for m in (model, loaded)
        )
        assert torch.equal(a, b)


@settings(max_examples=15, deadline=None)
@example(
    ([0], [4]), "Gemma", True, 0.0
)  # a padding token: its embedding is zero, so nothing hides rounding
@given(contexts(), st.sampled_from(sorted(ARCHITECTURES)), st.booleans(), st.floats(0, 3))
def test_any_context_comes_back_bit_equal(context, name, trainable, epsilon):
    _, config = configs(*context, opt_projection_epsilon=epsilon)
    model = minicpt.get_peft_model(copy.deepcopy(base(name)), config)
    moved(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = minicpt.PeftModel.from_pretrained(
            copy.deepcopy(base(name)), folder, is_trainable=trainable
        )
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize("source", BOTH)
@pytest.mark.parametrize("make", [cpt, pt])
def test_either_kind_trains_further(gpt2, make, source, tmp_path):
    """A loaded prompt goes on as if it had never been saved; PEFT refuses to make it trainable."""
    model = train(make(source, gpt2), 4, lr=1.0)
    model.save_pretrained(tmp_path)
    if source is minicpt and make is cpt:
        (tmp_path / saving.STATE).unlink()  # as if it came from PEFT
    loaded = minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path, is_trainable=True)
    torch.testing.assert_close(logits(loaded), logits(model))
    if make is cpt:
        encoder = loaded.prompt_encoder.default
        assert torch.equal(
            encoder.embedding.weight, gpt2.get_input_embeddings().weight[CONTEXT_IDS]
        )
        torch.testing.assert_close(
            encoder.get_projection(), model.prompt_encoder.default.get_projection()
        )
    torch.testing.assert_close(
        logits(train(loaded, 4, 1.0)), logits(train(model, 4, 1.0)), rtol=1e-4, atol=1e-5
    )
    with pytest.raises(ValueError, match="trainable"):
        peft.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path, is_trainable=True)


@pytest.mark.parametrize("name", ["Bloom", "Gemma2", "OPT"])
def test_both_ways_on_other_architectures(name, tmp_path):
    for source, target in ((minicpt, peft), (peft, minicpt)):
        model = source.get_peft_model(
            copy.deepcopy(base(name)), configs([5, 6, 7, 8], [1, 2, 3, 4])[source is minicpt]
        )
        moved(model)
        model.save_pretrained(tmp_path)
        loaded = target.PeftModel.from_pretrained(copy.deepcopy(base(name)), tmp_path)
        torch.testing.assert_close(
            logits(loaded), logits(model)
        )  # PEFT projects while it saves, and then once more


def test_configuration_survives_with_our_fields(gpt2, tmp_path):
    model = cpt(
        minicpt,
        gpt2,
        opt_loss_reduction="sum",
        opt_epsilon_unit="mean_norm",
        opt_context_loss_weight=0.5,
    )
    model.save_pretrained(tmp_path)
    for config in (
        minicpt.CPTConfig.from_pretrained(tmp_path),
        minicpt.PeftConfig.from_pretrained(tmp_path),
    ):
        assert isinstance(config, minicpt.CPTConfig)
        ours = config.opt_loss_reduction, config.opt_epsilon_unit, config.opt_context_loss_weight
        assert ours == ("sum", "mean_norm", 0.5)
    values = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(values | {"from_the_future": 1}))
    with pytest.warns(UserWarning, match="from_the_future"):
        minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path)


def test_named_adapters_have_folders_of_their_own(gpt2, tmp_path):
    model = cpt(minicpt, gpt2, name="first")
    model.add_adapter(
        "second", cpt(minicpt, gpt2, cpt_token_ids=list(range(20, 31))).peft_config["default"]
    )
    expected = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        moved(model)
        expected[name] = logits(model)
    model.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_dir()) == ["first", "second"]
    loaded = minicpt.PeftModel.from_pretrained(
        copy.deepcopy(gpt2), tmp_path / "first", adapter_name="a"
    )
    loaded.load_adapter(tmp_path, "b", subfolder="second", is_trainable=True)
    for name, key in (("a", "first"), ("b", "second"), ("a", "first")):
        loaded.set_adapter(name)
        torch.testing.assert_close(logits(loaded), expected[key])
    torch.testing.assert_close(
        logits(peft.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path / "second")),
        expected["second"],
    )
    model.save_pretrained(tmp_path / "one", selected_adapters=["second"])
    assert [p.name for p in (tmp_path / "one").iterdir() if p.is_dir()] == ["second"]


def test_auto_class_loads_base_and_adapter(gpt2, tmp_path):
    gpt2.save_pretrained(tmp_path / "base")
    model = cpt(minicpt, transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    moved(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = minicpt.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    assert isinstance(loaded, minicpt.PeftModelForCausalLM)
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("direct", [False, True])
def test_other_methods_pass_through(gpt2, direct, tmp_path):
    """LoRA and prefix tuning are PEFT's, also when our wrapper's class is named."""
    ids = query()["input_ids"]
    for config in (
        minicpt.LoraConfig(task_type="CAUSAL_LM", fan_in_fan_out=True, init_lora_weights=False),
        minicpt.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        make = minicpt.PeftModelForCausalLM if direct else minicpt.get_peft_model
        model = make(copy.deepcopy(gpt2), config).eval()
        model.save_pretrained(tmp_path)
        loaded = minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), tmp_path)
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits)
        assert not torch.allclose(loaded(input_ids=ids).logits, gpt2(ids).logits)
        if direct and config.peft_type == "LORA":
            model.load_adapter(tmp_path, "second", is_trainable=True)
            model.set_adapter("second")
            torch.testing.assert_close(model(input_ids=ids).logits, loaded(input_ids=ids).logits)


# ---- resuming --------------------------------------------------------------------------------------------------------


class Run:
    """A training run with everything that must come back: AdamW, schedule, shuffling, dropout."""

    def __init__(self, model):
        self.model = model.train()
        self.optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad], lr=0.1
        )
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda step: 1 - step / 12
        )
        self.generator = torch.Generator().manual_seed(4)
        self.losses = []

    @property
    def parts(self):
        return dict(optimizer=self.optimizer, scheduler=self.scheduler, generator=self.generator)

    def step(self, n):
        for _ in range(n):
            batch = query(rows=3, seed=int(torch.randint(100, (1,), generator=self.generator)))
            loss = self.model(**batch).loss
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.scheduler.step()
            self.losses.append(loss.item())
        return self


@pytest.fixture
def dropping(gpt2):
    model = copy.deepcopy(gpt2)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    return model


@pytest.mark.parametrize("stop", [0, 1, 2, 5, 9])
def test_a_run_stopped_at_any_step_ends_bit_equal(dropping, stop, tmp_path):
    torch.manual_seed(0)
    whole = Run(cpt(minicpt, dropping)).step(10)
    torch.manual_seed(0)
    first = Run(cpt(minicpt, dropping)).step(stop)
    first.model.save_pretrained(tmp_path, training_state=first.parts)
    random_state = torch.get_rng_state()
    torch.manual_seed(99)  # another process has another random state
    resumed = Run(
        minicpt.PeftModel.from_pretrained(copy.deepcopy(dropping), tmp_path, is_trainable=True)
    )
    minicpt.load_training_state(tmp_path, **resumed.parts)
    resumed.step(10 - stop)
    assert first.losses + resumed.losses == whole.losses
    for name, weight in whole.model.prompt_encoder.state_dict().items():
        assert torch.equal(weight, resumed.model.prompt_encoder.state_dict()[name])
    torch.set_rng_state(random_state)
    first.step(10 - stop)  # and saving did not disturb the run that went on
    assert torch.equal(
        *(r.model.prompt_encoder.default.delta_embedding.weight for r in (first, resumed))
    )
    assert not [
        p for p in tmp_path.rglob("*") if p.suffix not in (".json", ".safetensors", ".md")
    ]  # no pickle


def test_soft_prompts_resume_too(dropping, tmp_path):
    def step(model, optimizer, n):
        for _ in range(n):
            optimizer.zero_grad()
            model(input_ids=query()["input_ids"], labels=query()["labels"]).loss.backward()
            optimizer.step()

    ends = []
    for stop in (6, 2):
        torch.manual_seed(0)
        model = pt(minicpt, dropping).train()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
        step(model, optimizer, stop)
        if stop == 2:
            model.save_pretrained(tmp_path, training_state={"optimizer": optimizer})
            model = minicpt.PeftModel.from_pretrained(
                copy.deepcopy(dropping), tmp_path, is_trainable=True
            ).train()
            optimizer = torch.optim.AdamW(
                [p for p in model.parameters() if p.requires_grad], lr=9.0
            )
            minicpt.load_training_state(tmp_path, optimizer=optimizer)
            step(model, optimizer, 4)
        ends.append(model.prompt_encoder.default.embedding.weight)
    assert torch.equal(*ends)


@pytest.mark.slow
def test_the_trainer_resumes_bit_equal(dropping, tmp_path):
    """PEFT's CPT resumes from another prompt: it loads embedding + delta as the centre and starts delta at zero."""

    def trainer(folder, lib=minicpt):
        arguments = transformers.TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=6,
            learning_rate=0.05,
            save_steps=2,
            seed=3,
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
            disable_tqdm=True,
            logging_strategy="no",
        )
        model = cpt(lib, dropping)
        return transformers.Trainer(
            model=model, args=arguments, train_dataset=Sentences(6), data_collator=collate
        )

    whole, resumed = trainer(tmp_path), trainer(tmp_path)
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(
        *(t.model.prompt_encoder.default.delta_embedding.weight for t in (whole, resumed))
    )
    theirs = trainer(tmp_path / "peft", peft)
    theirs.train()
    theirs.train(resume_from_checkpoint=str(tmp_path / "peft/checkpoint-2"))
    moved_centre = theirs.model.prompt_encoder.default.embedding.weight
    assert not torch.allclose(moved_centre, dropping.get_input_embeddings().weight[CONTEXT_IDS])


def test_training_state_says_what_is_wrong(gpt2, tmp_path):
    run = Run(cpt(minicpt, gpt2)).step(1)
    with pytest.raises(MiniCPTError, match="does not exist"):
        minicpt.load_training_state(tmp_path, **run.parts)
    run.model.save_pretrained(tmp_path)
    with pytest.raises(MiniCPTError, match="no training state"):
        minicpt.load_training_state(tmp_path, **run.parts)
    run.model.save_pretrained(tmp_path, training_state=run.parts)
    with pytest.raises(
        MiniCPTError, match=r"keeps the state of \['generator', 'optimizer', 'scheduler'\]"
    ):
        minicpt.load_training_state(tmp_path, optimizer=run.optimizer)
    run.optimizer.param_groups[0]["lambda"] = lambda: 0
    before = (tmp_path / saving.STATE).read_bytes()
    with pytest.raises(MiniCPTError, match="training_state holds a function"):
        run.model.save_pretrained(tmp_path, training_state=run.parts)
    assert (tmp_path / saving.STATE).read_bytes() == before


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(gpt2, tmp_path):
    """A folder with a moved CPT prompt, and its logits."""
    model = train(cpt(minicpt, gpt2), 3, lr=1.0)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", logits(model)


@pytest.mark.parametrize("trainable", [False, True])
@pytest.mark.parametrize("file", ["adapter_config.json", WEIGHTS, saving.STATE])
@pytest.mark.parametrize("keep", [0, 0.5, 0.99])
def test_truncated_files(gpt2, saved, file, keep, trainable):
    folder, expected = saved
    whole = (folder / file).read_bytes()
    (folder / file).write_bytes(whole[: int(len(whole) * keep)])
    load = lambda: minicpt.PeftModel.from_pretrained(
        copy.deepcopy(gpt2), folder, is_trainable=trainable
    )  # noqa: E731
    if file == saving.STATE and not trainable:
        assert torch.equal(logits(load()), expected)  # inference does not need it
    else:
        with pytest.raises(MiniCPTError, match="damaged"):
            load()


@pytest.mark.parametrize(
    "tensors, message",
    [
        ({"base_model.model.h.0.lora_A.weight": torch.ones(2, 2)}, "no 'prompt_embeddings'"),
        (
            {"prompt_embeddings": torch.ones(11, 32)},
            r"shape \(11, 32\), this model needs \(11, 16\)",
        ),
        ({"prompt_embeddings": torch.ones(4, 16)}, r"shape \(4, 16\), this model needs \(11, 16\)"),
    ],
)
def test_foreign_weights(gpt2, saved, tensors, message):
    folder, _ = saved
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    for trainable in (False, True):
        with pytest.raises(MiniCPTError, match=message):
            minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder, is_trainable=trainable)


@pytest.mark.parametrize("config", ["[]", "{}", '{"peft_type": "SOMETHING"}', "no json"])
def test_foreign_configurations(gpt2, saved, config):
    folder, _ = saved
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(MiniCPTError, match="damaged or no PEFT adapter"):
        minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder)


def test_missing_files(gpt2, saved):
    folder, _ = saved
    (folder / WEIGHTS).unlink()
    with pytest.raises(MiniCPTError, match="holds no adapter_model.safetensors"):
        minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(ValueError, match="adapter_config.json"):
        minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder)


@pytest.mark.parametrize("named", [False, True])
def test_a_prompt_from_a_text_trains_further_without_its_tokenizer(gpt2, tmp_path, named):
    """The start values are about to be overwritten: nobody needs to tokenise the text again."""
    from minicpt.engine.base_models import MICRO

    shutil.copytree(MICRO, tmp_path / "tokenizer")
    config = minicpt.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text=".",
        tokenizer_name_or_path=str(tmp_path / "tokenizer"),
    )
    model = minicpt.get_peft_model(copy.deepcopy(gpt2), config)
    model.prompt_encoder.default.embedding.weight.data.mul_(2)
    model.save_pretrained(tmp_path / "prompt")
    shutil.rmtree(tmp_path / "tokenizer")
    if named:
        again = pt(minicpt, gpt2)
        again.load_adapter(tmp_path / "prompt", "again", is_trainable=True)
        again.set_adapter("again")
    else:
        again = minicpt.PeftModel.from_pretrained(
            copy.deepcopy(gpt2), tmp_path / "prompt", is_trainable=True
        )
    assert again.active_peft_config.prompt_tuning_init == "TEXT"  # and is saved as such
    weight = again.prompt_encoder[again.active_adapter].embedding.weight
    assert torch.equal(weight, model.prompt_encoder.default.embedding.weight)
    again(input_ids=torch.tensor([[1, 2]]), labels=torch.tensor([[1, 2]])).loss.backward()
    assert weight.grad.norm() > 0


def test_another_base_model(gpt2, saved):
    """Same width, other embeddings: fine for inference, but the ball would have another centre."""
    folder, _ = saved
    (folder / saving.STATE).unlink()
    other = copy.deepcopy(gpt2)
    torch.nn.init.normal_(other.get_input_embeddings().weight, std=3.0)
    minicpt.PeftModel.from_pretrained(copy.deepcopy(other), folder)
    with pytest.raises(MiniCPTError, match="another base model"):
        minicpt.PeftModel.from_pretrained(other, folder, is_trainable=True)
    wide = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=60, n_embd=32, n_layer=1, n_head=2)
    )
    with pytest.raises(MiniCPTError, match="base model it was trained for"):
        minicpt.PeftModel.from_pretrained(wide, folder)


def test_a_failed_load_leaves_the_model_as_it_was(gpt2, saved):
    folder, _ = saved
    model = cpt(minicpt, gpt2)
    expected = logits(model)
    (folder / WEIGHTS).write_bytes(b"")
    for _ in range(2):  # the name stays free
        with pytest.raises(MiniCPTError, match="damaged"):
            model.load_adapter(folder, "second")
    assert list(model.peft_config) == list(model.prompt_encoder) == ["default"]
    assert torch.equal(logits(model), expected)


def test_state_of_another_save_is_ignored(gpt2, saved):
    """PEFT saved into our folder: its weights count, our old state file does not."""
    folder, old = saved
    model = train(cpt(peft, gpt2), 6, lr=2.0)
    model.save_pretrained(folder)
    with pytest.warns(UserWarning, match="belongs to another save"):
        loaded = minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder, is_trainable=True)
    torch.testing.assert_close(logits(loaded), logits(model))
    assert not torch.allclose(logits(loaded), old)


# ---- interruption ----------------------------------------------------------------------------------------------------


def files_of(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def visible(files):
    return {
        path: content for path, content in files.items() if not path.parts[0].startswith(".saving-")
    }


@pytest.mark.slow
@pytest.mark.parametrize("call", range(1, 6))
@pytest.mark.parametrize(
    "place", ["peft's weights", "our state", "configuration", "replacing", "removing"]
)
def test_an_interrupted_save_leaves_the_old_adapter_whole(gpt2, saved, place, call, monkeypatch):
    folder, expected = saved
    (folder / "adapter_model.bin").write_bytes(b"from an older save, to be removed")
    before, model = files_of(folder), train(cpt(minicpt, gpt2), 6, lr=2.0)
    owner, name = {
        "peft's weights": (peft.peft_model, "safe_save_file"),
        "our state": (safetensors.torch, "save_file"),
        "configuration": (peft.PeftConfig, "save_pretrained"),
        "replacing": (os, "replace"),
        "removing": (type(folder), "unlink"),
    }[place]
    real, calls = getattr(owner, name), []

    def interrupted(*args, **kwargs):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(owner, name, interrupted)
    try:
        model.save_pretrained(folder)
    except KeyboardInterrupt:
        monkeypatch.undo()
        assert files_of(folder) == before
        assert torch.equal(
            logits(minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder)), expected
        )
    else:
        assert len(calls) < call  # there were not that many
        assert files_of(folder) != before
    assert not list(folder.glob(".*"))  # and no temporary folder


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs os.fork")
def test_a_killed_save_leaves_the_old_adapter_whole(gpt2, saved, monkeypatch):
    folder, expected = saved
    before, model = files_of(folder), train(cpt(minicpt, gpt2), 6, lr=2.0)
    pid = os.fork()
    if (
        pid == 0
    ):  # everything written, nothing replaced yet: the worst moment for who writes in place
        os.replace = lambda *_: os._exit(9)
        model.save_pretrained(folder)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert visible(files_of(folder)) == before
    assert torch.equal(
        logits(minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder)), expected
    )
    model.save_pretrained(folder)  # what the dead process left does not disturb
    assert torch.equal(
        logits(minicpt.PeftModel.from_pretrained(copy.deepcopy(gpt2), folder)), logits(model)
    )


def test_a_save_without_state_removes_the_old_one(gpt2, tmp_path):
    model = pt(minicpt, gpt2)
    model.save_pretrained(tmp_path, training_state={})
    assert (tmp_path / saving.STATE).is_file()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / saving.STATE).exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(MiniCPTError, match="is a file"):
        model.save_pretrained(tmp_path / "file")
