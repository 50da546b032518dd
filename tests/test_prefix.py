"""The shared prefix: the plain forward's numbers on every architecture, and a kept cache that is never stale."""

import copy
import functools
import gc
import pickle
import warnings
import weakref

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_architectures import ARCHITECTURES, COMMON, CONTEXT, D, V, base
from test_core import contexts

import minicpt
from minicpt.core.loss import label_loss, token_weights
from minicpt.core.templates import Encoded
from minicpt.engine import memory
from minicpt.engine import prefix as engine
from minicpt.engine.scores import label_scores, label_token_scores
from minicpt.errors import MiniCPTError


@pytest.fixture(autouse=True)
def always_share(monkeypatch):
    monkeypatch.setattr(engine, "WORTH_SHARING", 0)  # tiny prompts would not be worth it
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*(Position ids are not supported|deprecated).*")
        yield


@pytest.fixture
def runs(monkeypatch):
    """(rows, tokens, tokens that the head saw) of every run of the base model."""
    seen, real = [], engine.run

    def counting(model, embeds, *args, **kwargs):
        output = real(model, embeds, *args, **kwargs)
        seen.append((*embeds.shape[:2], output[0].shape[0] * output[0].shape[1]))
        return output

    for module in ("passes", "prefix", "scores"):
        monkeypatch.setattr(f"minicpt.engine.{module}.run", counting)
    return seen


def wrap(model, kind, context=CONTEXT, **options):
    """CPT or a soft prompt on a model, moved away from where it starts."""
    if kind == "cpt":
        ids, types = context
        config = minicpt.CPTConfig(
            task_type="CAUSAL_LM",
            cpt_token_ids=ids,
            cpt_tokens_type_mask=types,
            **{
                "cpt_mask": [1] * len(ids),
                "opt_projection_epsilon": 3.0,
                "opt_projection_format_epsilon": 2.0,
            }
            | options,
        )
    else:
        config = minicpt.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    wrapped = minicpt.get_peft_model(model, config)
    weight_of(wrapped).data = torch.randn(
        weight_of(wrapped).shape, generator=torch.Generator().manual_seed(1)
    )
    return wrapped


def weight_of(wrapped):
    encoder = wrapped.prompt_encoder[wrapped.active_adapter]
    return (
        encoder.delta_embedding if hasattr(encoder, "delta_embedding") else encoder.embedding
    ).weight


def both_ways(wrapped, batch):
    """Loss, gradient and logits by the plain forward and by the shared prefix."""
    results = []
    for shared in (False, True):
        wrapped.shared_prefix = shared
        wrapped.zero_grad()
        output = wrapped(**batch)
        output.loss.backward()
        results.append(
            (
                output.loss.detach(),
                weight_of(wrapped).grad.clone(),
                wrapped(**batch).logits.detach(),
            )
        )
    return results


def assert_equal(plain, shared):
    for a, b in zip(plain, shared):
        assert a.shape == b.shape
        assert (a - b).norm() <= 1e-5 * a.norm() + 1e-7


def ragged(rows, padding, seed, context=0):
    """Rows of different lengths, padded on one side or now here, now there; their first tokens may be common."""
    generator = torch.Generator().manual_seed(seed)
    T = context + 9
    common = torch.randint(1, V, (context,), generator=generator)
    batch = {"input_ids": torch.zeros(rows, T, dtype=torch.long)} | {
        name: torch.full((rows, T), fill)
        for name, fill in (("attention_mask", 0), ("labels", -100), ("input_type_mask", 0))
    }
    for row in range(rows):
        n = context + int(torch.randint(5, 10, (1,), generator=generator)) if rows > 1 else T
        ids = torch.cat((common, torch.randint(1, V, (n - context,), generator=generator)))
        types = torch.tensor(([2] * n)[: n - 4] + [3, 0, 4, 4])
        left = padding == "left" or (padding == "mixed" and row % 2)
        where = slice(T - n, T) if left else slice(0, n)
        for name, value in (
            ("input_ids", ids),
            ("attention_mask", 1),
            ("labels", ids),
            ("input_type_mask", types),
        ):
            batch[name][row, where] = value
    return batch


# ---- exact -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    st.sampled_from(sorted(ARCHITECTURES)),
    st.sampled_from(["cpt", "pt"]),
    st.integers(1, 16),
    st.sampled_from(["left", "right", "mixed"]),
    st.sampled_from(
        [0, 3]
    ),  # tokens common to all rows: IPT's context, CPT with an instruction in the query
    st.sampled_from(
        [
            {},
            {"opt_loss_reduction": "sum"},
            {"opt_context_loss_weight": 0.0},
            {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.7},
        ]
    ),
    contexts(),
    st.booleans(),
    st.integers(0, 10**6),
)
def test_the_plain_forwards_loss_gradient_and_logits(
    name, kind, rows, padding, common, options, context, hole, seed
):
    mask = [1] * len(context[0])
    if hole and len(mask) > 2:
        mask[1] = 0  # cpt_mask hides a token of the context
    if name == "Mistral" and len(mask) + common + 9 > 32:
        padding = "right"  # in a full window padding would take room, which `padding.py` refuses
    batch = ragged(rows, padding, seed, common)
    if kind == "pt":
        del batch["input_type_mask"]
    assert_equal(
        *both_ways(wrap(copy.deepcopy(base(name)), kind, context, cpt_mask=mask, **options), batch)
    )


