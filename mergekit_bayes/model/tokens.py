"""The tokenizer of a model folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mergekit_bayes.checkpoint.files import shown
from mergekit_bayes.errors import ModelError
from mergekit_bayes.model.library import FAILURES, failure

_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_NOT_KEPT = ("is_local", "local_files_only")  # how it was loaded here, which transformers would write into the output


def load_tokenizer(folder: Path, *, reference: str) -> Any:
    """Loads a tokenizer; one without a padding token gets its end-of-text token for that.

    Args:
        folder: of the base.
        reference: how messages call it.

    Raises:
        ModelError: there is none, it cannot be loaded, or it has neither token.
    """
    import transformers

    if not any((folder / name).exists() for name in _FILES):
        raise ModelError(
            f"model {shown(reference)}: has no tokenizer; expected {_FILES[0]} or another of {', '.join(_FILES[1:])} "
            "beside the weights"
        )
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except FAILURES as error:
        raise failure(f"model {shown(reference)}: transformers cannot load its tokenizer", error) from error
    for key in _NOT_KEPT:
        tokenizer.init_kwargs.pop(key, None)
    if tokenizer.pad_token_id is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token_id is None:
        raise ModelError(
            f"model {shown(reference)}: its tokenizer has neither a padding nor an end-of-text token; expected "
            "pad_token or eos_token in tokenizer_config.json"
        )
    return tokenizer
