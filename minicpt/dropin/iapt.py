"""IAPT: at every layer a small generator reads the instruction and writes S soft tokens about it.

    Z = H W_down     A = softmax over the instruction's tokens (Z W_pool)     P = g(A^T Z) W_up

H: the instruction's hidden states right before the layer; g: a rational function of the layer's own. A labelled
reconstruction, for the full text of IAPT (Zhu et al., ACL 2024, arXiv 2405.18203) was not available. *After the
abstract*: a generator at each layer, of a bottleneck of two linear projections, self-attention pooling and a learned
rational activation; four soft tokens for each input instruction. *After the authors' sibling paper MiLoRA* (EMNLP 2024
Findings): the pooling's formula, degrees 6 and 5 and GELU as the start of g, its bi-level training, generating once per
instruction. *After a second-hand summary*: projecting down before pooling. *Ours*: one pooling query a soft token; S
slots before the text, whose content every layer replaces; no biases; how weights start; sizes (m = 320: MiLoRA's); and
what the instruction is: everything before the answer, templates and query, up to the label. The answer is never read.
"""

import contextlib
from collections.abc import Iterator

import safetensors.torch
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..core.embeddings import check_ids
from ..core.loss import IGNORE, send
from ..core.masks import is_label
from ..engine.modules import during_this_call
from ..engine.passes import attended
from ..errors import MiniCPTError
from .configs import IAPTConfig
from .padding import positions
from .saving import WEIGHTS, replacing

# least squares fit to GELU on [-8, 8], at most 0.0051 off; a fit on [-3, 3] runs away where hidden states go
GELU_NUMERATOR = (
    -0.00507548991,
    0.500791775,
    0.487654935,
    0.183206112,
    0.0333774125,
    0.00295935441,
    0.000102474124,
)
GELU_DENOMINATOR = (-0.128756216, -0.260206082, -0.0317033474, -0.00186429447, -0.000187948731)


def rational(
    x: Float[Tensor, "*S"], a: Float[Tensor, "n"], b: Float[Tensor, "d"]
) -> Float[Tensor, "*S"]:
    """Compute `sum_j a_j x^j / (1 + |sum_i b_i x^i|)`, i from 1, in float32 (x^6!). Sources: Molina 2019, MiLoRA."""
    x, top, bottom = x.float(), 0.0, 0.0
    for coefficient in a.flip(0):  # Horner's rule
        top = top * x + coefficient
    for coefficient in b.flip(0):
        bottom = (bottom + coefficient) * x
    return top / (1 + bottom.abs())


