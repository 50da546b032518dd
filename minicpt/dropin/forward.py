"""What a call of the prompted model does: PEFT's `forward` and `generate`, our checks, CPT loss and shared prefix."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import replace

import peft
import torch
from peft import PeftType
from torch import Tensor
from transformers import DynamicCache
from transformers.loss.loss_utils import ForCausalLMLoss

from ..core.embeddings import CPTEmbedding, PromptEmbedding, check_ids
from ..core.loss import IGNORE, send, token_weights
from ..core.templates import Encoded
from ..engine.memory import rows_that_fit
from ..engine.modules import is_hooked
from ..engine.passes import attended
from ..engine.prefix import KeptPrefix, rows_of_prompt, why_not_shared
from ..engine.scores import label_scores
from ..errors import MiniCPTError
from .labels import beside_the_prompt, label_context, label_query, share_of_batch
from .outputs import output_of
from .padding import positions

# what a call may hold for the shared prefix to serve it; anything else goes to the plain forward
_UNDERSTOOD = {"logits_to_keep", "num_items_in_batch", "task_ids", "use_cache"}
_POSITIONAL = ("output_attentions", "output_hidden_states", "return_dict", "task_ids")  # PEFT's
_SWITCHES = {
    "output_attentions": False,
    "output_hidden_states": False,
    "output_router_logits": False,
    "return_dict": True,
}
ENCODERS = {PeftType.PROMPT_TUNING: PromptEmbedding, PeftType.CPT: CPTEmbedding}


class PromptedForward(peft.PeftModelForCausalLM):
    """The calls of PEFT's wrapper, for the prompts of `ENCODERS` served by the shared prefix (`prefix.py`).

    A call that wants more (attentions, hidden states, tuples, a loss function or forward hooks of one's own) takes the
    plain forward of whole rows, as all do after `shared_prefix = False`; a model that cannot share says so once.
    Threads may share a model: a call leaves nothing in it.
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

        Padding takes no position, on whichever side it stands. After a filled `past_key_values` the prompt is not run
        again; `attention_mask` then covers the query's tokens in the cache and the new ones. CPT's loss of a batch with
        `num_items_in_batch` is its share of the loss of all accumulated batches (`labels.share_of_batch`).
        Raises `MiniCPTError` for ids outside the vocabulary and where the loss would be NaN for want of a label.
        """
        config = self.active_peft_config
        if config.peft_type not in ENCODERS or (input_ids is None and inputs_embeds is None):
            return super().forward(
                input_ids, attention_mask, inputs_embeds, labels, *args, **kwargs
            )
        kwargs |= zip(_POSITIONAL, args)
        self._adjust_prompt_learning_kwargs(config, kwargs=kwargs)
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        types, items = kwargs.pop("input_type_mask", None), kwargs.get("num_items_in_batch")
        queries, ids = inputs_embeds, None
        if input_ids is not None:
            ids = input_ids.cpu()
            check_ids("input_ids", ids, self.word_embeddings)
        if inputs_embeds is None:
            queries = self.word_embeddings(send(input_ids, self.word_embeddings.weight.device))
        cache, P = kwargs.get("past_key_values"), len(self.prompt_tokens[self.active_adapter])
        filled = cache.get_seq_length() if cache is not None else 0
        if filled and (labels is not None or filled < P):
            raise MiniCPTError(
                f"past_key_values holds {filled} tokens: it must begin with the prompt's {P}, as the cache that a call "
                "returned does, and labels need whole rows. Leave one of the two out."
            )
        mask, places = self._mask_rows(attention_mask, queries, max(filled - P, 0))
        share = 1.0
        if labels is not None:
            labels = labels.cpu()
            if config.peft_type == PeftType.CPT:
                share = share_of_batch(self.base_model, labels, items, self._warn_once)
                labels, types = label_context(labels, types, config, queries, self._warn_once)
            else:
                labels, types = label_query(labels, P, items), None
            check_ids("labels", labels[labels != IGNORE], self.word_embeddings)
            if mask is not None:
                labels, types = beside_the_prompt(labels, types, mask, P)
        if filled or self._asks_for_more(labels, kwargs):
            return self._plain_forward(queries, mask, places, labels, types, share, **kwargs)
        return self._shared_forward(queries, ids, mask, places, labels, types, share, **kwargs)

    def _asks_for_more(self, labels: Tensor | None, given: dict) -> bool:
        """Whether the call wants something that only whole rows in one plain pass can give."""
        model = self.base_model
        switches = {name: getattr(model.config, name, off) for name, off in _SWITCHES.items()}
        wanted = switches | given
        return (
            not self.shared_prefix
            or bool(given.keys() - _UNDERSTOOD - _SWITCHES.keys())
            or any(bool(wanted[name]) != default for name, default in _SWITCHES.items())
            or model.get_output_embeddings() is None
            or (labels is not None and model.loss_function is not ForCausalLMLoss)
            or is_hooked(model)
        )

    def _mask_rows(
        self, mask: Tensor | None, queries: Tensor, cached: int
    ) -> tuple[Tensor | None, Tensor | None]:
        """Attention mask of [prompt, cached, query], zeros of `cpt_mask` included, and the query's positions.

        None for a mask of ones, and for the positions that the model counts by itself.
        """
        config, (B, T) = self.active_peft_config, queries.shape[:2]
        if mask is None and all(getattr(config, "cpt_mask", ())):
            return None, None
        if mask is None:
            mask = torch.ones(B, cached + T)
        if tuple(mask.shape) != (B, cached + T):
            raise MiniCPTError(
                f"attention_mask has shape {tuple(mask.shape)}; it needs one entry per query token, {(B, cached + T)}, "
                "those in past_key_values included, and none for the prompt."
            )
        before = mask.new_ones(B, len(self.prompt_tokens[self.active_adapter]))
        mask = torch.cat((before, mask), dim=1).cpu()
        return self._mask_context(mask, config), positions(self.base_model, mask)

    def _plain_forward(self, queries, mask, places, labels, types, share, **kwargs):
        """Run whole rows, as PEFT does, or after a filled cache the query alone."""
        config, cache = self.active_peft_config, kwargs.get("past_key_values")
        own_loss = labels is not None and config.peft_type == PeftType.CPT
        if own_loss and kwargs.get("return_dict") is False:
            raise MiniCPTError(
                "CPT's loss needs return_dict=True: it is put into the output under its name."
            )
        rows = queries
        if cache is None or not cache.get_seq_length():
            prompt = self.get_prompt(batch_size=len(queries)).to(queries.dtype)
            rows = torch.cat((prompt, queries), dim=1)  # (B, P+T, D)
        if places is not None:
            kwargs["position_ids"] = send(places[:, -rows.shape[1] :], rows.device)
        if labels is not None and not own_loss:
            kwargs["labels"] = send(labels, rows.device)
        kwargs["attention_mask"] = attended(mask, rows.device)
        output = self.base_model(inputs_embeds=rows, **kwargs)
        if own_loss:
            CPTEmbedding.calculate_loss(output, labels, types, config)
            output.loss = share * output.loss
        return output

    def _shared_forward(
        self,
        queries,
        ids,
        mask,
        places,
        labels,
        types,
        share,
        *,
        logits_to_keep=0,
        use_cache=None,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Run [prompt, query] with the prompt run once (`prefix.py`); `shared_prefix = False` turns it off."""
        config, weights = self.active_peft_config, None
        if labels is not None and config.peft_type == PeftType.CPT:
            options = CPTEmbedding.loss_options(config)
            weights = share * token_weights(labels[:, 1:], types[:, 1:], **options)
        elif labels is not None:
            counted = labels[:, 1:] != IGNORE
            items = counted.sum() if num_items_in_batch is None else num_items_in_batch
            weights = counted / int(items)
        reason = why_not_shared(self.base_model)
        if reason:
            self._warn_once(f"The prompt is run anew for every row, which is slower: {reason}.")
        prompt = self.get_prompt(batch_size=1)
        use_cache = not torch.is_grad_enabled() if use_cache is None else use_cache
        rows = rows_of_prompt(
            self.base_model, prompt, queries, mask, ids=ids, kept=self._kept, share=not reason
        )
        rows = replace(rows, positions=places)
        return output_of(self.base_model, rows, labels, weights, logits_to_keep, use_cache)

    def generate(self, *args, **kwargs):
        """Generate after [prompt, query]. Source: PEFT `generate`; ids outside the vocabulary raise `MiniCPTError`."""
        if self.active_peft_config.peft_type not in ENCODERS:
            return super().generate(*args, **kwargs)
        ids = args[0] if args else kwargs.get("input_ids", kwargs.get("inputs"))
        if isinstance(ids, Tensor):
            check_ids("input_ids", ids, self.word_embeddings)
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() == 2 and not mask[:, -1].all():
            self._warn_once(
                "A row ends in padding, and what is generated comes after that. Pad on the left (padding_side='left')."
            )
        # PEFT sets the two in the base model itself, where other threads and prompts meet them
        model = copy.copy(self.base_model)
        model.prepare_inputs_for_generation = self.prepare_inputs_for_generation
        model.generation_config = self.generation_config
        return model.generate(*args, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, *args, **kwargs):
        """One step's inputs, PEFT's; as in `forward`, padding takes no position, `cpt_mask` is honoured and the prompt
        is not run again. What a cache given by the caller lacks is run as a whole, where PEFT takes the last token.
        """
        config = self.active_peft_config
        if config.peft_type not in ENCODERS:
            return super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        if getattr(kwargs.get("past_key_values"), "is_compileable", False):
            raise MiniCPTError(
                "PEFT cannot put a prompt into a static cache. Leave cache_implementation out."
            )
        kwargs.pop("position_ids", None)  # transformers', which do not know of the prompt
        inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
        mask = inputs.get("attention_mask")
        places = None
        if mask is not None and mask.dim() == 2:
            places = positions(self.base_model, mask)
            if inputs["input_ids"] is not None:  # [prompt, text] but for what is in the cache
                left = mask.shape[1] - inputs["past_key_values"].get_seq_length()
                inputs["input_ids"] = input_ids[:, -left:]
        inputs["attention_mask"] = self._mask_context(mask, config)
        if self.shared_prefix:
            self._start_from_kept(inputs)
        if places is not None:
            tokens = (
                inputs["input_ids"]
                if inputs.get("inputs_embeds") is None
                else inputs["inputs_embeds"]
            )
            inputs["position_ids"] = places[:, -tokens.shape[1] :]
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

    @staticmethod
    def _mask_context(mask: Tensor | None, config) -> Tensor | None:
        """Write `cpt_mask` into the first P places of the attention mask (B, P+T); all ones change nothing."""
        if mask is None or all(getattr(config, "cpt_mask", ())):  # a soft prompt has none
            return mask
        if mask.dim() != 2:
            raise MiniCPTError(
                "cpt_mask with zeros needs a 2-D attention mask; leave static caches and 4-D masks out."
            )
        mask = mask.clone()
        mask[:, : config.num_virtual_tokens] = torch.tensor(config.cpt_mask)
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
        rows = [ids[real.bool()].tolist() for ids, real in zip(input_ids.cpu(), mask.cpu())]
        queries = [Encoded(ids, [0] * len(ids)) for ids in rows]
        with torch.no_grad():
            prompt = None if self._adapters_disabled else self.get_prompt(batch_size=1)
        model, seen, P = self.base_model, None, 0
        if prompt is not None:
            P = prompt.shape[1]
            seen = torch.tensor(getattr(self.active_peft_config, "cpt_mask", [1] * P))
        longest = max(map(len, [*rows, ()])) + max(map(len, [*candidates, ()]))
        at_once = rows_that_fit(model, model.device, P, longest, 0)
        return label_scores(model, prompt, queries, candidates, how, at_once, self._kept, seen)
