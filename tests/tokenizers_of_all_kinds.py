"""Small tokenizers of every kind that language models use, trained on a few sentences in a second.

The patterns are the published ones of GPT-2 and Llama 3.
"""

from functools import cache

from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from minicpt.data import load_task, real_specs

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
KINDS = (
    "gpt2",
    "llama3",
    "llama2",
    "metaspace always",
    "metaspace first",
    "metaspace never",
    "unigram",
)


def corpus() -> list[str]:
    """Texts of two tasks, and the words of all real templates and labels, with the spaces that stand around them."""
    texts = [text for name in ("trec", "sst2") for text, _ in load_task(name).train[:300]]
    for spec in real_specs().values():
        for part in ("input", "output"):
            for template in spec["templates"][part]:
                for word in spec["verbalizers"].values():
                    texts.append(
                        f"the text\n\n{template.format(word)}.\n{template.format(word)} and"
                    )
    return texts


@cache
def tokenizer(kind: str, bos: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one of `KINDS`; `bos`: it puts <s> in front by default."""
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    if kind == "unigram":
        inner = Tokenizer(models.Unigram())
        trainer = trainers.UnigramTrainer(vocab_size=700, special_tokens=special, unk_token="<unk>")
    else:
        inner = Tokenizer(models.BPE(unk_token="<unk>"))
        alphabet = pre_tokenizers.ByteLevel.alphabet() if kind in ("gpt2", "llama3") else []
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=special, initial_alphabet=alphabet
        )
    if kind == "gpt2":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        inner.decoder = decoders.ByteLevel()
    elif kind == "llama3":
        inner.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(LLAMA3), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        inner.decoder = decoders.ByteLevel()
    elif kind == "llama2":
        inner.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        used, words = None, pre_tokenizers.Split("▁", "merged_with_next")
    else:
        scheme = kind.split()[-1] if kind.startswith("metaspace") else "always"
        used = words = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    if kind not in (
        "gpt2",
        "llama3",
    ):  # SentencePiece learns no piece of letters and punctuation, or across lines
        marks = pre_tokenizers.Split(Regex(r"[^\p{L}\p{N}▁]"), "isolated")
        inner.pre_tokenizer = pre_tokenizers.Sequence([words, marks])
    inner.train_from_iterator(corpus(), trainer)
    if kind not in ("gpt2", "llama3"):
        inner.pre_tokenizer = used
    if bos:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", inner.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
