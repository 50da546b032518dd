"""What a call of the prompted model does: PEFT's `forward` and `generate`, our checks, CPT loss and shared prefix."""

import copy
import warnings
from collections.abc import Callable, Sequence

import peft
import torch
from jaxtyping import Int
from peft import PeftType
from torch import Tensor
from transformers import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss

from ..core.embeddings import CPTEmbedding, PromptEmbedding, check_ids
from ..core.loss import IGNORE, token_weights
from ..core.masks import is_label, shift_types
from ..core.templates import Encoded
from ..engine.modules import is_hooked
from ..engine.prefix import KeptPrefix, Rows, head, rows_of_prompt, weighted_loss, why_not_shared
from ..engine.scores import label_scores
from ..errors import MiniCPTError
from .outputs import PromptedOutput

# what a call may hold for the shared prefix to serve it; anything else goes to PEFT's forward
_UNDERSTOOD = set(
    "input_type_mask logits_to_keep num_items_in_batch position_ids task_ids token_type_ids use_cache".split()
)
_SWITCHES = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
ENCODERS = {PeftType.PROMPT_TUNING: PromptEmbedding, PeftType.CPT: CPTEmbedding}


def label_context(
    labels: Int[Tensor, "B T"],
    types: Tensor | None,
    config,
    query: Tensor,
    warn: Callable[[str], None],
) -> tuple[Int[Tensor, "B S"], Int[Tensor, "B S"]]:
    """Put the context's labels and types before the query's: each (B, T) -> (B, S), S = P+T, -100 off labels.

    `query` (B, T, D) tells sizes and device. Raises `MiniCPTError` for wrong shapes and where the loss would be
    NaN; `warn` gets what is as in PEFT but hardly meant. Source: PEFT `_cpt_forward`.
    """
    (B, T), P, device = query.shape[:2], config.num_virtual_tokens, query.device
    given, types = types is not None, torch.full((B, T), 4) if types is None else types
    for name, value in (("labels", labels), ("input_type_mask", types)):
        if tuple(value.shape) != (B, T):
            raise MiniCPTError(
                f"{name} has shape {tuple(value.shape)}; it needs one entry per query token, {(B, T)}, and none "
                "for the context, whose own come from the configuration."
            )
    context_types = torch.tensor(config.cpt_tokens_type_mask, device=device)
    types = shift_types(context_types, types.to(device).long())
    types = torch.cat((context_types.expand(B, -1), types), dim=1)
    if not given:
        warn(
            "No input_type_mask: every labelled token counts as part of one label, as in PEFT. Pass the roles of "
            "the query's tokens (4 at its label) to say what is what."
        )
    context_ids = torch.tensor(config.cpt_token_ids, device=device).expand(B, -1)
    labels = torch.cat((context_ids, labels.to(device)), dim=1).masked_fill(
        ~is_label(types), IGNORE
    )
    counted = labels != IGNORE
    if not counted[:, 1:].any():
        raise MiniCPTError(
            "Neither the context nor the query has a label, so the loss would be NaN. Labels are tokens of type 4, "
            "8, ... in cpt_tokens_type_mask and input_type_mask whose label is not -100."
        )
    if not counted[:, P:].any():
        warn(
            "No token of the query counts as a label (labels -100, or no type 4 in input_type_mask): the loss is "
            "the context's alone, as in PEFT, and learns nothing from the query."
        )
    return labels, types


def _output(
    model, rows: Rows, labels: Tensor | None, weights: Tensor | None, keep, use_cache: bool
) -> PromptedOutput:
    """Run the rows and wrap what comes of it: the loss if there are labels, logits once they are read.

    `keep`: transformers' `logits_to_keep`, the last so many tokens of the whole rows, 0 for all, or their indices.
    """
    kept = slice(-keep, None) if isinstance(keep, int) else keep

    def chosen(hidden):
        return rows.whole(hidden)[:, kept]  # (B, R, D) -> (B, n, D)

    if labels is None and (isinstance(keep, Tensor) or keep):
        result = rows.run(model, chosen, use_cache=use_cache)  # few: at once
        cache = result.cache if use_cache else None
        return PromptedOutput(logits=result.logits, past_key_values=cache)
    if labels is None:
        loss, result = None, rows.run(model, use_cache=use_cache)
    else:
        loss, result = weighted_loss(model, rows, labels, weights, use_cache=use_cache)
    output = PromptedOutput(loss=loss, past_key_values=result.cache if use_cache else None)
    # while training, listing the output does not mean reading its logits
    listed = labels is None or not torch.is_grad_enabled()
    return output.defer(lambda: head(model, chosen(result.hidden)), listed)


