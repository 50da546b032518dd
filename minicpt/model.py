"""Attach a prompt to a Hugging Face model: PEFT's configs and wrapper, with our prompt encoders and CPT forward.

The wrapper is a subclass of PEFT's, so `transformers.Trainer`, `generate` and `save_pretrained` know it. What differs
from PEFT and why is in the docstrings of `CPTConfig` and `_cpt_forward`.
"""

import warnings
from dataclasses import dataclass, field
from typing import Literal

import peft
import torch
from peft import PeftType, PromptTuningInit, TaskType
from torch import Tensor, nn

from .embeddings import CPTEmbedding, PromptEmbedding
from .errors import MiniCPTError
from .masks import is_label, shift_types

__all__ = ["CPTConfig", "PeftModelForCausalLM", "PromptTuningConfig", "PromptTuningInit", "TaskType", "get_peft_model"]

PromptTuningConfig = peft.PromptTuningConfig


@dataclass
class CPTConfig(peft.CPTConfig):
    """PEFT's `CPTConfig` with three more fields, whose defaults leave its numbers as they are.

    - `opt_loss_reduction`: `"mean"` over label tokens (PEFT) or `"sum"` over labels (paper 3.2.1)
    - `opt_epsilon_unit`: epsilon counts sqrt(D/2048) (`"peft"`) or mean token-embedding norms (`"mean_norm"`)
    - `opt_context_loss_weight`: factor on the context labels' loss; 0 trains on the training label alone

    Raises `ValueError` for a task type other than CAUSAL_LM and for lists of unequal length, as PEFT does.
    """

    opt_loss_reduction: Literal["mean", "sum"] = field(default="mean", metadata={"help": "mean (PEFT) or sum (paper)"})
    opt_epsilon_unit: Literal["peft", "mean_norm"] = field(default="peft", metadata={"help": "unit of epsilon"})
    opt_context_loss_weight: float = field(default=1.0, metadata={"help": "factor on the context labels' loss"})

    def __post_init__(self):
        super().__post_init__()
        for name, valid in [
            ("opt_weighted_loss_type", ("none", "decay")),
            ("opt_loss_reduction", ("mean", "sum")),
            ("opt_epsilon_unit", ("peft", "mean_norm")),
        ]:
            if getattr(self, name) not in valid:
                raise MiniCPTError(f"{name} must be one of {valid}, got {getattr(self, name)!r}.")
        for name in ("opt_projection_epsilon", "opt_projection_format_epsilon"):
            if not getattr(self, name) >= 0:
                raise MiniCPTError(f"{name} is a radius and must be >= 0, got {getattr(self, name)!r}.")


ENCODERS = {PeftType.PROMPT_TUNING: PromptEmbedding, PeftType.CPT: CPTEmbedding}


def get_peft_model(model: nn.Module, peft_config: peft.PeftConfig, adapter_name: str = "default", **kwargs):
    """Wrap `model` with the prompt of `peft_config`; its weights are frozen. Source: PEFT `get_peft_model`.

    CPT and prompt tuning on causal language models get this library's wrapper, everything else PEFT's own.
    """
    ours = peft_config.peft_type in ENCODERS and peft_config.task_type == TaskType.CAUSAL_LM
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # transformers', about an attribute that PEFT reads
        if not ours or kwargs:
            return peft.get_peft_model(model, peft_config, adapter_name, **kwargs)
        peft_config.base_model_name_or_path = model.__dict__.get("name_or_path") or None
        return PeftModelForCausalLM(model, peft_config, adapter_name)


class PeftModelForCausalLM(peft.PeftModelForCausalLM):
    """PEFT's wrapper with this library's prompt encoders and CPT forward."""

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
                "dimensions; leave token_dim out, it is read from the model."
            )
        encoder = ENCODERS[config.peft_type](config, self.word_embeddings).to(self.device)
        self.prompt_encoder[adapter_name] = encoder
        self.prompt_tokens[adapter_name] = torch.arange(config.num_virtual_tokens * config.num_transformer_submodules)

    def _cpt_forward(self, input_ids, inputs_embeds, peft_config, task_ids, batch_size, **kwargs):
        """Run [context, query] and, given labels, the loss over both. Source: PEFT `_cpt_forward`.

        input_ids (B, T) or inputs_embeds (B, T, D), labels (B, T), input_type_mask (B, T); logits (B, P+T, V).
        Unlike PEFT: the active adapter's own config counts, whatever its name; the caller's `input_type_mask` is not
        changed; zeros of `cpt_mask` are honoured in the attention; the base model is not given the labels, so no
        second cross-entropy is computed; roles that would shift raise.
        """
        labels, types = kwargs.pop("labels"), kwargs.pop("input_type_mask", None)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        device, T = inputs_embeds.device, inputs_embeds.shape[1]
        prompt = self.get_prompt(batch_size=batch_size).to(inputs_embeds.dtype)
        kwargs["attention_mask"] = self._mask_context(kwargs.get("attention_mask"), peft_config, batch_size, T, device)
        output = self.base_model(inputs_embeds=torch.cat((prompt, inputs_embeds), dim=1), **kwargs)
        if labels is None:
            return output

        prefix_types = torch.tensor(peft_config.cpt_tokens_type_mask, device=device)
        if types is None:
            warnings.warn(
                "No input_type_mask: every labelled token counts as part of one label, as in PEFT. Pass the roles of "
                "the query's tokens (4 at its label) to say what is what.",
                stacklevel=2,
            )
            types = torch.full((batch_size, T), 4, device=device)
        types = shift_types(prefix_types, types.to(device).long())
        types = torch.cat((prefix_types.expand(batch_size, -1), types), dim=1)
        prefix_ids = torch.tensor(peft_config.cpt_token_ids, device=device).expand(batch_size, -1)
        labels = torch.cat((prefix_ids, labels.to(device)), dim=1)
        labels = labels.masked_fill(~is_label(types), -100)
        return CPTEmbedding.calculate_loss(output, labels, types, peft_config)

    @staticmethod
    def _mask_context(mask: Tensor | None, config, batch_size: int, T: int, device) -> Tensor | None:
        """Write `cpt_mask` into the first P places of the attention mask (B, P+T); all ones need no mask at all."""
        if all(config.cpt_mask):
            return mask
        P = config.num_virtual_tokens
        mask = torch.ones(batch_size, P + T, device=device) if mask is None else mask.clone()
        mask[:, :P] = torch.tensor(config.cpt_mask, device=mask.device)
        return mask