@pytest.mark.parametrize("window", [4, 8, 9, 10, 20])
def test_a_sliding_window_shorter_than_the_prefix(window, runs):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **COMMON | {"sliding_window": window}, initializer_range=0.3
    )
    wrapped = wrap(transformers.MistralForCausalLM(config).eval(), "cpt")
    for padding in ("right", "right"):
        assert_equal(*both_ways(wrapped, ragged(4, padding, 3, context=6)))
    assert (1, 15, 0) in runs


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_shares_and_is_exact(name, runs):
    wrapped, batch = wrap(copy.deepcopy(base(name)), "cpt"), ragged(4, "right", 0)
    assert_equal(*both_ways(wrapped, batch))
    P, T = len(CONTEXT[0]), batch["input_ids"].shape[1]
    labels = 2 + 4 * 2  # two labels of one token in the context, one of two tokens in each row
    assert (1, P, 0) in runs and (
        4,
        T,
        labels,
    ) in runs  # the prompt once; the head at the labels and nowhere else


def test_common_first_tokens_are_run_once(runs):
    batch = ragged(3, "right", 1, context=20)
    wrapped = wrap(copy.deepcopy(base("Llama")), "pt")
    wrapped(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
    )
    assert (1, 25, 0) in runs and (3, 9) in [r[:2] for r in runs]


def test_a_single_row_and_short_prompts_do_not_branch(runs, monkeypatch):
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt")
    wrapped(**ragged(1, "right", 1))
    assert [r[:2] for r in runs[-1:]] == [(1, 18)]
    monkeypatch.setattr(engine, "WORTH_SHARING", 64)
    wrapped(**ragged(3, "right", 1))
    assert [r[:2] for r in runs[-1:]] == [(3, 18)]


def test_gradients_reach_embeddings_given_by_the_caller():
    wrapped, batch = wrap(copy.deepcopy(base("GPT2")), "cpt"), ragged(3, "right", 5, context=4)
    embeds = base("GPT2").get_input_embeddings()(batch.pop("input_ids")).detach()
    grads = []
    for shared in (False, True):
        wrapped.shared_prefix, leaf = shared, embeds.clone().requires_grad_()
        wrapped(inputs_embeds=leaf, **batch).loss.backward()
        grads.append(leaf.grad)
    assert_equal(grads[:1], grads[1:])


def test_num_items_in_batch_divides_the_loss():
    wrapped, batch = wrap(copy.deepcopy(base("GPT2")), "pt"), ragged(3, "right", 5)
    del batch["input_type_mask"]
    assert_equal(*both_ways(wrapped, batch | {"num_items_in_batch": torch.tensor(7)}))
    batch["labels"][:] = -100
    assert wrapped(**batch, num_items_in_batch=7).loss == 0


def test_half_precision_and_autocast_run():
    wrapped, batch = wrap(copy.deepcopy(base("Llama")).bfloat16(), "cpt"), ragged(3, "right", 5)
    wrapped(**batch).loss.backward()
    assert weight_of(wrapped).grad.dtype == torch.float32 and weight_of(wrapped).grad.norm() > 0
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt")
    exact = wrapped(**batch).loss.item()
    with torch.autocast("cpu", torch.bfloat16):
        output = wrapped(**batch)
    output.loss.backward()
    assert output.loss.item() == pytest.approx(exact, rel=0.05) and output.loss.item() != exact
    assert torch.isfinite(output.logits).all()  # read outside the autocast that they belong to


# ---- logits, when they are read --------------------------------------------------------------------------------------


def test_logits_are_computed_when_they_are_read(runs):
    wrapped, batch = wrap(copy.deepcopy(base("Gemma2")), "cpt"), ragged(2, "right", 3)
    output = wrapped(**batch)
    n, kinds = len(runs), ["loss"]
    assert output[0] is output.loss is output["loss"] and len(runs) == n
    assert (
        list(output.keys()) == kinds and len(runs) == n
    )  # while training, a list of what is there reads nothing
    logits = output.logits
    assert (
        len(runs) == n + 1
        and output.logits is logits
        and output["logits"] is logits
        and len(runs) == n + 1
    )
    assert list(output.keys()) == [*kinds, "logits"]
    with torch.no_grad():
        output = wrapped(**batch)
    assert (
        list(output.keys()) == ["loss", "logits", "past_key_values"] and output[1] is output.logits
    )
    torch.testing.assert_close(output.logits, logits)
    assert (
        {**output}.keys() == dict(output.items()).keys() == set(output)
        and "logits" in output
        and len(output) == 3
    )
    assert torch.equal(pickle.loads(pickle.dumps(output)).logits, output.logits)
    assert torch.equal(
        type(output)(dict(output)).logits, output.logits
    )  # accelerate builds one anew like this
    with pytest.raises(KeyError):
        output["no_such_field"]


