"""A diagonal Fisher sidecar for every adapter, from per-example gradients of its LoRA factors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from corpus import DOMAINS
from evaluate import ARTEFACTS, load_model
from language_model import LORA_ALPHA, LORA_RANK, WINDOW, adapter_schedule
from torch.func import functional_call

from mergekit_bayes.checkpoint.adapter import open_adapter
from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.index import open_checkpoint
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata, write_sidecar
from mergekit_bayes.precision.fisher import FisherSum, diagonal_fisher

# LoRA starts A from a uniform distribution of variance 1 / (3 in_features): a precision of 3 x 128 in every
# layer but down_proj. One value for both factors and all adapters, so that the adapters share one prior.
PRIOR_PRECISION = 384.0

FISHER_WINDOWS = 380


def make_precision(domain: str, stream: torch.Tensor) -> None:
    """Write the sidecar of one adapter from windows of its own training text, evenly spread over it.

    The precision is that of the posterior at data scale, S = N F + S_0, with F the Fisher of an average token and N
    the number of tokens the adapter was trained on; passes over the same text count again, as they did in training.
    """
    windows = stream[: len(stream) // WINDOW * WINDOW].view(-1, WINDOW)
    spread = torch.linspace(0, len(windows) - 1, FISHER_WINDOWS).long()
    model = load_model(ARTEFACTS / domain, trainable=True)
    fisher = factor_fisher(model, windows[spread], seed=DOMAINS.index(domain))
    trained_on = adapter_schedule(domain, seed=0).tokens
    scale = trained_on / fisher.num_tokens
    precisions = {
        name.replace(".default.", "."): (square * scale + PRIOR_PRECISION).float()
        for name, square in fisher.squares.items()
    }
    write_sidecar(ARTEFACTS / domain, precisions, _metadata(domain, num_examples=trained_on))


def _metadata(domain: str, *, num_examples: int) -> SidecarMetadata:
    adapter = open_adapter(ARTEFACTS / domain)
    return SidecarMetadata(
        family="diagonal",
        estimator="fisher",
        loss_unit="token",
        num_examples=num_examples,
        prior_precision=PRIOR_PRECISION,
        prior_mean="zero",
        space="factor",
        adapter_scaling=LORA_ALPHA / LORA_RANK,
        base_model="base",
        base_fingerprint=fingerprint(open_checkpoint(ARTEFACTS / "base").tensors),
        mean_fingerprint=fingerprint(adapter.tensors),
    )


def factor_fisher(model: torch.nn.Module, windows: torch.Tensor, *, seed: int) -> FisherSum:
    """Fisher diagonal of the trainable factors of an adapter, by parameter name, summed over `windows`.

    Args:
        model: A PEFT model; parameters that require no gradient are held fixed.
        windows: Token ids, shape (rows, window).
        seed: Seed of the labels drawn from the model.
    """
    params = {name: value for name, value in model.named_parameters() if value.requires_grad}
    buffers = {name: value for name, value in model.named_parameters() if not value.requires_grad}

    def predict(
        params: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        row: Mapping[str, torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ids = row["ids"].unsqueeze(0)
        logits = functional_call(model, {**params, **buffers}, (), {"input_ids": ids, "use_cache": False}).logits
        return logits[0, :-1], torch.ones(WINDOW - 1)

    batches = ({"ids": rows} for rows in windows.split(32))
    return diagonal_fisher(predict, params, buffers, batches, generator=torch.Generator().manual_seed(seed))
