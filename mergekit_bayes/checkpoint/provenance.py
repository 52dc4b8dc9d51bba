"""What trained or merged weights say in the header of their file about where they come from and what they are for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Facts that a file of weights has no other place for; None where it does not tell.

    Attributes:
        base_fingerprint: of the base that the weights were trained from.
        architecture: class of the whole model, such as `BertForSequenceClassification`.
        labels: names of a classification head's outputs, in their order.
        pad_token_id: of the padding that a classification head looks past.
    """

    base_fingerprint: str | None = None
    architecture: str | None = None
    labels: tuple[str, ...] | None = None
    pad_token_id: int | None = None

    def facts(self) -> dict[str, object]:
        """What is known, for a header."""
        return {key: value for key, value in asdict(self).items() if value is not None}


def read_provenance(metadata: Mapping[str, str]) -> Provenance:
    """Reads what the header of a file tells; what it tells in another form is as if it did not.

    Args:
        metadata: the strings of the header.
    """
    try:
        content: Any = json.loads(metadata.get(METADATA_KEY, "{}"))
    except (ValueError, RecursionError):
        return Provenance()
    if not isinstance(content, dict):
        return Provenance()
    labels, pad = content.get("labels"), content.get("pad_token_id")
    named = labels if isinstance(labels, list) and all(isinstance(label, str) for label in labels) else []
    return Provenance(
        base_fingerprint=_text(content.get("base_fingerprint")),
        architecture=_text(content.get("architecture")),
        labels=tuple(named) or None,
        pad_token_id=pad if type(pad) is int else None,
    )


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