def test_a_loss_of_ones_own_from_the_logits():
    wrapped, batch = wrap(copy.deepcopy(base("Gemma2")), "pt"), ragged(3, "right", 3)
    grads = []
    for shared in (False, True):
        wrapped.shared_prefix = shared
        wrapped.zero_grad()
        logits = wrapped(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]
        ).logits[:, 5:]
        label_loss(logits, batch["labels"], batch["input_type_mask"], reduction="sum").backward()
        grads.append(weight_of(wrapped).grad.clone())
    assert_equal(grads[:1], grads[1:])


@pytest.mark.parametrize("keep", [1, 3, 14, torch.tensor([0, 8, 9, 17])])
@pytest.mark.parametrize("grad", [True, False])
def test_logits_to_keep(keep, grad, runs):
    wrapped, batch = wrap(copy.deepcopy(base("Gemma2")), "cpt"), ragged(2, "left", 3)
    with torch.set_grad_enabled(grad):
        whole = wrapped(**batch).logits
        expected = whole[:, -keep:] if isinstance(keep, int) else whole[:, keep]
        output = wrapped(**batch, logits_to_keep=keep)
        torch.testing.assert_close(output.logits, expected)
        torch.testing.assert_close(output.loss, wrapped(**batch).loss)
        del batch["labels"]
        torch.testing.assert_close(wrapped(**batch, logits_to_keep=keep).logits, expected)
    assert runs[-1][2] == 2 * expected.shape[1]  # no head call besides


@pytest.mark.parametrize(
    "option", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}]
)
def test_calls_that_ask_for_more_take_the_plain_forward(option, runs):
    wrapped, batch = wrap(copy.deepcopy(base("GPT2")), "pt"), ragged(2, "right", 3)
    del batch["input_type_mask"]
    assert (
        len(wrapped(**batch, **option)[1 if "return_dict" in option else "logits"]) == 2
        and not runs
    )
    wrapped.base_model.loss_function = lambda logits, labels, **kwargs: logits.sum() * 0 + 7
    assert wrapped(**batch).loss == 7 and not runs


def test_reading_logits_draws_no_randomness():
    model = copy.deepcopy(base("GPT2"))
    model.transformer.drop.p = 0.5
    wrapped, batch = wrap(model, "cpt").train(), ragged(3, "right", 5)
    output = wrapped(**batch)
    state = torch.get_rng_state()
    assert output.logits.shape == (3, 18, V) and torch.equal(torch.get_rng_state(), state)


# ---- the kept cache --------------------------------------------------------------------------------------------------


def query(rows=2, seed=9):
    batch = ragged(rows, "left", seed)
    return {name: batch[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def answer(wrapped, shared=True):
    wrapped.shared_prefix = shared
    return wrapped(**query(), logits_to_keep=2).logits


def layer_weight(wrapped):
    return wrapped.base_model.model.layers[0].mlp.up_proj.weight


def set_data_twice(wrapped):
    weight = layer_weight(wrapped)
    for _ in range(2):  # an address may come back
        weight.data = weight.data * 1.5


def replace_parameter(wrapped):
    linear = wrapped.base_model.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.detach() * 1.5, requires_grad=False)


def optimizer_step(wrapped):
    wrapped.zero_grad()
    wrapped.eval()(**ragged(2, "right", 1)).loss.backward()
    torch.optim.SGD([weight_of(wrapped)], lr=1.0).step()


def other_adapter(wrapped):
    ids, types = CONTEXT
    config = minicpt.CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=ids[::-1], cpt_mask=[1] * 9, cpt_tokens_type_mask=types
    )
    wrapped.add_adapter("other", config)
    wrapped.set_adapter("other")


def state_dict(wrapped):
    state = {name: weight * 1.5 for name, weight in wrapped.base_model.state_dict().items()}
    wrapped.base_model.load_state_dict(state)


def hide_a_token(wrapped):
    wrapped.peft_config["default"].cpt_mask = [1, 0, *[1] * 7]


def lora_inside():
    """A base model with two LoRA adapters in it, the first one active."""
    model = copy.deepcopy(base("Llama"))
    config = peft.LoraConfig(r=4, target_modules=["k_proj", "gate_proj"], init_lora_weights=False)
    for name in ("one", "two"):
        peft.inject_adapter_in_model(config, model, name)
    for layer in lora_layers(model):
        layer.set_adapter("one")
    return model.eval().requires_grad_(False)


def lora_layers(model):
    return [m for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]


def of_every_lora(change):
    def changes(wrapped):
        for layer in lora_layers(wrapped):
            change(layer)

    return changes


def step_of(optimizer, **options):
    def changes(wrapped):
        weight = layer_weight(wrapped).requires_grad_()
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            optimizer([weight], lr=0.5, **options).step()
        weight.grad = None
        weight.requires_grad_(False)

    return changes


def first(wrapped, part="", **attributes):
    module = wrapped.base_model.model.layers[0].get_submodule(part)
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def steer(module, args, output):
    return output + 0.7