class PromptedForward(peft.PeftModelForCausalLM):
    """The calls of PEFT's wrapper, for the prompts of `ENCODERS` served by the shared prefix (`prefix.py`).

    A call that wants more (attentions, hidden states, tuples, 4-D masks, a loss function or forward hooks of one's own)
    takes PEFT's plain forward, as all do after `shared_prefix = False`; a model that cannot share says so once, in a
    warning. Threads may share a model: a call leaves nothing in it.
    """

    shared_prefix = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._warned: set[str] = set()
        self._kept = KeptPrefix()  # the prompt's cache between calls

    def _warn_once(self, message: str) -> None:
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=2)

    def forward(
        self, input_ids=None, attention_mask=None, inputs_embeds=None, labels=None, *args, **kwargs
    ):
        """Run [prompt, query]: PEFT's signature; logits (B, P+T, V) and, given labels (B, T), the loss.

        Raises `MiniCPTError` for ids outside the vocabulary and where the loss would be NaN for want of a label.
        """
        kind = self.active_peft_config.peft_type
        if kind in ENCODERS and input_ids is not None:
            check_ids("input_ids", input_ids, self.word_embeddings)
        if kind == PeftType.PROMPT_TUNING and labels is not None:
            counted = labels[labels != IGNORE]
            check_ids("labels", counted, self.word_embeddings)
            # a count of items from outside (Trainer, gradient accumulation) makes the loss of no labels 0, not 0/0
            if not len(counted) and kwargs.get("num_items_in_batch") is None:
                raise MiniCPTError(
                    "All labels are -100: the loss would be NaN. Label at least one token of the batch."
                )
        nothing = input_ids is None and inputs_embeds is None
        if (
            kind not in ENCODERS
            or args
            or nothing
            or self._asks_for_more(attention_mask, labels, kwargs)
        ):
            return super().forward(
                input_ids, attention_mask, inputs_embeds, labels, *args, **kwargs
            )
        return self._shared_forward(input_ids, attention_mask, inputs_embeds, labels, **kwargs)

    def _asks_for_more(self, mask: Tensor | None, labels: Tensor | None, kwargs: dict) -> bool:
        """Whether the call wants something that only whole rows in one plain pass can give."""
        model = self.base_model
        given = {name: value for name, value in kwargs.items() if value is not None}
        switches = {name: getattr(model.config, name, off) for name, off in _SWITCHES.items()}
        wanted = switches | given
        return (
            not self.shared_prefix
            or bool(given.keys() - _UNDERSTOOD - _SWITCHES.keys())
            or any(bool(wanted[name]) != default for name, default in _SWITCHES.items())
            or (mask is not None and mask.dim() != 2)
            or model.get_output_embeddings() is None
            or (labels is not None and model.loss_function is not ForCausalLMLoss)
            or is_hooked(model)
        )

    def _shared_forward(
        self,
        input_ids,
        mask,
        queries,
        labels,
        *,
        logits_to_keep=0,
        use_cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Run [prompt, query] with the prompt run once (`prefix.py`); `shared_prefix = False` turns it off."""
        config, P = self.active_peft_config, len(self.prompt_tokens[self.active_adapter])
        self._adjust_prompt_learning_kwargs(config, kwargs=kwargs)
        if queries is None:
            queries = self.word_embeddings(input_ids)
        weights = None
        if config.peft_type == PeftType.CPT:
            if labels is not None:
                labels, types = self._label_context(
                    labels, kwargs.get("input_type_mask"), config, queries
                )
                options = CPTEmbedding.loss_options(config)
                weights = token_weights(labels[:, 1:], types[:, 1:], **options)
        elif labels is not None:
            labels = torch.cat((labels.new_full((len(labels), P), IGNORE), labels), dim=1)
            counted = labels[:, 1:] != IGNORE
            items = counted.sum() if num_items_in_batch is None else num_items_in_batch
            weights = counted / items
        hides = config.peft_type == PeftType.CPT and not all(config.cpt_mask)
        if mask is None and hides:
            mask = torch.ones(queries.shape[:2], device=queries.device)
        if mask is not None:
            mask = torch.cat((mask.new_ones(len(mask), P), mask), dim=1)
            mask = self._mask_context(mask, config) if hides else mask
        reason = why_not_shared(self.base_model)
        if reason:
            self._warn_once(f"The prompt is run anew for every row, which is slower: {reason}.")
        prompt = self.get_prompt(batch_size=1)
        use_cache = not torch.is_grad_enabled() if use_cache is None else use_cache
        rows = rows_of_prompt(
            self.base_model, prompt, queries, mask, kept=self._kept, share=not reason
        )
        return _output(self.base_model, rows, labels, weights, logits_to_keep, use_cache)

    def generate(self, *args, **kwargs):
        """Generate after [prompt, query]. Source: PEFT `generate`; ids outside the vocabulary raise `MiniCPTError`."""
        if self.active_peft_config.peft_type not in ENCODERS:
            return super().generate(*args, **kwargs)
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if isinstance(ids, Tensor):
            check_ids("input_ids", ids, self.word_embeddings)
        # PEFT sets the two in the base model itself, where other threads and prompts meet them
        model = copy.copy(self.base_model)
        model.prepare_inputs_for_generation = self.prepare_inputs_for_generation
        model.generation_config = self.generation_config
        return model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, *args, **kwargs):
        """One step's inputs, PEFT's; as in `forward`, `cpt_mask` is honoured and the prompt is not run again."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        config = self.active_peft_config
        if config.peft_type == PeftType.CPT:
            inputs["attention_mask"] = self._mask_context(inputs.get("attention_mask"), config)
        if config.peft_type in ENCODERS and self.shared_prefix:
            self._start_from_kept(inputs)
        return inputs

    def _start_from_kept(self, inputs: dict) -> None:
        """At the first step PEFT has put the prompt before every query: put its kept cache there instead."""
        cache, embeds = inputs.get("past_key_values"), inputs.get("inputs_embeds")
        mask, model = inputs.get("attention_mask"), self.base_model
        if embeds is None or type(cache) is not DynamicCache or cache.get_seq_length():
            return
        if model.training or (mask is not None and mask.dim() != 2) or why_not_shared(model):
            return
        P = len(self.prompt_tokens[self.active_adapter])
        prefix = self._kept.get(model, embeds[:1, :P], None if mask is None else mask[:1, :P])
        cache.layers = prefix.branch(len(embeds)).layers
        inputs["inputs_embeds"] = embeds[:, P:]  # (B, P+T, D) -> (B, T, D)

    def _cpt_forward(self, input_ids, inputs_embeds, peft_config, task_ids, batch_size, **kwargs):
        """Run [context, query] and, given labels, the loss over both. Source: PEFT `_cpt_forward`.

        input_ids (B, T) or inputs_embeds (B, T, D), labels (B, T), input_type_mask (B, T); logits (B, P+T, V).
        Unlike PEFT: the active adapter's own config counts, whatever its name; the caller's `input_type_mask` is not
        changed; zeros of `cpt_mask` are honoured in the attention; the base model is not given the labels, so no
        second cross-entropy is computed; roles that would shift, and a loss without any label, raise.
        """
        labels, types = kwargs.pop("labels"), kwargs.pop("input_type_mask", None)
        if inputs_embeds is None:
            inputs_embeds = self.word_embeddings(input_ids)
        if labels is not None:  # first what can be refused, then what takes time
            if kwargs.get("return_dict") is False:
                raise MiniCPTError(
                    "CPT's loss needs return_dict=True: it is put into the output under its name."
                )
            labels, types = self._label_context(labels, types, peft_config, inputs_embeds)
        prompt = self.get_prompt(batch_size=batch_size).to(inputs_embeds.dtype)
        inputs_embeds = torch.cat((prompt, inputs_embeds), dim=1)  # (B, P+T, D)
        mask = kwargs.pop("attention_mask")
        if mask is None and not all(peft_config.cpt_mask):
            mask = torch.ones(inputs_embeds.shape[:2], device=inputs_embeds.device)
        mask = self._mask_context(mask, peft_config)
        output = self.base_model(inputs_embeds=inputs_embeds, attention_mask=mask, **kwargs)
        if labels is None:
            return output
        return CPTEmbedding.calculate_loss(output, labels, types, peft_config)

    def _label_context(self, labels, types, config, query) -> tuple[Tensor, Tensor]:
        labels, types = label_context(labels, types, config, query, self._warn_once)
        check_ids("labels", labels[labels != IGNORE], self.word_embeddings)
        return labels, types

    @staticmethod
    def _mask_context(mask: Tensor | None, config) -> Tensor | None:
        """Write `cpt_mask` into the first P places of the attention mask (B, P+T); all ones change nothing."""
        if mask is None or all(config.cpt_mask):
            return mask
        if mask.dim() != 2:
            raise MiniCPTError(
                "cpt_mask with zeros needs a 2-D attention mask; leave static caches and 4-D masks out."
            )
        mask = mask.clone()
        mask[:, : config.num_virtual_tokens] = torch.tensor(config.cpt_mask, device=mask.device)
        return mask

    def clear_prefix_cache(self) -> None:
        """Forget the prompt's KV cache: for changes of the base model that `modules.state_of` cannot see."""
        self._kept.clear()

    def score(
        self,
        input_ids: Tensor,
        candidates: Sequence[list[int]],
        attention_mask: Tensor | None = None,
        how: str = "sum",
    ) -> Tensor:
        """Log-probability of each candidate label (C lists of ids) after each query (B, T): (B, C) on the CPU.

        Padding may stand on either side; inside `disable_adapter()` there is no prompt. `how`: see `label_scores`.
        """
        check_ids("input_ids", input_ids, self.word_embeddings)
        check_ids(
            "candidates", torch.tensor([t for ids in candidates for t in ids]), self.word_embeddings
        )
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        rows = [ids[real.bool()].tolist() for ids, real in zip(input_ids, mask)]
        queries = [Encoded(ids, [0] * len(ids)) for ids in rows]
        with torch.no_grad():
            prompt = None if self._adapters_disabled else self.get_prompt(batch_size=1)
        return label_scores(self.base_model, prompt, queries, candidates, how, kept=self._kept)
