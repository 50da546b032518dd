"""From text to ids: one string, tokenised once; roles laid over it by characters; seven kinds of tokenizers."""

import itertools
import random

import pytest
from tokenizers_of_all_kinds import KINDS, tokenizer

from minicpt.core.masks import INPUT, LABEL, OUTPUT_TEMPLATE, SEPARATOR
from minicpt.core.templates import (
    Context,
    Encoded,
    Template,
    _owner,
    build_context,
    encode,
    label_ids,
    leading_ids,
)
from minicpt.data import load_task, make_split, real_specs
from minicpt.errors import MiniCPTError
from minicpt.methods.prepare import cut_texts, require_labels

SHOTS = [
    ("the river is long", "positive"),
    ("what is a cat?", "negative"),
    ("He said: no.", "positive"),
    ("where is oslo", "negative"),
]
QUERIES = ["the king of spain", '"Who is it?"', "a", "the river."]


def real_templates(kind):
    """The templates of the real tasks' pools, dealt out over the kinds of tokenizers: each stands in one share."""
    found = {}
    for spec in real_specs().values():
        pools = spec["templates"]
        for chosen in itertools.product(*(pools[k] for k in ("input", "output", "intra", "inter"))):
            found[chosen] = Template(*chosen)
    return list(found.values())[KINDS.index(kind) :: len(KINDS)]


def written(template, rows):
    """The string that people would write: all examples, and of the last one the part up to the end of its label."""
    *shots, (text, label) = rows
    whole = "".join(
        template.input.format(t) + template.intra + template.output.format(w) + template.inter
        for t, w in shots
    )
    before_label = template.output.split("{}")[0]
    start = len(whole + template.input.format(text) + template.intra + before_label)
    return (
        whole + template.input.format(text) + template.intra + template.output.format(label),
        start,
        start + len(label),
    )


def oracle(tok, template, rows):
    """Ids of the whole string up to its last label's end, and how many of them are before that label; by offsets."""
    string, start, end = written(template, rows)
    # what follows the label may decide where its token ends, as it does in a context
    encoded = tok(string + template.inter, return_offsets_mapping=True, add_special_tokens=False)
    inside = [
        i
        for i, (a, b) in enumerate(encoded["offset_mapping"])
        if string[max(a, start) : min(b, end)].strip()
    ]
    first = inside[0]
    before, itself = (string[slice(*encoded["offset_mapping"][i])] for i in (first - 1, first))
    if set(before) == {" "} and not itself.startswith(" "):
        first -= 1  # a space that is a token of its own is the label's
    return encoded["input_ids"][: inside[-1] + 1], first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 1, 4])
def test_context_row_and_label_are_the_ids_of_the_whole_string(kind, k):
    tok = tokenizer(kind)
    words = ["positive", "negative"]
    for template in real_templates(kind):
        context = build_context(tok, template, SHOTS[:k])
        labels = dict(zip(words, label_ids(tok, template, words)))
        rows = encode(tok, template, [(q, None) for q in QUERIES], context, words[0])
        for query, row in zip(QUERIES, rows):
            for word in words:
                ids, before = oracle(tok, template, [*SHOTS[:k], (query, word)])
                assert context.ids + row.ids == ids[:before], (template, query)
                assert labels[word] == ids[before:], (template, query)


@pytest.mark.parametrize("kind", KINDS)
def test_a_label_has_the_same_ids_in_a_context_in_a_training_row_and_as_a_candidate(kind):
    tok = tokenizer(kind)
    templates = [*real_templates(kind), Template("text: {} ", "{}", "")]
    words = ["positive", "negative"]
    for template in templates:
        labels = dict(zip(words, label_ids(tok, template, words)))
        context = build_context(tok, template, SHOTS)
        rows = encode(tok, template, SHOTS, context)
        require_labels([context], [word for _, word in SHOTS], labels)
        require_labels(rows, [word for _, word in SHOTS], labels)
        for row, (_, word) in zip(rows, SHOTS):
            assert [i for i, t in zip(row.ids, row.types) if t == LABEL] == labels[word]