def steer_the_last_token(module, args, output):
    return torch.cat((output[:, :-1], output[:, -1:] + 0.7), dim=1)


class Twice(torch.nn.Module):
    def forward(self, x):
        return 2 * x


def parametrize(wrapped):
    linear = first(wrapped, "self_attn.v_proj")
    if not hasattr(linear, "parametrizations"):
        torch.nn.utils.parametrize.register_parametrization(linear, "weight", Twice())
    else:
        torch.nn.utils.parametrize.remove_parametrizations(linear, "weight", False)


def another_class(wrapped):
    mlp = first(wrapped, "mlp")
    mlp.__class__ = type(
        "Doubled",
        (type(mlp),),
        {"forward": lambda self, x: 2 * type(mlp).__mro__[1].forward(self, x)},
    )


def in_inference_mode(wrapped):
    with torch.inference_mode():
        layer_weight(wrapped).mul_(1.5)


def a_hook_comes_or_goes(hook):
    def changes(wrapped):
        layer = first(wrapped)
        if hook in layer._forward_hooks.values():
            layer._forward_hooks.clear()
        else:
            layer.register_forward_hook(hook)

    return changes


def activation_by_a_function(wrapped):
    mlp = first(wrapped, "mlp")
    mlp._modules.pop("act_fn", None)
    mlp.__dict__["act_fn"] = torch.tanh


