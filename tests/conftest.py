"""Everything offline and single-threaded; the core's shape annotations are checked by beartype."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TQDM_DISABLE"] = "1"

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(
    [
        "minicpt.core",
        "minicpt.engine.passes",
        "minicpt.engine.prefix",
        "minicpt.engine.scores",
        "minicpt.dropin.iapt",
        "minicpt.methods.context_tuning",
    ],
    "beartype.beartype",
)

import hypothesis  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# a slow machine is no fault of an example
hypothesis.settings.register_profile("suite", deadline=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(scope="session")
def gpt2():
    """A tiny random GPT-2: dropout off, 60 tokens, 16 dimensions."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=60,
        n_embd=16,
        n_layer=2,
        n_head=2,
        n_positions=64,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="session")
def random_base():
    """A random Llama with the micro model's tokenizer: for mechanics, whatever it has learned."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from minicpt.engine.base_models import MICRO, BaseModel

    tokenizer = AutoTokenizer.from_pretrained(MICRO)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    return BaseModel(
        "random", LlamaForCausalLM(config).eval().requires_grad_(False), tokenizer, "random"
    )
