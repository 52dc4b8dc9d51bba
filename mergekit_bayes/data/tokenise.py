"""Texts as tokens: plain texts, prompts with completions, and texts to classify."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergekit_bayes.data.rows import Encoded, Tokens
from mergekit_bayes.errors import DataError

_AT_ONCE = 1_000_000  # characters; a fast tokenizer needs some 200 bytes of memory for each
_LINE_START = re.compile(r"\n(?=\S)")


def tokenised(
    tokenizer: Any, texts: Sequence[str], pairs: Sequence[str] | None = None, **options: Any
) -> dict[str, list[Any]]:
    """What a tokenizer makes of texts, a few at a time.

    Args:
        tokenizer: of transformers.
        texts: any number of them.
        pairs: the second text of each; None where there are none.
        options: of the tokenizer.

    Returns:
        The tokenizer's fields, one entry per text.
    """
    fields: dict[str, list[Any]] = {"input_ids": []}
    start = 0
    while start < len(texts):
        stop, size = start, 0
        while stop < len(texts) and (stop == start or size + len(texts[stop]) <= _AT_ONCE):
            size += len(texts[stop])
            stop += 1
        second = None if pairs is None else list(pairs[start:stop])
        found = tokenizer(list(texts[start:stop]), second, return_attention_mask=False, verbose=False, **options)
        for name, values in found.items():
            fields.setdefault(name, []).extend(values)
        start = stop
    return fields


class TextEncoder:
    """Turns texts into rows for a language model.

    A row is what the tokenizer puts before a text (often a beginning-of-sequence token), the text, and the
    end-of-sequence token.

    Args:
        tokenizer: of transformers.
        append_eos: whether rows end with the end-of-sequence token.
        whole: learn prompts too.

    Attributes:
        beginning: tokens that are put in front of every text.
        merged: prompts whose last token is another one when the completion follows.

    Raises:
        DataError: the tokenizer has no end-of-sequence token.
    """

    def __init__(self, tokenizer: Any, *, append_eos: bool, whole: bool) -> None:
        if append_eos and tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no end-of-sequence token; expected one, or `data.append_eos: false`")
        self._tokenizer, self._whole = tokenizer, whole
        self._beginning = _beginning(tokenizer)
        self.beginning = len(self._beginning)
        self._end: list[int] = [tokenizer.eos_token_id] if append_eos else []
        self.merged = 0

    def texts(self, texts: Sequence[str]) -> list[Encoded]:
        """Rows that are learned as a whole."""
        if not texts:
            return []
        pieces = [_pieces(text) for text in texts]
        tokens = iter(self._tokens([piece for text in pieces for piece in text]))
        return [self._row([token for _ in text for token in next(tokens)], 0) for text in pieces]

    def completions(self, pairs: Sequence[tuple[str, str]]) -> list[Encoded]:
        """Rows of (prompt, completion) of which completions are learned.

        Prompt and completion are tokenised as one text, which is how the model has met such text. Where the end of a
        prompt forms a token with the beginning of its completion, that token is learned.
        """
        if not pairs:
            return []
        both = self._tokens([prompt + completion for prompt, completion in pairs])
        prompts = self._tokens([prompt for prompt, _ in pairs])
        return [self._row(tokens, self._shared(tokens, prompt)) for tokens, prompt in zip(both, prompts, strict=True)]

    def _shared(self, tokens: Sequence[int], prompt: Sequence[int]) -> int:
        same = next((i for i, (a, b) in enumerate(zip(tokens, prompt, strict=False)) if a != b), None)
        self.merged += same is not None
        return len(prompt) if same is None else same

    def _row(self, tokens: list[int], learned_from: int) -> Encoded:
        end = self._end if tokens[-1:] != self._end else []
        ids = np.array([*self._beginning, *tokens, *end], dtype=np.int32)
        learned_from = 0 if self._whole else learned_from + len(self._beginning)
        return Encoded(ids, np.arange(len(ids)) >= max(1, learned_from))

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        return tokenised(self._tokenizer, texts, add_special_tokens=False)["input_ids"]


class LabelledEncoder:
    """Turns texts, or pairs of texts, into rows for a classifier, with the special tokens its tokenizer gives them.

    Args:
        tokenizer: of transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._typed = "token_type_ids" in tokenizer.model_input_names

    def encode(
        self, texts: Sequence[str], pairs: Sequence[str] | None, *, max_length: int | None = None
    ) -> list[Encoded]:
        """Tokenises texts.

        Args:
            texts: to classify.
            pairs: the second text of each; None where there are none.
            max_length: cut longer rows to so many tokens, as the tokenizer cuts: special tokens stay, and of a pair
                the longer text is cut first.
        """
        if not texts:
            return []
        options: dict[str, Any] = {} if max_length is None else {"truncation": True, "max_length": max_length}
        encoded = tokenised(self._tokenizer, texts, pairs, return_token_type_ids=self._typed, **options)
        types = encoded["token_type_ids"] if self._typed else [None] * len(texts)
        return [
            Encoded(_ids(tokens), token_types=None if kinds is None else _ids(kinds))
            for tokens, kinds in zip(encoded["input_ids"], types, strict=True)
        ]


def _pieces(text: str) -> list[str]:
    """A text in pieces of which a tokenizer can take one at a time."""
    pieces, start = [], 0
    while len(text) - start > _AT_ONCE:
        # words do not reach over a line end, so that the tokens are those of the whole text
        found = [match.end() for match in _LINE_START.finditer(text, start, start + _AT_ONCE)]
        end = found[-1] if found else start + _AT_ONCE
        pieces.append(text[start:end])
        start = end
    return [*pieces, text[start:]]


def _ids(tokens: Sequence[int]) -> Tokens:
    return np.array(tokens, dtype=np.int32)


def _beginning(tokenizer: Any) -> list[int]:
    """The special tokens that a tokenizer puts before a text; what it puts behind is decided by the recipe."""
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole: list[int] = tokenizer("a", verbose=False)["input_ids"]
    places = range(len(whole) - len(plain) + 1)
    return next((whole[:place] for place in places if whole[place : place + len(plain)] == plain), [])