def pool(
    z: Float[Tensor, "B T m"], queries: Float[Tensor, "m S"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B S m"]:
    """Pool T tokens to S by learned queries, over the masked tokens only. Source: MiLoRA appendix C."""
    attention = (z @ queries).masked_fill(~mask[:, :, None], -torch.inf).softmax(dim=1)  # (B, T, S)
    return attention.transpose(1, 2) @ z


class PromptGenerator(nn.Module):
    """A layer's generator: hidden states (B, T, D), the instruction's mask (B, T) -> soft tokens (B, S, D), float32."""

    def __init__(self, down: nn.Linear, up: nn.Linear, S: int):
        super().__init__()
        self.down, self.up = down, up
        self.queries = nn.Parameter(torch.randn(down.out_features, S) * down.out_features**-0.5)
        self.numerator, self.denominator = (
            nn.Parameter(torch.tensor(c)) for c in (GELU_NUMERATOR, GELU_DENOMINATOR)
        )

    def forward(
        self, hidden: Float[Tensor, "B T D"], mask: Bool[Tensor, "B T"]
    ) -> Float[Tensor, "B S D"]:
        return self.up(
            rational(
                pool(self.down(hidden.float()), self.queries, mask),
                self.numerator,
                self.denominator,
            )
        )


def build_generators(config: IAPTConfig) -> nn.ModuleList:
    """Build a generator a layer, 2Dm + mS + 12 parameters each; shared projections, 2Dm, count once."""
    D, m, L = config.token_dim, config.bottleneck, config.num_layers
    n = 1 if config.share_projections else L
    pairs = [(nn.Linear(D, m, bias=False), nn.Linear(m, D, bias=False)) for _ in range(n)]
    for linear in sum(
        pairs, ()
    ):  # each keeps its input's scale: soft tokens start about as large as hidden states
        nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    return nn.ModuleList(
        PromptGenerator(*pairs[i % n], config.num_virtual_tokens) for i in range(L)
    )


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Find the list of decoder layers of a Hugging Face model; raises `MiniCPTError` if there is none."""
    for module in () if model.config.is_encoder_decoder else model.modules():
        if (
            isinstance(module, nn.ModuleList)
            and len(module) == model.config.get_text_config().num_hidden_layers
        ):
            return module
    raise MiniCPTError(
        f"{type(model).__name__} has no one list of decoder layers, as IAPT needs it. Use a causal "
        "language model of the GPT-2, GPT-J, GPT-NeoX, BLOOM, Llama or Qwen family."
    )


class IAPTModel(nn.Module):
    """A frozen causal language model with a generator at every layer; `get_peft_model` makes it.

    Attributes not defined here are the base model's. That stays as it was: generators hang on it during calls only.
    """

    def __init__(self, model: nn.Module, config: IAPTConfig, adapter_name: str = "default"):
        super().__init__()
        layers = decoder_layers(model)
        for name, value in (
            ("token_dim", model.config.get_text_config().hidden_size),
            ("num_layers", len(layers)),
        ):
            if getattr(config, name) not in (None, value):
                raise MiniCPTError(
                    f"{name} is {getattr(config, name)}, the model's is {value}. Load generators on the "
                    f"base model they are for; in a new configuration leave {name} out."
                )
            setattr(config, name, value)
        self.base_model = model.requires_grad_(False)
        self.num_virtual_tokens, self.leading = config.num_virtual_tokens, config.leading
        self.peft_config, self.active_adapter = {adapter_name: config}, adapter_name
        self.generators = (
            build_generators(config).to(model.device).requires_grad_(not config.inference_mode)
        )

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("base_model"), name)

    @contextlib.contextmanager
    def _generating(self, instruction: Bool[Tensor, "B T"]) -> Iterator[None]:
        """Let the next pass through each layer fill its S slots; later tokens find them in the KV cache."""
        if torch.is_grad_enabled() and any(
            getattr(m, "gradient_checkpointing", False) for m in self.modules()
        ):
            raise MiniCPTError(
                "IAPT does not work with gradient checkpointing; call gradient_checkpointing_disable()."
            )
        if not instruction[:, self.leading :].any(dim=1).all():
            raise MiniCPTError(
                "A row has no token before its answer: there is no instruction to read. Set the labels "
                "before the answer to -100, or give input_type_mask (4 at its tokens)."
            )

        waiting = dict(zip(decoder_layers(self.base_model), self.generators))

        def fill(layer, args):
            generator = waiting.pop(layer, None)
            if generator is None:  # once: no decoding step generates again
                return None
            first, last = self.leading, self.leading + self.num_virtual_tokens
            before, text = args[0][:, :first], args[0][:, last:]  # (B, S+T, D) without the slots
            # generate() repeats rows for beams
            mask = instruction.repeat_interleave(len(text) // len(instruction), dim=0)[:, first:]
            soft = generator(text, send(mask, text.device)).to(text.dtype)  # (B, S, D)
            return torch.cat((before, soft, text), dim=1), *args[1:]

        with during_this_call(dict.fromkeys(waiting, fill)):
            yield

    def _with_slots(self, text: Tensor) -> Tensor:
        """(B, T) or (B, T, D) -> S more after the leading tokens, which layer 0 replaces: any token will do."""
        slots = text[:, :1].repeat_interleave(self.num_virtual_tokens, dim=1)
        return torch.cat((text[:, : self.leading], slots, text[:, self.leading :]), dim=1)

    def _mask(self, text: Int[Tensor, "B T"]) -> Int[Tensor, "B _"]:
        """The attention mask with the slots; leading tokens must be real ones, so that the slots stand at one place."""
        if not text[:, : self.leading].all():
            raise MiniCPTError(
                f"IAPT's soft tokens stand after the first {self.leading} tokens (leading), but a row begins with "
                "padding. Pad on the right, or generate for one text at a time."
            )
        return F.pad(text, (self.num_virtual_tokens, 0), value=1)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"] | None = None,
        attention_mask=None,
        labels=None,
        input_type_mask=None,
        inputs_embeds=None,
        past_key_values=None,
        logits_to_keep=0,
        num_items_in_batch=None,
        **kwargs,
    ):
        """Run the text behind its soft tokens: logits (B, T, V) of the text alone and, given labels (B, T), the loss.

        With leading tokens, the last of them has the logits of the last soft token: what comes after both.

        The answer starts at the first type 4 of `input_type_mask`, else at the first label that is not -100, else there
        is none. With a filled cache nothing is generated; `attention_mask` covers the cached text and the new tokens.
        Raises `MiniCPTError` where the loss would be NaN for want of a label, as the prompts of `forward.py` do.
        """
        if (embeds := inputs_embeds) is None:
            check_ids("input_ids", input_ids, embed := self.base_model.get_input_embeddings())
            embeds = embed(send(input_ids, embed.weight.device))
        S, (B, T) = self.num_virtual_tokens, embeds.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        text = (
            torch.ones(B, T + max(past - S, 0)).long()
            if attention_mask is None
            else attention_mask.cpu()
        )
        if labels is not None:
            labels = labels.cpu()
            # nothing predicts a row's first token, whether padding stands before it or not
            targets = labels[:, 1:].masked_fill(text[:, -T:-1] == 0, IGNORE)
            if num_items_in_batch is None and (targets == IGNORE).all():
                raise MiniCPTError(
                    "All labels after the first token are -100: the loss would be NaN. Label at least one "
                    "token of the batch."
                )
        if not past:
            answer = torch.zeros_like(text)
            if labels is not None:
                answer = labels != IGNORE
            if input_type_mask is not None:
                answer = is_label(input_type_mask.cpu())
            instruction = text.bool() & (answer.cumsum(dim=1) == 0)
            embeds = self._with_slots(embeds)
            logits_to_keep = (
                logits_to_keep + S if isinstance(logits_to_keep, Tensor) else logits_to_keep or T
            )
        mask = self._mask(text)
        places = positions(self.base_model, mask)
        if places is not None:
            kwargs["position_ids"] = send(places[:, past:], embeds.device)
        with contextlib.nullcontext() if past else self._generating(instruction):
            output = self.base_model(
                inputs_embeds=embeds,
                attention_mask=attended(mask, embeds.device),
                past_key_values=past_key_values,
                logits_to_keep=logits_to_keep,
                **kwargs,
            )
        if labels is not None:
            logits = output.logits[:, :-1].flatten(0, 1).float()
            targets = send(targets.flatten(), logits.device)
            total = F.cross_entropy(logits, targets, reduction="sum")
            output.loss = total / (num_items_in_batch or (targets != IGNORE).sum())
        return output

    def generate(self, input_ids: Int[Tensor, "B T"], attention_mask=None, **kwargs):
        """Generate after texts (padded on the left), all of them instruction; returns ids without the slots'."""
        S, text = (
            self.num_virtual_tokens,
            torch.ones_like(input_ids) if attention_mask is None else attention_mask,
        )
        check_ids("input_ids", input_ids, self.base_model.get_input_embeddings())
        ids, mask = self._with_slots(input_ids), self._mask(text)
        with self._generating(text.bool()):
            output = self.base_model.generate(ids, attention_mask=mask, **kwargs)
        whole = output if isinstance(output, Tensor) else output.sequences
        sequences = torch.cat((whole[:, : self.leading], whole[:, self.leading + S :]), dim=1)
        if isinstance(output, Tensor):
            return sequences
        output.sequences = sequences
        return output

    def role_arguments(self, types: Int[Tensor, "B T"]) -> dict[str, Tensor]:
        """What `forward` is told when labels are scored: where the answer begins (`scores.ReadsRoles`)."""
        return {"input_type_mask": types}

    def activations(self) -> list[Tensor]:
        """The trained coefficients of the rational functions g, which MiLoRA's bi-level training sets apart."""
        return [p for g in self.generators for p in (g.numerator, g.denominator)]

    def weights(self) -> list[Tensor]:
        """All other trained tensors: projections, a shared one once, and pooling queries."""
        apart = {id(p) for p in self.activations()}
        return [p for p in self.generators.parameters() if id(p) not in apart]

    def trained(self) -> dict[str, Tensor]:
        """The trained tensors by name; a shared one once."""
        return dict(self.generators.named_parameters())

    def save_pretrained(self, folder) -> None:
        """Write `adapter_config.json` and the generators' weights as safetensors; an old save is replaced whole."""
        with replacing(folder) as new:
            self.peft_config[self.active_adapter].save_pretrained(str(new))
            weights = {
                name: tensor.detach().cpu().contiguous() for name, tensor in self.trained().items()
            }
            safetensors.torch.save_file(weights, new / WEIGHTS[0])

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> "IAPTModel":
        """Take over saved generators, bit by bit; other names or shapes raise `MiniCPTError`."""
        if {n: t.shape for n, t in self.trained().items()} != {
            n: t.shape for n, t in weights.items()
        }:
            raise MiniCPTError(
                "The file holds other weights than this configuration has; save both together again."
            )
        for name, tensor in self.trained().items():
            tensor.copy_(weights[name])
        return self
