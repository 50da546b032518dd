"""Context Tuning (arXiv 2507.04221), and CPT with one decision changed at a time.

Both start from the K examples of the context and train what the query attends to: their embeddings (`TunedContext`:
CT-Prompt, and every variant of CPT that PEFT's interface cannot express) or their keys and values in all layers
(`TunedCache`: CT-KV). CPT itself goes through the drop-in classes; with the options below at their defaults
`TunedContext` gives the same numbers (tested), which is what makes it a fair place to change one of them.

Options (hyper-parameters of the same names), and what CPT does:
- `roles`: which tokens move, "all" or some of MOVABLE joined by "+"; CPT: "instruction+template+input"
- `projection`: "token" (CPT: a ball per token), "together" (one ball for the whole delta) or "none"
- `context_labels`: "all" (CPT) or "one", drawn anew for each step
- `leave_one_out`: a training row that is example i of the context does not attend to example i
- `token_dropout`: share of the context's positions that a training row does not attend to, drawn anew for each step
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ..core.embeddings import epsilon_length
from ..core.loss import IGNORE, label_loss
from ..core.masks import SEPARATOR, example_of, is_input, is_label, is_template
from ..core.projection import project, project_together
from ..core.templates import Encoded
from ..engine.base_models import BaseModel
from ..engine.prefix import Prefix, loss_after, run, why_not_shared
from ..errors import MiniCPTError, unknown
from .prepare import Batch
from .registry import Values

MOVABLE = ("instruction", "template", "input", "label", "separator")
OPTIONS = {
    "roles": "instruction+template+input",
    "projection": "token",
    "context_labels": "all",
    "leave_one_out": False,
    "token_dropout": 0.0,
}


def chosen_roles(roles: str, types: Int[Tensor, "P"], n_instruction: int) -> Bool[Tensor, "P"]:
    """Mark the tokens of the named roles; the first `n_instruction` tokens are the instruction's (†)."""
    names = MOVABLE if roles == "all" else roles.split("+")
    for name in names:
        if name not in MOVABLE:
            raise unknown("role", name, [*MOVABLE, "all"])
    first = torch.arange(len(types)) < n_instruction
    instruction = first & (types != SEPARATOR)  # BOS stays where it is
    of = {
        "instruction": instruction,
        "template": is_template(types) & ~instruction,
        "input": is_input(types),
        "label": is_label(types),
        "separator": types == SEPARATOR,
    }
    return torch.stack([of[name] for name in names]).any(0)


def examples_of(types: Int[Tensor, "P"], n_instruction: int) -> Int[Tensor, "P"]:
    """Number the example that each token belongs to, from 0; separators to the one before them, instruction -1."""
    example = example_of(types).cummax(0).values
    return example.masked_fill(torch.arange(len(types)) < n_instruction, -1)


def visible(
    examples: Int[Tensor, "P"], rows: list[int], leave_one_out: bool, dropout: float
) -> Bool[Tensor, "B P"]:
    """Which context tokens each training row may attend to: not its own example, not the dropped positions.

    Row i is example i of the context; rows beyond the context's examples leave nothing out. The other tokens keep their
    positions, except in models that count them by the attention mask (BLOOM, OPT). Source: Context Tuning's
    leave-one-out masking and token dropout; that each row of a step drops positions of its own is our reading.
    """
    seen = torch.rand(len(rows), len(examples)) >= dropout
    if leave_one_out:
        seen &= examples != torch.tensor(rows)[:, None]
    return seen  # (B, P)