@pytest.mark.parametrize("kind", KINDS)
def test_what_comes_before_the_answer_is_the_same_whether_its_space_is_a_token_or_not(kind):
    tok = tokenizer(kind)
    words = ["positive", "1", "b", "?"]
    words = [word for word in words if tok.unk_token_id not in tok(word)["input_ids"]]
    labels = label_ids(tok, Template(), words)
    assert len({tuple(ids) for ids in labels}) == len(words)
    whole = tok("input: a\noutput: ", add_special_tokens=False)["input_ids"]
    (row,) = encode(tok, Template(), [("a", None)], next_label="1")
    assert row.ids == whole[: len(row)] and tok.decode(row.ids).rstrip().endswith(":")


def test_llama_2_like_labels_have_no_space_piece_of_their_own():
    tok = tokenizer("llama2")
    for ids in label_ids(tok, Template(), ["positive", "negative"]):
        tokens = tok.convert_ids_to_tokens(ids)
        assert tokens[0].startswith("▁") and "▁" not in tokens


def test_roles_follow_the_characters_and_a_shared_token_its_rule():
    tok = tokenizer("gpt2")
    template = Template("text: {}!", "label: {}.", "\n", " \n")
    (row,) = encode(tok, template, [("the river", "positive")])
    tokens = tok.convert_ids_to_tokens(row.ids)
    of = {}
    for token, role in zip(tokens, row.types):
        of.setdefault(role, []).append(token)
    assert "".join(of[INPUT]) == "ĠtheĠriver"
    assert (
        "".join(of[LABEL]) == "Ġpositive"
    )  # the space is the template's, the letters are the label's
    assert "".join(of[OUTPUT_TEMPLATE]) == "label:."
    assert "".join(of[SEPARATOR]).replace("Ġ", "") == "ĊĊ"


