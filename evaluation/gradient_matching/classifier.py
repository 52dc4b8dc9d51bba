"""The encoder with one linear head on the mean of its token vectors, which is how it was pretrained to be read."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


class Output(NamedTuple):
    """What the classifier returns: mean loss in nats, None without labels; logits, (rows, classes)."""

    loss: Tensor | None
    logits: Tensor


class Classifier(nn.Module):
    """One label per text.

    Args:
        folder: of the pretrained encoder.
        classes: how many labels.
        seed: of the head's first weights.
    """

    def __init__(self, folder: Path, classes: int, *, seed: int) -> None:
        from transformers import AutoModel
        from transformers.utils import logging

        super().__init__()
        logging.set_verbosity_error()  # it would say that the pooler is left out, as it is
        logging.disable_progress_bar()
        self.encoder = AutoModel.from_pretrained(folder, add_pooling_layer=False, dtype=torch.float32)
        torch.manual_seed(seed)
        self.classifier = nn.Linear(self.encoder.config.hidden_size, classes)
        self._quieten()

    def _quieten(self) -> None:
        """No dropout, as in the published study, and frozen embeddings.

        Half of the encoder's weights are rows for words, most of which no expert ever sees.
        """
        for module in self.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        for name, value in self.named_parameters():
            value.requires_grad_(".embeddings." not in name)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None) -> Output:
        """Classify rows of tokens, (rows, tokens)."""
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen = attention_mask.unsqueeze(-1).to(hidden.dtype)
        logits = self.classifier((hidden * seen).sum(1) / seen.sum(1))
        return Output(None if labels is None else cross_entropy(logits, labels), logits)