class TunedContext:
    """The context's embeddings, free to move as the options say: `weights` to train, `loss`, `project_`, `prefix`."""

    def __init__(self, base: BaseModel, context: Encoded, n_instruction: int, hp: dict):
        self.base, self.hp = base, Values(OPTIONS | hp)
        self.ids, self.types = torch.tensor(context.ids), torch.tensor(context.types)  # (P), (P)
        self.examples = examples_of(self.types, n_instruction)
        self.updated = chosen_roles(self.hp["roles"], self.types, n_instruction).to(base.device)
        self.centre = base.embed(context.ids)[0].float()
        self.delta = torch.zeros_like(self.centre, requires_grad=True)
        self.weights = [self.delta]
        if self.hp["projection"] != "none":
            unit = epsilon_length(hp["epsilon_unit"], base.model.get_input_embeddings())
            content = is_input(self.types) | is_label(self.types)
            radius = torch.where(content, hp["epsilon"], hp["epsilon_format"])
            self.radius = radius.to(base.device) * unit * self.updated  # 0 where nothing moves

    def prefix(self) -> Float[Tensor, "1 P D"]:
        return (self.centre + torch.where(self.updated[:, None], self.delta, 0))[None]

    def loss(self, batch: Batch, rows: list[int]) -> Tensor:
        """The training rows' labels, each row seeing what it may, plus the context's labels, which see everything."""
        prefix = self.prefix().to(self.base.model.dtype)  # (1, P, D)
        seen = visible(self.examples, rows, self.hp["leave_one_out"], self.hp["token_dropout"])
        share = bool(seen.all()) and not why_not_shared(self.base.model)
        loss = loss_after(self.base.model, prefix, *batch, share=share, seen=seen)
        if not self.hp["context_weight"]:
            return loss
        counted = is_label(self.types)
        if self.hp["context_labels"] == "one":
            labelled = self.types[counted].unique()
            counted = self.types == labelled[torch.randint(len(labelled), ())]
        labels = self.ids.masked_fill(~counted, IGNORE)[None]
        logits = self.base.model(inputs_embeds=prefix).logits
        decay = self.hp["decay"]  # once more: the training label comes after the context's last
        context = decay * label_loss(logits, labels, self.types[None], decay, "sum")
        return loss + self.hp["context_weight"] * context

    @torch.no_grad()
    def project_(self) -> None:
        if self.hp["projection"] != "none":
            step = project if self.hp["projection"] == "token" else project_together
            self.delta.copy_(step(self.delta, self.radius))


class TunedCache:
    """CT-KV: the keys and values that the context leaves in every layer are what is trained."""

    def __init__(self, base: BaseModel, context: Encoded, n_instruction: int, hp: dict):
        reason = why_not_shared(base.model)
        if reason:
            raise MiniCPTError(
                f"CT-KV trains the keys and values of the context, and {base.name} does not go on from them: {reason}. "
                "Use ct_prompt or cpt, which train its embeddings."
            )
        self.base, self.hp = base, OPTIONS | hp
        self.examples = examples_of(torch.tensor(context.types), n_instruction)
        with torch.no_grad():
            self.cache = run(base.model, base.embed(context.ids)).cache
        for layer in self.cache.layers:
            layer.keys = layer.keys.float().requires_grad_()  # (1, heads, P, D of a head)
            layer.values = layer.values.float().requires_grad_()
        self.weights = [x for layer in self.cache.layers for x in (layer.keys, layer.values)]

    def prefix(self) -> Prefix:
        """The cache in the model's type, gradients kept."""
        cache = Prefix(self.cache).branch(1)
        for layer in cache.layers:
            layer.keys = layer.keys.to(self.base.model.dtype)
            layer.values = layer.values.to(self.base.model.dtype)
        return Prefix(cache)

    def loss(self, batch: Batch, rows: list[int]) -> Tensor:
        """The training rows' labels, each row continuing from what it may see of the cache."""
        seen = visible(self.examples, rows, self.hp["leave_one_out"], self.hp["token_dropout"])
        return loss_after(self.base.model, self.prefix(), *batch, seen=seen)

    def project_(self) -> None:
        """Nothing holds the cache back: Context Tuning has no ball."""


def cache_to_tensors(prefix: Prefix) -> dict[str, Tensor]:
    """Name the keys and values of each layer, as a file keeps them."""
    tensors = {}
    for i, layer in enumerate(prefix.cache.layers):
        tensors[f"keys.{i}"] = layer.keys
        tensors[f"values.{i}"] = layer.values
    return tensors


def cache_from_tensors(tensors: dict[str, Tensor], device: torch.device) -> Prefix:
    """Build the prefix that `cache_to_tensors` took apart."""
    from transformers import DynamicCache

    pairs = []
    for i in range(len(tensors) // 2):
        pairs.append((tensors[f"keys.{i}"].to(device), tensors[f"values.{i}"].to(device)))
    return Prefix(DynamicCache(pairs))