CHANGES = {
    "a step of the optimiser": optimizer_step,
    "delta, behind torch's back": lambda w: weight_of(w).data.mul_(0.01),
    "the centre, behind torch's back": lambda w: w.prompt_encoder[
        w.active_adapter
    ].embedding.weight.data.mul_(1.5),
    "a weight in place": lambda w: layer_weight(w).mul_(1.5),
    "a weight through a view": lambda w: layer_weight(w)[0].mul_(5),
    "a weight in place, in inference mode": in_inference_mode,
    "a weight by SGD": step_of(torch.optim.SGD, foreach=True),
    "a weight by a fused optimiser": step_of(torch.optim.AdamW, fused=True),
    "weight.data = ... twice": set_data_twice,
    "another parameter": replace_parameter,
    "load_state_dict": state_dict,
    "another adapter": other_adapter,
    "cpt_mask": hide_a_token,
    "dtype": lambda w: w.base_model.double(),
    "dtype and back": lambda w: w.base_model.bfloat16().float(),
    "a layer less": lambda w: w.base_model.model.layers.__delitem__(1),
    "a buffer": lambda w: w.base_model.model.rotary_emb.inv_freq.mul_(1.5),
    # no tensor is touched by these
    "LoRA in the base model off": of_every_lora(lambda x: x.enable_adapters(x.disable_adapters)),
    "LoRA in the base model scaled": of_every_lora(lambda x: x.scale_layer(3.0)),
    "LoRA's alpha": of_every_lora(lambda x: x.set_scale("one", 5.0 + x.scaling["one"])),
    "LoRA's other adapter": of_every_lora(
        lambda x: x.set_adapter("two" if x.active_adapters == ["one"] else "one")
    ),
    "steering": a_hook_comes_or_goes(steer),
    "steering the last token": a_hook_comes_or_goes(steer_the_last_token),
    "attention scaled": lambda w: first(w, "self_attn", scaling=first(w, "self_attn").scaling * 3),
    "an activation swapped": lambda w: first(w, "mlp", act_fn=torch.nn.Hardtanh()),
    "an activation by a function": activation_by_a_function,
    "a norm's epsilon": lambda w: first(w, "input_layernorm", variance_epsilon=30.0),
    "another forward": lambda w: first(w, "mlp", forward=lambda x: x - 1),
    "another class": another_class,
    "a parametrization comes or goes": parametrize,
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_kept_cache_is_never_stale(change):
    wrapped = wrap(
        lora_inside() if "LoRA" in change else copy.deepcopy(base("Llama")), "cpt"
    ).eval()
    before, scores = answer(wrapped), score(wrapped)
    with torch.set_grad_enabled("optimiser" in change):
        CHANGES[change](wrapped)
    after = answer(wrapped)
    assert after.dtype != before.dtype or not torch.allclose(
        after, before, atol=1e-4
    )  # the change matters ...
    torch.testing.assert_close(after, answer(wrapped, shared=False))  # ... and was seen
    if change in ("cpt_mask", "dtype"):
        return
    assert not torch.allclose(score(wrapped), scores, atol=1e-4)
    torch.testing.assert_close(score(wrapped), plain_score(wrapped), rtol=1e-4, atol=1e-4)


def score(wrapped):
    return wrapped.score(query(1)["input_ids"], [[5], [6], [7]])


def plain_score(wrapped):
    """The same by PEFT's plain forward."""
    wrapped.shared_prefix = False
    with torch.no_grad():
        logits = wrapped(input_ids=query(1)["input_ids"]).logits[:, -1]
    return logits.float().log_softmax(-1)[:, [5, 6, 7]]


REPEATABLE = sorted(
    set(CHANGES) - {"another adapter", "a layer less", "cpt_mask", "another class", "dtype"}
)


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(st.lists(st.sampled_from([*REPEATABLE, "switch adapters"]), min_size=2, max_size=6))
def test_no_sequence_of_changes_leaves_it_stale(changes):
    """Held against the plain path, for forward, score and generate, after every change."""
    wrapped = wrap(lora_inside(), "cpt").eval()
    greedy = dict(max_new_tokens=2, do_sample=False, pad_token_id=0, eos_token_id=None)
    for change in changes:
        with torch.set_grad_enabled("the optimiser" in change):
            if change != "switch adapters":
                CHANGES[change](wrapped)
            elif "other" not in wrapped.peft_config:
                other_adapter(wrapped)
            else:
                wrapped.set_adapter("default" if wrapped.active_adapter == "other" else "other")
        got = answer(wrapped)
        torch.testing.assert_close(got, answer(wrapped, shared=False), rtol=1e-3, atol=1e-4)
        wrapped.shared_prefix = True
        torch.testing.assert_close(score(wrapped), plain_score(wrapped), rtol=1e-3, atol=1e-3)
        texts = []
        for wrapped.shared_prefix in (True, False):
            texts.append(wrapped.generate(**query(), **greedy))
        assert torch.equal(*texts)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_nothing_changes_by_itself(name, runs):
    """On every architecture the prompt is run once: no model changes an attribute in a call."""
    wrapped = wrap(copy.deepcopy(base(name)), "cpt").eval()
    answers = [answer(wrapped) for _ in range(3)]
    assert torch.equal(answers[0], answers[2]) and [r[:2] for r in runs].count((1, 9)) == 1


def test_weights_made_in_inference_mode_count_no_versions_so_nothing_is_kept():
    with torch.inference_mode():
        wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
        layer = first(wrapped, "mlp.up_proj")
        layer.weight = torch.nn.Parameter(layer.weight.clone(), requires_grad=False)
        assert layer.weight.is_inference()
        before = answer(wrapped)
        layer.weight.mul_(1.5)
        assert not torch.allclose(answer(wrapped), before)
        torch.testing.assert_close(answer(wrapped), answer(wrapped, shared=False))


def test_a_module_in_training_mode_keeps_nothing():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    attention = first(wrapped, "self_attn", attention_dropout=0.5)
    answer(wrapped)
    attention.train()
    assert not torch.allclose(answer(wrapped), answer(wrapped))


def test_a_configuration_that_changes_changes_what_is_known_of_the_cache():
    model = windowed(8)
    assert engine.tokens_remembered(model) == 7
    model.config.sliding_window = 20
    assert engine.tokens_remembered(model) == 19


def test_old_weights_are_not_kept_alive():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    answer(wrapped)
    old = weakref.ref(layer_weight(wrapped))
    replace_parameter(wrapped)
    gc.collect()
    assert old() is None


def test_scores_without_the_adapter_are_the_base_models():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    with_prompt = score(wrapped)
    with wrapped.disable_adapter():
        scores = score(wrapped)
    ids = query(1)["input_ids"]
    expected = base("Llama")(input_ids=ids).logits[:, -1].log_softmax(-1)[:, [5, 6, 7]]
    torch.testing.assert_close(scores, expected.detach())
    assert not torch.allclose(scores, with_prompt) and torch.equal(score(wrapped), with_prompt)


def test_a_wrapped_model_scores_as_many_rows_at_once_as_fit_into_memory(monkeypatch, runs):
    wrapped, ids = wrap(copy.deepcopy(base("Llama")), "cpt").eval(), query(8)["input_ids"]
    expected = wrapped.score(ids, [[5], [6]])
    model, P = wrapped.base_model, len(CONTEXT[0])
    free = memory.scoring_bytes(model, 2, P, ids.shape[1] + 1)
    monkeypatch.setattr(memory, "free_memory", lambda device: free)
    runs.clear()
    torch.testing.assert_close(wrapped.score(ids, [[5], [6]]), expected)
    assert [rows for rows, *_ in runs] == [2, 2, 2, 2]
    monkeypatch.setattr(memory, "free_memory", lambda device: 1)
    with pytest.raises(MiniCPTError, match="One row of .* needs about"):
        wrapped.score(ids, [[5], [6]])


def test_scores_are_those_of_evaluation_in_training_mode_too():
    model = copy.deepcopy(base("GPT2"))
    model.transformer.drop.p = 0.5
    wrapped = wrap(model, "cpt").eval()
    expected = score(wrapped)
    wrapped.train()
    assert torch.equal(score(wrapped), expected) and torch.equal(score(wrapped), expected)
    assert all(module.training for module in wrapped.modules())


def test_the_prefix_is_run_once_for_many_calls(runs):
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    for _ in range(3):
        answer(wrapped)
    with torch.inference_mode():
        wrapped(input_ids=query()["input_ids"][:1, :5])
    wrapped.score(query()["input_ids"], [[5], [6]])
    wrapped.generate(**query(), max_new_tokens=2, pad_token_id=0)
    assert [r for r in runs if r[:2] == (1, 9)] == [(1, 9, 0)] and (1, 9, 0) not in runs[2:]
    layer_weight(wrapped).data.mul_(1.5)  # nobody can see this
    stale = answer(wrapped)
    wrapped.clear_prefix_cache()
    assert not torch.allclose(stale, answer(wrapped))
    torch.testing.assert_close(answer(wrapped), answer(wrapped, shared=False))


def test_autocast_has_a_cache_of_its_own():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    exact = answer(wrapped)
    with torch.autocast("cpu", torch.bfloat16):
        rough = answer(wrapped)
    assert not torch.equal(rough, exact) and torch.equal(answer(wrapped), exact)


def test_dropout_keeps_nothing():
    model = copy.deepcopy(base("GPT2"))
    model.transformer.drop.p = 0.5
    wrapped = wrap(model, "cpt").train()
    assert not torch.allclose(answer(wrapped), answer(wrapped))


def test_copies_have_a_cache_of_their_own():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    before = answer(wrapped)
    twin = copy.deepcopy(wrapped)
    with torch.no_grad():
        weight_of(twin).mul_(0.1)
    assert not torch.allclose(answer(twin), before) and torch.equal(answer(wrapped), before)


def test_a_call_does_not_change_the_kept_cache():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    first = answer(wrapped)
    with torch.no_grad():
        output = wrapped(**query())
    assert output.past_key_values.get_seq_length() == 18
    output.past_key_values.crop(-9)
    output.past_key_values.reorder_cache(torch.tensor([1, 0]))
    output.past_key_values.reset()
    assert torch.equal(answer(wrapped), first)


# ---- generation and scores -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("how", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generation_starts_from_the_cache(name, how, runs):
    wrapped = wrap(copy.deepcopy(base(name)), "cpt").eval()
    kwargs = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None, **how)
    results = []
    for shared in (False, True, True):
        wrapped.shared_prefix = shared
        results.append(wrapped.generate(**query(3), **kwargs))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    assert [r for r in runs if r[1] == 9] == [(1, 9, 0)]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["Llama", "Bloom", "Gemma2", "Mistral"])
