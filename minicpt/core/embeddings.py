"""`PromptEmbedding` and `CPTEmbedding`: prompt tokens as embeddings, `(*B P)` indices -> `(*B P D)` vectors.

Drop-in for PEFT's classes of the same names: same attributes, same numbers. Any object with PEFT's config fields will
do as `config`; the classes here need torch alone.
"""

import copy

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..errors import MiniCPTError, unknown
from .loss import label_loss
from .masks import is_updated
from .projection import epsilon_scale, project, token_epsilon
from .templates import tokenize


def check_ids(name: str, ids: Tensor, word_embeddings: nn.Module) -> None:
    """Raise `MiniCPTError` if an id (tensor of any shape) has no row in the word embeddings."""
    V = word_embeddings.weight.shape[0]
    wrong = ids[(ids < 0) | (ids >= V)]
    if wrong.numel():
        raise MiniCPTError(
            f"{name}: token ids {wrong[:5].tolist()} are outside the model's vocabulary of {V} tokens. Tokenise with "
            "the tokenizer of this very model, or call resize_token_embeddings on the model before wrapping it."
        )


def rows_of(word_embeddings: nn.Module, ids: list[int]) -> Float[Tensor, "P D"]:
    """Copy the word embeddings of `ids` in float32, (P, D); ids outside the vocabulary raise `MiniCPTError`."""
    tensor = torch.tensor(ids, device=word_embeddings.weight.device)
    check_ids("prompt", tensor, word_embeddings)
    with torch.no_grad():  # through forward, not .weight: some models scale their embeddings there
        return word_embeddings(tensor).detach().clone().float()


def epsilon_length(unit: str, word_embeddings: nn.Module) -> float:
    """Length of one epsilon for this model's embeddings, by `projection.epsilon_scale`."""
    weight = word_embeddings.weight
    mean_norm = weight.float().norm(dim=1).mean().item() if unit == "mean_norm" else None
    return epsilon_scale(unit, weight.shape[1], mean_norm)