def test_a_token_of_two_parts_belongs_to_the_one_it_says_more_about():
    tok = tokenizer("llama3")  # its pattern joins punctuation with the line ends behind it
    (row,) = encode(tok, Template("{}", "It was {}.", "\n", "\n"), [("the river", "positive")])
    last = tok.convert_ids_to_tokens(row.ids)[-1]
    if last == ".Ċ":
        assert row.types[-1] == OUTPUT_TEMPLATE
    # the rule itself: (what the token says, the part of each character, the parts) -> the part that has it
    assert (
        _owner(".\n\n", [0, 1, 1], [(".", 3), ("\n\n", 0)]) == 0
    )  # letters and marks before spaces
    assert (
        _owner('e".', [0, 1, 1], [("e", 4), ('".', 3)]) == 0
    )  # a label's character before all others
    assert _owner("ab", [0, 1], [("a", 1), ("b", 2)]) == 0  # on a tie the first
    assert row.types.count(LABEL) == len(label_ids(tok, Template(), ["positive"])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_the_context_is_the_same_for_every_query_and_no_character_is_lost_at_the_seam(kind):
    tok = tokenizer(kind)
    awkward = ["", " ", "\n", "\n\nword", ". word", "'s", "  two spaces", "é", "中文", "1", "-"]
    for template in real_templates(kind):
        context = build_context(tok, template, SHOTS)
        open_rows = encode(tok, template, [(q, None) for q in awkward], context, "positive")
        alone = [encode(tok, template, [(q, None)], context, "positive")[0] for q in awkward]
        assert open_rows == alone  # a row does not depend on its company
        for query, row in zip(awkward, open_rows):
            string, start, _ = written(template, [*SHOTS, (query, "positive")])
            label = label_ids(tok, template, ["positive"])[0]
            tokens = tok.convert_ids_to_tokens(context.ids + row.ids + label)
            if kind in ("gpt2", "llama3"):
                assert tok.convert_tokens_to_string(tokens) == string[: start + len("positive")]
            elif "<unk>" not in tokens:
                said = "".join(tokens).replace("▁", "").replace(" ", "")
                assert said == string[: start + len("positive")].replace(" ", "")


def test_bos_is_what_the_tokenizer_puts_first_by_default():
    assert leading_ids(tokenizer("gpt2")) == []
    for kind in KINDS:
        tok = tokenizer(kind, bos=True)
        assert leading_ids(tok) == [tok.bos_token_id]
    context = build_context(tok, Template(), SHOTS, leading=leading_ids(tok))
    assert context.ids[0] == tok.bos_token_id and context.types[0] == SEPARATOR
    assert context.ids.count(tok.bos_token_id) == 1
    whole, _, _ = written(Template(), [*SHOTS, ("the king", "positive")])
    (row,) = encode(tok, Template(), [("the king", "positive")], context)
    assert (context + row).ids[: len(tok(whole)["input_ids"])] == tok(whole)["input_ids"]


def test_types_number_the_examples_and_leave_separators_and_the_instruction_apart():
    tok = tokenizer("gpt2")
    context = build_context(tok, Template(), SHOTS, instruction="Say what it is.")
    assert context.types[: context.n_instruction] == [1] * context.n_instruction
    said = tok.decode(context.ids[: context.n_instruction])
    assert said == "Say what it is.\n"
    labels = [t for t in context.types if t and t % 4 == 0]
    assert sorted(set(labels)) == [4, 8, 12, 16]


def test_the_micro_tasks_have_the_ids_they_always_had():
    """Each piece tokenised alone, with its space in front: what the micro tables were computed with."""
    from transformers import AutoTokenizer

    from minicpt.engine.base_models import MICRO

    tok = AutoTokenizer.from_pretrained(MICRO)
    for name in ("sst2", "ag_news", "trec", "dbpedia", "set_cls"):
        for seed in range(3):
            split = make_split(load_task(name), 4, seed, n_test=20)
            shots = [(text, split.verbalizers[label]) for text, label in split.shots]
            ids, types = [], []
            for i, shot in enumerate(shots):
                carried = ""
                for piece, role in split.template.pieces(*shot):
                    piece = carried + piece
                    stripped = piece.rstrip(" ")
                    carried = piece[len(stripped) :]
                    if stripped:
                        piece_ids = tok(stripped, add_special_tokens=False)["input_ids"]
                        ids += piece_ids
                        types += [role + 4 * i if role else 0] * len(piece_ids)
            context = build_context(tok, split.template, shots)
            assert (context.ids, context.types) == (ids, types)


@pytest.mark.parametrize("kind", KINDS)
def test_cut_texts_have_no_more_tokens_than_asked_and_the_rest_is_whole(kind):
    tok = tokenizer(kind)
    rng = random.Random(0)
    long = [(" ".join(rng.choices("the river of oslo is a long king".split(), k=30)), "positive")]
    for most in (1, 2, 7, 20):
        cut = cut_texts(tok, Template(), [*long, ("a", None)], most)
        rows = encode(tok, Template(), cut)
        assert 0 < sum(t == INPUT for t in rows[0].types) <= most
        assert (
            long[0][0].startswith(cut[0][0]) and cut[0][1] == "positive" and cut[1] == ("a", None)
        )
    assert cut_texts(tok, Template(), long, 1000) == long


def test_a_query_of_which_nothing_stands_before_the_label_is_an_empty_row():
    tok = tokenizer("gpt2")
    (row,) = encode(tok, Template("{}", "{}", " "), [("", None)], next_label="positive")
    assert row == Encoded()


def test_a_label_that_merges_with_what_stands_beside_it_is_refused():
    tok = tokenizer("gpt2")
    with pytest.raises(MiniCPTError, match="space or a line end"):
        glued = Template("{}", "{}", "", "\n")
        rows = encode(tok, glued, [("the ri", "ver"), ("what is o", "slo")])
        labels = dict(zip(("ver", "slo"), label_ids(tok, glued, ["ver", "slo"])))
        require_labels(rows, ["ver", "slo"], labels)


def test_a_tokenizer_without_offsets_is_refused_with_what_to_load():
    class Slow:
        is_fast = False

    with pytest.raises(MiniCPTError, match="fast version of the tokenizer"):
        encode(Slow(), Template(), SHOTS)


def test_ids_and_types_of_different_lengths_are_refused():
    with pytest.raises(MiniCPTError, match="one length"):
        Encoded([1, 2], [1])
    assert len(Context()) == 0