def test_scores_are_the_plain_forwards(name, padding):
    ids, types = (
        [CONTEXT[0] * 4, CONTEXT[1] * 4] if name == "Mistral" else CONTEXT
    )  # 36 tokens, window of 32
    wrapped, candidates = (
        wrap(copy.deepcopy(base(name)), "cpt", (ids, types)).eval(),
        [[5], [6, 7], [6, 8], [9, 1, 2]],
    )
    batch = ragged(5, padding, 4)
    expected = torch.empty(5, 4)
    prompt = wrapped.get_prompt(1).detach()[0]
    embed = base(name).get_input_embeddings()
    for row, (tokens, mask) in enumerate(zip(batch["input_ids"], batch["attention_mask"])):
        for c, candidate in enumerate(candidates):
            inputs = torch.cat((prompt, embed(tokens[mask.bool()]), embed(torch.tensor(candidate))))
            log_p = wrapped.base_model(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)
            n = len(candidate)
            expected[row, c] = log_p[-n - 1 : -1].gather(1, torch.tensor(candidate)[:, None]).sum()
    scores = wrapped.score(batch["input_ids"], candidates, batch["attention_mask"])
    torch.testing.assert_close(scores, expected.detach(), rtol=1e-4, atol=1e-5)


def one_row_a_label(model, prompt, query, candidates):
    """The oracle: log-probabilities of each label's tokens from one whole, unpadded row of plain transformers."""
    embed, scores = model.get_input_embeddings(), []
    for candidate in candidates:
        text = (
            embed(torch.tensor(query.ids + candidate))
            if query.ids
            else embed(torch.tensor(candidate))
        )
        inputs = torch.cat((prompt[0], text)) if prompt is not None else text
        with torch.no_grad():
            log_p = model(inputs_embeds=inputs[None]).logits[0].log_softmax(-1)
        n = len(candidate)
        scores.append(log_p[-n - 1 : -1].gather(1, torch.tensor(candidate)[:, None])[:, 0])
    return scores


def windowed(window):
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        **COMMON | {"sliding_window": window}, initializer_range=0.3
    )
    return transformers.MistralForCausalLM(config).eval()


SCORED = {name: functools.partial(base, name) for name in ARCHITECTURES} | {
    f"window {w}": functools.partial(windowed, w) for w in (3, 8, 13, 16)
}
LABELS = [[5], [6, 7], [6, 8], [9, 1, 2], [9, 2], [3, 4], [11, 12, 13, 14]]


