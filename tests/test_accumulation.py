"""Gradients accumulated over parts of a batch are those of the whole batch: `num_items_in_batch` is honoured."""

import copy
import warnings

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import CONTEXT, V, base
from test_prefix import wrap

import minicpt

KINDS = {
    "mean": {},
    "sum": {"opt_loss_reduction": "sum"},
    "decay": {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7},
    "label alone": {"opt_context_loss_weight": 0.0},
}


def model_of(kind, name="Llama"):
    model = copy.deepcopy(base(name))
    if kind == "iapt":
        torch.manual_seed(0)
        return minicpt.get_peft_model(model, minicpt.IAPTConfig(bottleneck=4))
    return wrap(model, "pt" if kind == "pt" else "cpt", **KINDS.get(kind, {}))


def rows_of(n, label=(4, 4), seed=0):
    """Rows of different lengths that end in a label, all else -100."""
    generator, rows = torch.Generator().manual_seed(seed), []
    for i in range(n):
        ids = torch.randint(1, V, (3 + i % 4 + len(label),), generator=generator).tolist()
        types = [1, *[2] * (len(ids) - 2 - len(label)), 3, *label]
        rows.append({"input_ids": ids, "input_type_mask": types, "attention_mask": [1] * len(ids)})
        rows[-1]["labels"] = [i if t == 4 else -100 for i, t in zip(ids, types)]
    return rows


def collate(rows):
    T, fill = max(len(row["input_ids"]) for row in rows), {"labels": -100}
    return {
        name: torch.tensor([row[name] + [fill.get(name, 0)] * (T - len(row[name])) for row in rows])
        for name in rows[0]
    }


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, *args):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def trained(model, rows, batch, accumulate, folder):
    """One epoch of plain SGD by Trainer: the losses it logs and the trained tensors."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=1,
        learning_rate=0.5,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        disable_tqdm=True,
        label_names=["labels"],
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, [p for p in model.parameters() if p.requires_grad]


def by_hand(model, rows, size):
    """The same in plain torch, each step one batch of `size` rows."""
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.SGD(weights, lr=0.5), []
    for first in range(0, len(rows), size):
        loss = model(**collate(rows[first : first + size])).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, weights


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*KINDS, "pt", "iapt"])
@pytest.mark.parametrize("n, batch, accumulate", [(8, 4, 2), (7, 2, 4), (11, 2, 4)])
def test_trainer_takes_the_step_of_one_batch_with_all_rows(kind, n, batch, accumulate, tmp_path):
    """The last group may be smaller, and so may its last batch: 7 rows are 2 + 2 + 2 + 1, 11 are 8 and 2 + 1."""
    rows = rows_of(n)
    if kind == "pt":  # soft prompts take no types
        rows = [{k: v for k, v in row.items() if k != "input_type_mask"} for row in rows]
    a, b = model_of(kind), model_of(kind)
    expected = by_hand(b, rows, batch * accumulate)
    losses, weights = trained(a, rows, batch, accumulate, tmp_path)
    assert losses == pytest.approx(expected[0], rel=1e-3)
    torch.testing.assert_close(weights, expected[1], rtol=1e-3, atol=1e-5)


def test_peft_multiplies_its_loss():
    """The difference that docs/peft.md lists: 8 rows at once, and 2 rows four times, as Trainer hands them over."""
    rows, ratios = rows_of(8), []
    for lib in (peft, minicpt):
        ids, types = CONTEXT
        config = lib.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=ids,
            cpt_mask=[1] * len(ids),
            cpt_tokens_type_mask=types,
        )
        model = lib.get_peft_model(copy.deepcopy(base("Llama")), config)
        items = torch.tensor(16)
        whole = model(**collate(rows), num_items_in_batch=items).loss
        parts = [
            model(**collate(rows[i : i + 2]), num_items_in_batch=items).loss for i in (0, 2, 4, 6)
        ]
        ratios.append(float(sum(parts) / whole))
    assert ratios == pytest.approx([4, 1], rel=1e-3)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(KINDS)),
    st.sampled_from(["Llama", "GPT2"]),  # of GPT-2's labels Trainer counts the first, too
    st.lists(st.integers(1, 4), min_size=1, max_size=4),
    st.sampled_from([(4,), (4, 4)]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_any_split_of_a_batch_sums_to_its_loss_and_gradient(
    kind, name, sizes, label, shared, all_labelled, seed
):
    rows = rows_of(sum(sizes), label, seed)
    if all_labelled:  # PEFT's habit; equal numbers of labels need equal lengths
        rows = [
            dict(row, labels=row["input_ids"])
            for row in rows
            if len(row["labels"]) == len(rows[0]["labels"])
        ]
        sizes = [1] * len(rows)
    whole, parts = model_of(kind, name), model_of(kind, name)
    parts.shared_prefix = shared
    expected = whole(**collate(rows)).loss
    expected.backward()
    total, first = 0.0, 0
    items = sum(sum(i != -100 for i in row["labels"][name == "Llama" :]) for row in rows)
    for size in sizes:
        batch = collate(rows[first : first + size])
        loss = parts(**batch, num_items_in_batch=items).loss
        loss.backward()
        total, first = total + loss.detach(), first + size
    torch.testing.assert_close(total, expected.detach(), rtol=1e-4, atol=1e-5)
    a, b = (m.prompt_encoder.default.delta_embedding.weight.grad for m in (whole, parts))
    torch.testing.assert_close(b, a, rtol=1e-3, atol=1e-5)


def test_rows_with_different_numbers_of_labels_warn_once():
    model, rows = model_of("mean"), rows_of(1) + rows_of(1, (4,))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for row in rows * 2:
            model(**collate([row]), num_items_in_batch=torch.tensor(3))
        model(**collate(rows), num_items_in_batch=torch.tensor(3))  # a batch of its own is exact
    assert len([w for w in caught if "different numbers of labels" in str(w.message)]) == 1
    torch.testing.assert_close(
        model(**collate(rows), num_items_in_batch=torch.tensor(3)).loss, model(**collate(rows)).loss
    )
