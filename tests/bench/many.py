"""Would it pay to train several CPT prompts in one batch? R prompts together, against one after another.

    OMP_NUM_THREADS=1 python tests/bench/many.py      the micro model and SmolLM2; some five minutes
    OMP_NUM_THREADS=2 python tests/bench/many.py

A step is all that training does: the context, the rows behind it, loss, gradient, clipping, AdamW, projection. The
prompts differ as those of a grid do: each has a context, a start and a learning rate of its own. They have one shape,
which is the best case: prompts of different lengths would have to be padded. Before anything is timed, each prompt's
loss and gradient are held against those of the library's own step.
"""

import argparse
import gc
import statistics
import time
from functools import partial

import torch
from torch import Tensor

from minicpt import load_base
from minicpt.core.loss import IGNORE, token_weights
from minicpt.core.masks import LABEL, is_label, shift_types
from minicpt.dropin.model import CPTConfig, TaskType, get_peft_model
from minicpt.engine.passes import run
from minicpt.errors import print_any_text

# examples in the context, which are the rows of a step, too; tokens of each; most prompts, so that 4 GB are enough
SHAPES = {
    "micro": [(2, 13, 8), (6, 13, 8), (6, 23, 8)],
    "smollm2": [(4, 25, 8), (6, 80, 2)],
}
PROMPTS = (1, 2, 4, 8)
ROUNDS = {"micro": 15, "smollm2": 3}
DECAY, RADIUS, CLIP = 0.95, 0.7, 1.0


class Alone:
    """One prompt, trained by the library's own forward as `methods.trainers.train_context` does it."""

    def __init__(self, model, K: int, length: int, seed: int):
        generator = torch.Generator().manual_seed(seed)
        V, roles = model.config.vocab_size, [1, 1, *[2] * (length - 7), 0, 3, 3, 4, 0]
        self.context = torch.randint(5, V, (K * length,), generator=generator)  # (P,)
        config = CPTConfig(
            task_type=TaskType.CAUSAL_LM,
            cpt_token_ids=self.context.tolist(),
            cpt_tokens_type_mask=[t + 4 * k if t else 0 for k in range(K) for t in roles],
            opt_weighted_loss_type="decay",
            opt_loss_decay_factor=DECAY,
            opt_projection_epsilon=RADIUS,
            opt_projection_format_epsilon=RADIUS,
            opt_epsilon_unit="mean_norm",
            opt_loss_reduction="sum",
        )
        self.model = get_peft_model(model, config)
        self.encoder = self.model.prompt_encoder["default"]
        self.delta = self.encoder.delta_embedding.weight
        self.delta.data.normal_(std=0.01, generator=generator)
        # a row ends with its label
        self.ids = torch.randint(5, V, (K, length - 1), generator=generator)  # (B, T)
        self.types = torch.tensor([roles[:-1]] * K)
        self.lr = 0.001 * (1 + seed)
        self.optimizer = torch.optim.AdamW([self.delta], lr=self.lr, weight_decay=0.0)

    def loss(self) -> Tensor:
        """The loss of the prompt's rows."""
        labels = self.ids.masked_fill(self.types != LABEL, IGNORE)
        mask = torch.ones_like(self.ids)
        return self.model(self.ids, mask, labels=labels, input_type_mask=self.types).loss

    def step(self) -> None:
        """A step of training."""
        self.optimizer.zero_grad()
        self.loss().backward()
        torch.nn.utils.clip_grad_norm_([self.delta], CLIP)
        self.optimizer.step()
        self.encoder.project_()