@pytest.mark.slow
@pytest.mark.parametrize("P", [0, 6])
@pytest.mark.parametrize("name", SCORED)
def test_beginnings_of_labels_go_on_from_the_querys_cache(name, P, runs):
    """Ragged queries, one without a token, labels of one to four tokens, on every architecture and window."""
    model, generator = SCORED[name](), torch.Generator().manual_seed(2)
    prompt = torch.randn(1, P, D, generator=generator) if P else None
    lengths = [4, 9, 1, 9, 5, 4] + [0] * (P > 0)
    queries = [
        Encoded(torch.randint(1, V, (n,), generator=generator).tolist(), [2] * n) for n in lengths
    ]
    expected = [one_row_a_label(model, prompt, query, LABELS) for query in queries]
    # not with ALiBi, nor where a window forgets what was before
    tree = name != "Bloom" and P + 9 + 4 <= engine.tokens_remembered(model) + 1
    for batch_size in (1, 4, 64):
        runs.clear()
        scores = label_token_scores(model, prompt, queries, LABELS, batch_size)
        for c, label in enumerate(LABELS):
            wanted = torch.stack([row[c] for row in expected])
            torch.testing.assert_close(scores[c], wanted, rtol=1e-5, atol=1e-5)
        if batch_size == 64 and tree:
            # one pass: the queries, and behind each the seven tokens that a label begins with
            assert [T for B, T, _ in runs if B > 1] == [9 + 7]
            assert sum(n for B, _, n in runs if B > 1) == len(queries) * (1 + 7)
        elif batch_size == 64:
            # queries of one length, then the five beginnings alone, the longest of three tokens
            assert sorted(T for B, T, _ in runs if B > 1 and T != 3) == [4, 9]
            assert sum(B for B, T, _ in runs if T == 3) == len(queries) * 5


def test_rows_that_bear_many_labels_are_few_at_once(runs):
    """What goes through the head at once stays what `memory` reckons with: eight tokens a row."""
    model, queries = base("Llama"), [Encoded([8, 9], [2, 2])] * 20
    labels = [[i, 7] for i in range(10, 41)]  # 31 beginnings
    scores = label_token_scores(model, None, queries, labels, batch_size=16)
    assert runs[-1] == (4, 2 + 31, 4 * 32) and len([run for run in runs if run[1] == 33]) == 5
    wanted = one_row_a_label(model, None, queries[0], labels)
    torch.testing.assert_close([s[19] for s in scores], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "OPT", "Bloom"])
