"""Roles and examples of tokens; templates on text: pieces, the whole string, contexts, cuts."""

import pytest
import torch
from by_hand import join
from hypothesis import given, settings
from hypothesis import strategies as st

from minicpt.core import masks
from minicpt.core.templates import Encoded, Template, build_context, collate, encode, tokenize
from minicpt.engine.base_models import MICRO
from minicpt.errors import MiniCPTError

SETTINGS = settings(max_examples=60, deadline=None)
words = st.text(alphabet="abcdefgh é1.!?", min_size=1, max_size=12).map(str.strip).filter(bool)


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(MICRO)


@SETTINGS
@given(st.lists(st.lists(st.integers(0, 4), max_size=9), max_size=6))
def test_role_and_example_of_every_token_come_back_from_a_context(examples):
    """Whatever the roles, example i gives them again, and i for all its tokens but separators."""
    context = join([Encoded(roles, roles) for roles in examples])
    types = torch.tensor(context.types, dtype=torch.long)
    roles = [role for example in examples for role in example]
    owner = [i if role else -1 for i, example in enumerate(examples) for role in example]
    assert masks.role_of(types).tolist() == roles
    assert masks.example_of(types).tolist() == owner
    assert masks.is_label(types).tolist() == [role == 4 for role in roles]
    assert masks.is_input(types).tolist() == [role == 2 for role in roles]
    assert masks.is_template(types).tolist() == [role in (1, 3) for role in roles]
    assert masks.is_updated(types).tolist() == [role in (1, 2, 3) for role in roles]


def test_role_and_example_keep_any_shape():
    types = torch.tensor([[[1, 2, 0], [4, 0, 5]], [[6, 7, 8], [0, 9, 12]]])
    assert masks.role_of(types).tolist() == [[[1, 2, 0], [4, 0, 1]], [[2, 3, 4], [0, 1, 4]]]
    assert masks.example_of(types).tolist() == [[[0, 0, -1], [0, -1, 1]], [[1, 1, 1], [-1, 2, 2]]]
    assert masks.role_of(types[0, 0, 2]).item() == 0 and masks.example_of(types[0, 0, 2]) == -1


@SETTINGS
@given(
    st.sampled_from(["input: {}", "text: {}", "{}"]),
    st.sampled_from(["output: {}", "A {} one.", "{}"]),
    st.sampled_from([" ", "\n"]),
    st.sampled_from([" ", "\n", "\n\n"]),
    words,
    words,
)
def test_pieces_join_to_the_whole_string(inp, out, intra, inter, text, label):
    template = Template(inp, out, intra, inter)
    whole = inp.format(text) + intra + out.format(label) + inter
    pieces = template.pieces(text, label)
    assert "".join(piece for piece, _ in pieces) == whole
    assert (text, 2) in pieces and (label, 4) in pieces


def test_roles_of_one_example_written_out(tokenizer):
    (example,) = encode(tokenizer, Template(), [("apple pear", "fruit")])
    tokens = tokenizer.convert_ids_to_tokens(example.ids)
    assert list(zip(tokens, example.types)) == [
        ("input", 1),
        (":", 1),
        ("Ġapple", 2),
        ("Ġpear", 2),
        ("Ċ", 0),
        ("output", 3),
        (":", 3),
        ("Ġfruit", 4),
        ("Ċ", 0),
    ]


@SETTINGS
@given(st.lists(st.tuples(words, words), min_size=1, max_size=4))
def test_a_context_is_the_whole_string_tokenised(tokenizer, rows):
    template = Template()
    context = build_context(tokenizer, template, rows)
    whole = "".join(f"input: {text}\noutput: {label}\n" for text, label in rows)
    assert context.ids == tokenize(tokenizer, [whole])[0]
    assert tokenizer.decode(context.ids) == whole


@SETTINGS
@given(st.text(max_size=40))
def test_any_text_can_be_tokenised_and_comes_back(tokenizer, text):
    text = text.encode("utf-8", "ignore").decode()
    assert (
        tokenizer.decode(tokenize(tokenizer, [text])[0], clean_up_tokenization_spaces=False) == text
    )


def test_collate_pads_on_the_right():
    ids, mask, types = collate([Encoded([5], [4]), Encoded([6, 7], [1, 4])])
    assert ids.tolist() == [[5, 0], [6, 7]]
    assert mask.tolist() == [[1, 0], [1, 1]]
    assert torch.equal(types, torch.tensor([[4, 0], [1, 4]]))


@pytest.mark.parametrize("bad", [{"input": "input:"}, {"output": "{} {}"}])
def test_templates_need_one_place(bad):
    with pytest.raises(MiniCPTError, match="exactly one"):
        Template(**bad)


def test_unequal_masks_raise():
    with pytest.raises(MiniCPTError, match="one length"):
        Encoded([1, 2], [1])
