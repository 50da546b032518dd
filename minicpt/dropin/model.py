"""Attach a prompt to a Hugging Face model: PEFT's wrapper with our prompt encoders, CPT forward, saving and loading.

Change `from peft import ...` to `from minicpt import ...`. The wrapper is a subclass of PEFT's, so
`transformers.Trainer`, `generate` and PEFT itself know it and its files. What differs from PEFT and why is in the
docstrings of `CPTConfig`, `save_pretrained`, `from_pretrained` and of `forward.py`.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path

import peft
import torch
from peft import PromptTuningConfig, PromptTuningInit, TaskType
from torch import Tensor, nn

from ..core.embeddings import CPTEmbedding
from ..errors import MiniCPTError
from . import saving
from .configs import CPTConfig, IAPTConfig, PeftConfig, StandsForPeft
from .forward import ENCODERS, PromptedForward
from .iapt import IAPTModel

__all__ = [
    "AutoPeftModelForCausalLM",
    "CPTConfig",
    "IAPTConfig",
    "PeftModel",
    "PeftModelForCausalLM",
    "PromptTuningConfig",
    "TaskType",
    "get_peft_model",
]


def _is_ours(config: peft.PeftConfig) -> bool:
    return config.peft_type in (*ENCODERS, "IAPT") and config.task_type == TaskType.CAUSAL_LM


def get_peft_model(
    model: nn.Module,
    peft_config: peft.PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
):
    """Wrap `model` with the prompt of `peft_config`; its weights are frozen. Source: PEFT `get_peft_model`.

    CPT and prompt tuning on causal language models get this library's wrapper, IAPT its own, everything else PEFT's.
    """
    old, new = peft_config.base_model_name_or_path, model.__dict__.get("name_or_path") or None
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", FutureWarning
        )  # transformers', about an attribute that PEFT reads
        if mixed or not _is_ours(peft_config):
            return peft.get_peft_model(
                model,
                peft_config,
                adapter_name,
                mixed,
                autocast_adapter_dtype,
                revision,
                low_cpu_mem_usage,
            )
        if old is not None and old != new:
            warnings.warn(
                f"The configuration was made for the base model {old!r} and is now used with {new!r}."
            )
        peft_config.base_model_name_or_path = new
        peft_config.revision = revision or peft_config.revision
        wrapper = IAPTModel if isinstance(peft_config, IAPTConfig) else PeftModelForCausalLM
        return wrapper(model, peft_config, adapter_name)


def _config_in(model_id, **kwargs) -> peft.PeftConfig:
    config = saving.readable(model_id, PeftConfig.from_pretrained, model_id, **kwargs)
    if config.peft_type is None:
        raise MiniCPTError(
            f"The file in {str(model_id)!r} is damaged or no PEFT adapter: it names no peft_type."
        )
    return config


@contextlib.contextmanager
def _without_start_text(config: peft.PeftConfig) -> Iterator[None]:
    """Build a prompt that is about to be loaded without the tokenizer of its start text, which may be gone."""
    init = getattr(config, "prompt_tuning_init", None)
    if init == PromptTuningInit.TEXT:
        config.prompt_tuning_init = PromptTuningInit.RANDOM
    try:
        yield
    finally:
        if init is not None:
            config.prompt_tuning_init = init


class PeftModel(peft.PeftModel, metaclass=StandsForPeft):
    """PEFT's `PeftModel`; `from_pretrained` gives this library's wrapper where `get_peft_model` would."""

    _stands_for = (peft.PeftModel, IAPTModel)

    @classmethod
    def from_pretrained(
        cls, model, model_id, adapter_name="default", is_trainable=False, config=None, **kwargs
    ):
        """Load a saved adapter onto `model`. Source: PEFT `PeftModel.from_pretrained`.

        Unlike there, prompts of causal language models can be trained further (`is_trainable=True`): a context's
        centre is `E[cpt_token_ids]`, its delta the saved prompt minus the centre, or both exactly as they were if the
        folder holds this library's state file. Raises `MiniCPTError` for damaged or foreign files.
        """
        if config is None:
            config = _config_in(model_id, **kwargs)
        if not isinstance(config, peft.PeftConfig) or not _is_ours(config):
            return super().from_pretrained(
                model, model_id, adapter_name, is_trainable, config, **kwargs
            )
        config.inference_mode = not is_trainable
        if isinstance(config, IAPTConfig):
            return IAPTModel(model, config, adapter_name).load_weights(
                saving.read_weights(model_id)
            )
        with _without_start_text(config):
            wrapped = PeftModelForCausalLM(model, config, adapter_name)
        wrapped.load_adapter(model_id, adapter_name, is_trainable=is_trainable, **kwargs)
        return wrapped


class PeftModelForCausalLM(PromptedForward, PeftModel):
    """PEFT's wrapper with this library's prompt encoders, CPT forward, checks, saving and loading."""

    _stands_for = peft.PeftModelForCausalLM

    def add_adapter(self, adapter_name: str, peft_config: peft.PeftConfig, **kwargs) -> None:
        """Add a prompt by name, any name; `set_adapter` makes it the active one. Source: PEFT `add_adapter`."""
        if peft_config.peft_type in ENCODERS and peft_config.token_dim is None:
            # PEFT takes hidden_size, which some models (OPT-350m) project their embeddings to
            peft_config.token_dim = self.base_model.get_input_embeddings().weight.shape[1]
        if peft_config.peft_type in ENCODERS and peft_config.num_attention_heads is None:
            # PEFT stops where it does not find them (MPT, XGLM), though no prompt needs their number
            sizes = self.base_model.config.get_text_config()
            peft_config.num_attention_heads = getattr(sizes, "num_attention_heads", 0)
        super().add_adapter(adapter_name, peft_config, **kwargs)

    def _setup_prompt_encoder(self, adapter_name: str) -> None:
        config = self.peft_config[adapter_name]
        if config.peft_type not in ENCODERS:
            super()._setup_prompt_encoder(adapter_name)
            return
        if not hasattr(self, "prompt_encoder"):
            self.prompt_encoder, self.prompt_tokens = nn.ModuleDict(), {}
        self.base_model.requires_grad_(False)
        self.transformer_backbone_name = self.base_model.base_model_prefix
        if config.num_transformer_submodules is None:
            config.num_transformer_submodules = 1
        self.word_embeddings = self.base_model.get_input_embeddings()
        if config.token_dim != self.word_embeddings.weight.shape[1]:
            raise MiniCPTError(
                f"token_dim is {config.token_dim}, the model's embeddings have {self.word_embeddings.weight.shape[1]} "
                "dimensions. Load a saved prompt on the base model it was trained for; in a new configuration leave "
                "token_dim out, it is read from the model."
            )
        encoder = ENCODERS[config.peft_type](config, self.word_embeddings).to(self.device)
        self.prompt_encoder[adapter_name] = encoder
        self.prompt_tokens[adapter_name] = torch.arange(
            config.num_virtual_tokens * config.num_transformer_submodules, device=self.device
        )

    # ---- files -----------------------------------------------------------------------------------------------------

    def get_prompt_embedding_to_save(self, adapter_name: str) -> Tensor:
        """Return the prompt as it is saved, (P, D) on the CPU; unlike PEFT's, this does not project delta in place."""
        encoder = self.prompt_encoder[adapter_name]
        if not isinstance(encoder, CPTEmbedding):
            return super().get_prompt_embedding_to_save(adapter_name)
        return (encoder.embedding.weight + encoder.get_projection()).detach().cpu()

    def save_pretrained(
        self, save_directory, *args, training_state: dict | None = None, **kwargs
    ) -> None:
        """Save in PEFT's format, with PEFT's arguments; an interrupted save leaves the old files as they were.

        Beside PEFT's files, `minicpt_state.safetensors` keeps a context's centre and delta exactly. `training_state`,
        objects by name (`{"optimizer": optimizer, "scheduler": scheduler, "generator": generator}`), goes there too,
        for the active adapter, with torch's random state; `load_training_state` gives it back.
        """
        with saving.replacing(save_directory) as new:
            super().save_pretrained(str(new), *args, **kwargs)
            for name, encoder in getattr(self, "prompt_encoder", {}).items():  # LoRA has none
                folder = new if name == "default" else new / name
                if (
                    folder / saving.CONFIG
                ).is_file():  # none if it was not selected, or not in the main process
                    extra = training_state if name == self.active_adapter else None
                    saving.write_state(folder, encoder, extra)

    def load_adapter(self, model_id, adapter_name: str, is_trainable: bool = False, **kwargs):
        """Load a saved adapter under a new name, or into the adapter of that name. Source: PEFT `load_adapter`.

        Differences: as for `PeftModel.from_pretrained`; an adapter that cannot be loaded is not left half added.
        """
        if self.peft_type not in ENCODERS:
            return super().load_adapter(model_id, adapter_name, is_trainable, **kwargs)
        is_new = adapter_name not in self.peft_config
        if is_new:
            hub_kwargs, _ = self._split_kwargs(kwargs)
            config = _config_in(model_id, **hub_kwargs)
            config.inference_mode = not is_trainable
            with _without_start_text(
                config
            ):  # added already, so that PEFT loads and does not refuse
                self.add_adapter(adapter_name, config)
        folder, load = Path(model_id, kwargs.get("subfolder") or ""), super().load_adapter
        try:
            saving.require_weights(folder)
            result = saving.readable(
                folder, load, model_id, adapter_name, is_trainable=is_trainable, **kwargs
            )
            if not self.peft_config[adapter_name].inference_mode:
                saving.restore_exactly(folder, self.prompt_encoder[adapter_name])
        except BaseException:
            if is_new:
                del (
                    self.peft_config[adapter_name],
                    self.prompt_encoder[adapter_name],
                    self.prompt_tokens[adapter_name],
                )
            raise
        return result


class AutoPeftModelForCausalLM(peft.AutoPeftModelForCausalLM):
    """PEFT's loader of base model and adapter in one call, with this library's wrapper."""

    _target_peft_class = PeftModelForCausalLM

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        """Load as PEFT does, with PEFT's arguments. Raises `MiniCPTError` for IAPT, which PEFT cannot read."""
        try:
            return super().from_pretrained(*args, **kwargs)
        except KeyError as error:
            if error.args != ("IAPT",):
                raise
            raise MiniCPTError(
                "AutoPeftModelForCausalLM cannot load IAPT's generators: PEFT does not know them. Load the base model "
                "and use PeftModel.from_pretrained(model, folder)."
            ) from error