def test_hidden_tokens_of_the_prompt_stay_hidden_from_labels_of_several_tokens(name):
    model, prompt = base(name), torch.randn(1, 6, D, generator=torch.Generator().manual_seed(2))
    seen = torch.tensor([1, 0, 1, 1, 0, 1])
    query = Encoded([8, 9, 3], [2] * 3)
    scores = label_token_scores(model, prompt, [query], LABELS, seen=seen)
    for label, found in zip(LABELS, scores):
        text = model.get_input_embeddings()(torch.tensor(query.ids + label))
        rows = torch.cat((prompt[0], text))[None]
        mask = torch.cat((seen, torch.ones(len(text))))[None].long()
        with torch.no_grad():
            log_p = model(inputs_embeds=rows, attention_mask=mask).logits[0].log_softmax(-1)
        wanted = log_p[-len(label) - 1 : -1].gather(1, torch.tensor(label)[:, None])[:, 0]
        torch.testing.assert_close(found[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_batch_ends_where_its_padding_would_cost_more_than_a_pass(runs):
    queries = [Encoded([8] * n, [2] * n) for n in (3, 30, 4, 31, 3, 4)]
    label_scores(base("Llama"), None, queries, [[5], [6]])
    assert [run[:2] for run in runs] == [(4, 4), (2, 31)]


def test_labels_of_one_token_need_one_pass(runs):
    queries = [Encoded([8] * n, [2] * n) for n in (3, 5, 4)]
    label_scores(base("Llama"), None, queries, [[5], [6], [7]])
    assert runs == [(3, 5, 3)]


@pytest.mark.parametrize("name", ["Llama", "Bloom", "OPT", "window 8"])
@pytest.mark.parametrize("candidates", [[[5], [6]], LABELS])
@pytest.mark.parametrize("company", [0, 3])
def test_a_query_without_tokens_is_scored_after_the_last_token_before_it(name, candidates, company):
    model, prompt = SCORED[name](), torch.randn(1, 6, D, generator=torch.Generator().manual_seed(2))
    queries = [Encoded()] + [Encoded([8] * n, [2] * n) for n in range(1, company + 1)]
    wanted = torch.stack([s.sum() for s in one_row_a_label(model, prompt, Encoded(), candidates)])
    ran = engine.run(model, prompt)
    for prefix in (prompt, engine.Prefix(ran.cache, ran.hidden)):
        scores = label_scores(model, prefix, queries, candidates, "sum")
        torch.testing.assert_close(scores[0], wanted, rtol=1e-5, atol=1e-5)


def test_a_query_without_tokens_and_nothing_before_it_is_an_error():
    model = base("Llama")
    queries = [Encoded([8], [2]), Encoded()]
    trained_cache = engine.Prefix(engine.run(model, torch.randn(1, 6, D)).cache)
    for prefix in (None, trained_cache):
        with pytest.raises(minicpt.MiniCPTError, match="Query 1 has no token.*BOS"):
            label_scores(model, prefix, queries, [[1], [2]])


def test_a_label_right_after_a_trained_cache_cannot_be_learned():
    model = base("Llama")
    prefix = engine.Prefix(engine.run(model, torch.randn(1, 6, D)).cache)
    ids, types = torch.tensor([[7, 8]]), torch.tensor([[4, 4]])
    with pytest.raises(minicpt.MiniCPTError, match="without hidden states"):
        engine.loss_after(model, prefix, ids, torch.ones_like(ids), types, ids)


def test_scoring_errors():
    wrapped = wrap(copy.deepcopy(base("Llama")), "cpt").eval()
    for ids, candidates, what in (
        (torch.tensor([[V]]), [[1]], "input_ids"),
        (torch.tensor([[1]]), [[V]], "candidates"),
    ):
        with pytest.raises(minicpt.MiniCPTError, match=what):
            wrapped.score(ids, candidates)
    with pytest.raises(minicpt.MiniCPTError, match="label score"):
        wrapped.score(torch.tensor([[1]]), [[2]], how="median")


# ---- models that cannot share ----------------------------------------------------------------------------------------


def odd_models():
    torch.manual_seed(0)
    dynamic = COMMON | {
        "rope_parameters": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    }
    dynamic["max_position_embeddings"] = 12  # [prompt, query] is longer, the prompt is not
    return {
        "keys and values": transformers.MambaForCausalLM(
            transformers.MambaConfig(  # PEFT wants to know the heads, and does not use them
                vocab_size=V,
                hidden_size=D,
                state_size=4,
                num_hidden_layers=2,
                num_attention_heads=1,
            )
        ),
        "rotary frequencies": transformers.LlamaForCausalLM(transformers.LlamaConfig(**dynamic)),
        "not a cache": transformers.OpenAIGPTLMHeadModel(
            transformers.OpenAIGPTConfig(
                vocab_size=V, n_embd=D, n_layer=2, n_head=2, n_positions=64
            )
        ),
        # keeps the state of its linear attention beside the layers
        "not a cache of keys": transformers.MiniMaxForCausalLM(
            transformers.MiniMaxConfig(
                **COMMON,
                layer_types=["linear_attention", "full_attention"],
                num_local_experts=2,
                num_experts_per_tok=1,
            )
        ),
        "gradient checkpointing": transformers.LlamaForCausalLM(transformers.LlamaConfig(**COMMON)),
    }


@pytest.mark.parametrize("reason", odd_models())
def test_models_that_cannot_share_say_so_once_and_are_exact(reason, runs):
    model = odd_models()[reason].eval()
    wrapped = wrap(model, "cpt")
    if "checkpointing" in reason:
        wrapped.base_model.train().gradient_checkpointing_enable()
    batch = ragged(3, "right", 2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plain, shared = both_ways(wrapped, batch)
    assert [reason in str(w.message) for w in caught if "run anew" in str(w.message)] == [True]
    assert_equal(plain, shared)
    assert (3, 18) in [r[:2] for r in runs]  # whole rows
    wrapped.eval()
    if "checkpointing" not in reason:
        scores = wrapped.score(batch["input_ids"], [[5], [6, 7]], batch["attention_mask"])
        wrapped.base_model.config.use_cache = False
        rows = [
            Encoded(r[m.bool()].tolist(), [0] * int(m.sum()))
            for r, m in zip(batch["input_ids"], batch["attention_mask"])
        ]
        one_by_one = [
            label_scores(model, wrapped.get_prompt(1).detach(), [row], [[5], [6, 7]])
            for row in rows
        ]
        torch.testing.assert_close(scores, torch.cat(one_by_one), rtol=1e-4, atol=1e-5)


def test_the_weights_of_the_loss_are_those_of_token_weights():
    """`weighted_loss` with weights at random positions is that weighted sum of cross-entropies."""
    model, generator = copy.deepcopy(base("GPT2")), torch.Generator().manual_seed(0)
    prompt, ids = (
        torch.randn(1, 6, D, generator=generator),
        torch.randint(0, V, (3, 10), generator=generator),
    )
    queries, labels = model.get_input_embeddings()(ids[:, 6:]), ids
    weights = torch.rand(3, 9, generator=generator) * (torch.rand(3, 9, generator=generator) < 0.5)
    rows = engine.rows_of_prompt(model, prompt, queries)
    loss, _ = engine.weighted_loss(model, rows, labels, weights)
    logits = model(inputs_embeds=torch.cat((prompt.expand(3, -1, -1), queries), dim=1)).logits
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], reduction="none"
    )
    torch.testing.assert_close(loss, (losses * weights).sum())
    types = torch.where(
        torch.rand(3, 10, generator=generator) < 0.5,
        torch.tensor([1, 2, 3, 4, 4, 5, 6, 7, 8, 8]),
        0,
    )
    options = (0.9, "sum", 0.5)  # decay, reduction, weight of all labels but the last
    labels = labels.masked_fill(types % 4 > 0, -100).masked_fill(types == 0, -100)
    weights = token_weights(labels[:, 1:], types[:, 1:], *options)
    assert len(weights[weights > 0].unique()) > 1
    rows = engine.rows_of_prompt(model, prompt, queries)
    loss, _ = engine.weighted_loss(model, rows, labels, weights)
    torch.testing.assert_close(loss, label_loss(logits, labels, types, *options))