class PromptEmbedding(nn.Module):
    """Soft prompt of prompt tuning: a trainable row per virtual token.

    `config`: `num_virtual_tokens`, `num_transformer_submodules`, `token_dim`, `prompt_tuning_init` (RANDOM,
    SAMPLE_VOCAB, TEXT) and, for TEXT, `prompt_tuning_init_text`, `tokenizer_name_or_path`, `tokenizer_kwargs`.
    Input (batch, total virtual tokens) -> output (batch, total virtual tokens, token_dim).
    Source: PEFT `PromptEmbedding`; unlike there, TEXT leaves the tokenizer's special tokens out.
    """

    def __init__(self, config, word_embeddings: nn.Module):
        super().__init__()
        P = config.num_virtual_tokens * config.num_transformer_submodules
        init = getattr(config.prompt_tuning_init, "value", config.prompt_tuning_init)
        self.embedding = nn.Embedding(P, config.token_dim)
        if config.inference_mode or init == "RANDOM":
            return  # inference: the values are about to be loaded
        if init == "SAMPLE_VOCAB":
            ids = torch.randint(0, word_embeddings.weight.shape[0], (P,)).tolist()
        elif init == "TEXT":
            ids = self._text_ids(config)
            ids = (ids * (-(-P // len(ids))))[:P]  # repeat or cut to P tokens, as PEFT does
        else:
            raise unknown("prompt_tuning_init", init, ["RANDOM", "SAMPLE_VOCAB", "TEXT"])
        self.embedding.weight = nn.Parameter(rows_of(word_embeddings, ids))

    @staticmethod
    def _text_ids(config) -> list[int]:
        from transformers import AutoTokenizer

        options = dict(config.tokenizer_kwargs or {})
        options.pop("trust_remote_code", None)
        tokenizer = AutoTokenizer.from_pretrained(config.tokenizer_name_or_path, **options)
        ids = tokenize(tokenizer, [config.prompt_tuning_init_text])[0]
        if not ids:
            raise MiniCPTError(
                "prompt_tuning_init_text holds no token; give a sentence, or use RANDOM."
            )
        return ids

    def forward(self, indices: Int[Tensor, "*B P"]) -> Float[Tensor, "*B P D"]:
        return self.embedding(indices)

    def _load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved prompt (PEFT's hook)."""
        self.embedding.load_state_dict({"weight": _saved_prompt(self, state)})


class CPTEmbedding(nn.Module):
    """Context-aware prompt: frozen embeddings of the context plus a trainable delta inside a ball per token.

    `config`: `cpt_token_ids`, `cpt_tokens_type_mask`, `opt_projection_epsilon`, `opt_projection_format_epsilon`,
    `opt_weighted_loss_type`, `opt_loss_decay_factor`, `num_virtual_tokens`, `token_dim`; optional, ours:
    `opt_epsilon_unit`, `opt_loss_reduction`, `opt_context_loss_weight`.
    Input (batch, P) -> output (batch, P, token_dim). Sources: paper 3.2.2, PEFT `CPTEmbedding`.
    """

    def __init__(self, config, word_embeddings: nn.Module):
        super().__init__()
        self.config = copy.deepcopy(config)
        centre = rows_of(word_embeddings, list(config.cpt_token_ids))
        self.embedding = nn.Embedding.from_pretrained(centre, freeze=True)
        zeros = torch.zeros_like(self.embedding.weight)
        self.delta_embedding = nn.Embedding.from_pretrained(zeros, freeze=False)
        types = torch.tensor(config.cpt_tokens_type_mask, device=self.embedding.weight.device)
        self.register_buffer("types", types, persistent=False)
        self.scale = epsilon_length(getattr(config, "opt_epsilon_unit", "peft"), word_embeddings)
        self.set_updated_tokens()

    def set_updated_tokens(self) -> None:
        """Let gradients through to input and template tokens only; labels and separators stay put.

        PEFT hangs a hook on the weight for this, which a deep copy of the model loses; here `forward` does it.
        """
        self.register_buffer("updated", is_updated(self.types)[:, None], persistent=False)

    def get_epsilon(self) -> Float[Tensor, "P"]:
        """Radius of each token's ball, (P,)."""
        of_input = self.config.opt_projection_epsilon
        of_format = self.config.opt_projection_format_epsilon
        return token_epsilon(self.types, of_input, of_format, self.scale)

    @torch.no_grad()
    def get_projection(self) -> Float[Tensor, "P D"]:
        """Delta with every row inside its ball, (P, D); nothing is changed."""
        delta = self.delta_embedding.weight
        # in float32, for half precision rounds 1e-10 to 0
        projected = project(delta.float(), self.get_epsilon().to(delta.device))
        return projected.to(delta.dtype)

    @torch.no_grad()
    def project_(self) -> None:
        """Pull delta back onto its balls, in place: what `train.py` calls right after the optimiser's step."""
        self.delta_embedding.weight.copy_(self.get_projection())

    def forward(self, indices: Int[Tensor, "*B P"]) -> Float[Tensor, "*B P D"]:
        # looking changes nothing: projecting twice would differ in the last bit
        if not torch.is_grad_enabled():
            return self.embedding(indices) + F.embedding(indices, self.get_projection())
        # lazily, as PEFT: whoever trains without project_() is inside the ball by the next forward
        self.project_()
        delta = self.delta_embedding(indices)
        return self.embedding(indices) + torch.where(self.updated[indices], delta, delta.detach())

    @staticmethod
    def loss_options(config) -> dict:
        """The configuration's options of `label_loss` and `token_weights`, as keywords."""
        decays = config.opt_weighted_loss_type == "decay"
        return {
            "decay": config.opt_loss_decay_factor if decays else 1.0,
            "reduction": getattr(config, "opt_loss_reduction", "mean"),
            "context_weight": getattr(config, "opt_context_loss_weight", 1.0),
        }

    @staticmethod
    def calculate_loss(base_model_output, labels: Tensor, cpt_type_mask: Tensor, config):
        """Set `base_model_output.loss` from its logits (B, S, V), labels (B, S) and types (B, S); return it.

        Source: PEFT `CPTEmbedding.calculate_loss`, same numbers for `opt_loss_reduction="mean"` (the default).
        """
        options = CPTEmbedding.loss_options(config)
        logits = base_model_output.logits
        base_model_output.loss = label_loss(logits, labels, cpt_type_mask, **options)
        return base_model_output

    @torch.no_grad()
    def _load_adapter_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over a saved prompt (PEFT's hook), which is embedding + delta.

        For inference the sum becomes the embedding, bit by bit, as in PEFT; for training the embedding stays the
        centre and delta becomes the difference. Raises `MiniCPTError` if that lies outside the ball: the next
        projection would change the prompt.
        """
        saved = _saved_prompt(self, state).to(self.embedding.weight)
        if self.config.inference_mode:
            self.embedding.weight.copy_(saved)
            self.delta_embedding.weight.zero_()
            return
        delta = saved - self.embedding.weight
        epsilon = self.get_epsilon().to(delta)
        rounding = 0.01 * (self.embedding.weight.norm(dim=1) + epsilon)  # of bfloat16, at most
        outside = delta.norm(dim=1) > epsilon + rounding
        if outside.any():
            raise MiniCPTError(
                f"{int(outside.sum())} of {len(delta)} tokens of the saved prompt are farther from the embeddings of "
                "cpt_token_ids than epsilon allows: it was trained on another base model or with another epsilon. "
                "Load it on its own base model, or for inference only (is_trainable=False)."
            )
        self.delta_embedding.weight.copy_(delta)


def _saved_prompt(module: nn.Module, state: dict[str, Tensor]) -> Tensor:
    """Return the prompt of an adapter file; `MiniCPTError` if there is none or it has another shape."""
    if "prompt_embeddings" not in state:
        raise MiniCPTError(
            f"The file holds no 'prompt_embeddings' but {sorted(state)[:3]}: it is the file of another method. "
            "Load it with the configuration it was saved with."
        )
    saved, expected = state["prompt_embeddings"], tuple(module.embedding.weight.shape)
    if tuple(saved.shape) != expected:
        raise MiniCPTError(
            f"The saved prompt has shape {tuple(saved.shape)}, this model needs {expected} (virtual tokens, "
            "embedding size); load it on the base model it was trained for."
        )
    return saved