class Together:
    """R prompts of one shape: their contexts run as R rows, and the rows of all go on after their own context."""

    def __init__(self, model, prompts: list[Alone]):
        self.model, self.prompts = model, prompts
        self.optimizer = torch.optim.AdamW(
            [{"params": [one.delta], "lr": one.lr} for one in prompts], weight_decay=0.0
        )
        first = prompts[0]
        (B, _), P = first.ids.shape, len(first.context)
        of_context = first.encoder.types
        types = torch.cat((of_context.expand(B, -1), shift_types(of_context, first.types)), dim=1)
        labels = torch.where(is_label(types), 0, IGNORE)
        weights = token_weights(labels[:, 1:], types[:, 1:], DECAY, "sum")  # (B, P+T-1)
        self.at = weights[0, : P - 1].nonzero()[:, 0]  # (K,) tokens that predict a label
        self.weights = torch.cat((weights[:, self.at].sum(0), weights[:, -1]))  # (K+B,)
        self.ids = torch.cat([one.ids for one in prompts])  # (R*B, T)
        targets = [torch.cat((one.context[self.at + 1], one.ids[:, -1])) for one in prompts]
        self.targets = torch.stack(targets)  # (R, K+B)

    def losses(self) -> Tensor:
        """The loss of each prompt, (R,)."""
        R, P = len(self.prompts), len(self.prompts[0].context)
        contexts = torch.stack([one.encoder(torch.arange(P)) for one in self.prompts])
        before = run(self.model, contexts)  # (R, P, D)
        before.cache.batch_repeat_interleave(len(self.ids) // R)
        rows = self.model.get_input_embeddings()(self.ids)  # (R*B, T, D)

        def at_labels(hidden):
            own = hidden[:, -2].unflatten(0, (R, -1))  # (R*B, T, D) -> (R, B, D)
            return torch.cat((before.hidden[:, self.at], own), dim=1)  # (R, K+B, D)

        logits = run(self.model, rows, cache=before.cache, pick=at_labels).logits
        log_p = logits.log_softmax(-1).gather(2, self.targets[..., None])[..., 0]  # (R, K+B)
        return -(log_p @ self.weights)

    def step(self) -> None:
        """A step of all prompts; none sees another, so the sum of losses has each one's own gradient."""
        self.optimizer.zero_grad()
        self.losses().sum().backward()
        for one in self.prompts:
            torch.nn.utils.clip_grad_norm_([one.delta], CLIP)
        self.optimizer.step()
        for one in self.prompts:
            one.encoder.project_()


def check_equal(prompts: list[Alone], together: Together) -> None:
    """Raise `AssertionError` unless each prompt has the loss and the gradient that it has alone."""
    losses = together.losses()
    gradients = torch.autograd.grad(losses.sum(), [one.delta for one in prompts])
    for one, loss, gradient in zip(prompts, losses, gradients):
        expected = one.loss()
        (expected_gradient,) = torch.autograd.grad(expected, [one.delta])
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
        difference = (gradient - expected_gradient).norm() / expected_gradient.norm()
        assert difference < 1e-4, f"relative difference of the gradients: {difference}"


def one_by_one(prompts: list[Alone]) -> None:
    """A step of each prompt."""
    for one in prompts:
        one.step()


def seconds(steps: list, rounds: int) -> list[float]:
    """Medians of the steps, run in turn: of one thread the processor's time, which no neighbour disturbs."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: list[list[float]] = [[] for _ in steps]
    for _ in range(rounds):
        for step, of_step in zip(steps, times):
            start = clock()
            step()
            of_step.append(clock() - start)
    return [statistics.median(of_step) for of_step in times]


def main() -> None:
    print_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    args = parser.parse_args()
    print(f"{torch.get_num_threads()} threads; milliseconds of a step, for each prompt")
    print(f"{'model':8} {'K':>2} {'P':>4} {'T':>3} {'R':>2} {'alone':>7} {'together':>8}  ratio")
    for name in args.models:
        model = load_base(name, "cpu").model
        for K, length, most in SHAPES[name]:
            for R in [R for R in PROMPTS if R <= most]:
                prompts = [Alone(model, K, length, seed) for seed in range(R)]
                together = Together(model, prompts)
                check_equal(prompts, together)
                steps = [partial(one_by_one, prompts), together.step]
                alone, joint = (1000 / R * s for s in seconds(steps, ROUNDS[name]))
                shape = f"{K:2} {K * length:4} {length - 1:3} {R:2}"
                print(
                    f"{name:8} {shape} {alone:7.1f} {joint:8.1f}  {alone / joint:5.2f}", flush=True
                )
                del prompts, together
                gc.collect()


if __name__ == "__main__":
    main()
