"""Wrong methods for notebook 15 and words that the message must hold; right ones in other forms."""

import torch

from minicpt.methods.trainers import Fitted, train_context


def shifted(job, noise):
    """ICL with something added to each token."""
    return Fitted(job.base.model, job.embedded_context() + noise)


def from_nowhere(job):
    return shifted(
        job, torch.randn(1, generator=torch.Generator().manual_seed(torch.seed() % 2**31))
    )


def still_training(job):
    return shifted(job, torch.zeros(1, requires_grad=True) + 0.1)


def trains_the_model(job):
    weight = job.base.model.get_input_embeddings().weight
    with torch.no_grad():
        weight.mul_(1.01)
    return shifted(job, 0.0)


def leaves_it_unfrozen(job):
    job.base.model.get_input_embeddings().weight.requires_grad_(True)
    return shifted(job, 0.1)


def changes_the_job(job):
    job.context.types[0] += 4
    return shifted(job, 0.1)


def random_move(job):
    return shifted(
        job, 0.3 * torch.randn(job.base.model.config.hidden_size, generator=job.generator)
    )


WRONG = {
    "my_method": [
        (lambda job: job.embedded_context(), "return a Fitted"),
        (lambda job: Fitted(job.base.model, job.embedded_context()[0]), "must be (1, P, D)"),
        (lambda job: shifted(job, 0.0), "scores as ICL does"),
        (train_context, "scores as CPT does"),
        (lambda job: shifted(job, float("nan")), "NaN"),
        (still_training, "detach"),
        (from_nowhere, "randomness from `job.generator`"),
        (trains_the_model, "the base model is not what it was"),
        (leaves_it_unfrozen, "leave it frozen"),
        (changes_the_job, "changed in place"),
    ]
}

RIGHT = {"my_method": [random_move]}
