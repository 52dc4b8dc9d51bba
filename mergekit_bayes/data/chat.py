"""Conversations as tokens, and which of them the assistant said.

The chat template decides what a conversation looks like; learned is what the model has to produce when it is used: the
content of the assistant's turns up to and including the token that ends a turn. A template that marks this by
`{% generation %}` is taken at its word. For others the turn is what is added when the conversation goes on from a
request for it (`add_generation_prompt`): text(messages up to the turn) minus text(messages before it + the request).
That holds only if the template writes the beginning of a conversation as it writes the beginning of a longer one, which
is checked; some rewrite what went before, and are refused with the reason.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from mergekit_bayes.checkpoint.files import brief
from mergekit_bayes.data.files import Place
from mergekit_bayes.data.messages import Message
from mergekit_bayes.data.rows import Encoded, Marks
from mergekit_bayes.data.tokenise import tokenised
from mergekit_bayes.errors import DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

Span = tuple[int, int]


class ChatEncoder:
    """Turns conversations into tokens and targets.

    Args:
        tokenizer: a fast tokenizer of transformers.
        template: the Jinja source that is used instead of the tokenizer's own.
        whole: learn every token, not only the assistant's turns.

    Attributes:
        template: the Jinja source in use.
        unended: conversations with a turn whose end the template does not mark as the assistant's.

    Raises:
        DataError: there is no template, or the tokenizer cannot say where in the text its tokens lie.
    """

    def __init__(self, tokenizer: Any, *, template: str | None, whole: bool) -> None:
        self._tokenizer, self._whole = tokenizer, whole
        if not tokenizer.is_fast:
            kind = type(tokenizer).__name__
            raise DataError(f"the tokenizer ({kind}) does not say where its tokens lie; conversations need a fast one")
        self.template = _own_template(tokenizer) if template is None else template
        self.unended = 0
        self._requests_checked = False
        self._marked = _GENERATION.search(self.template) is not None
        added = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}
        self._ends = tuple(sorted(token for token in added if token.strip()))
        self._special = np.array(sorted(tokenizer.convert_tokens_to_ids(list(self._ends))), dtype=np.int64)

    def encode(self, chats: Sequence[tuple[Place, Sequence[Message], int]]) -> list[Encoded]:
        """Tokenises conversations.

        Args:
            chats: for each its place, its messages, and the index of the first one that may be learned.

        Raises:
            DataError: the template fails on one, or does not show where the turns of one begin and end.
        """
        texts, spans = [], []
        for place, messages, first in chats:
            text, found = self._spans(messages, first, place)
            texts.append(text)
            spans.append([(0, len(text))] if self._whole else found)
        encoded = tokenised(self._tokenizer, texts, add_special_tokens=False, return_offsets_mapping=True)
        both = zip(encoded["input_ids"], encoded["offset_mapping"], spans, strict=True)
        return [self._encoded(tokens, offsets, found) for tokens, offsets, found in both]

    def _spans(self, messages: Sequence[Message], first: int, place: Place) -> tuple[str, list[Span]]:
        if self._marked and not first:
            return self._render(messages, place, marked=True)
        text, _ = self._render(messages, place)
        turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
        return text, [] if self._whole else [self._turn(messages, index, text, place) for index in turns]

    def _turn(self, messages: Sequence[Message], index: int, text: str, place: Place) -> Span:
        before, _ = self._render(messages[:index], place, request=True)
        after, _ = self._render(messages[: index + 1], place)
        self._check_request(messages[:index], before, after, place)
        if not after.startswith(before):
            raise DataError(_unstable(before, after, index, place))
        end = self._common_end(after, text)
        if end is None or end < len(before):
            raise DataError(_unstable(after, text, index, place))
        turn = text[len(before) : end]
        ended = turn.rstrip()
        # what a template writes between two turns is no part of the first
        return len(before), len(before) + len(ended if ended.endswith(self._ends) else turn)

    def _common_end(self, after: str, text: str) -> int | None:
        """Where a conversation ends in a longer one; some templates write a last token that goes when it goes on."""
        shorter = after
        while not text.startswith(shorter):
            last = next((token for token in self._ends if shorter.endswith(token)), None)
            shorter = shorter.rstrip() if last is None else shorter.removesuffix(last)
            if not shorter.rstrip().endswith(self._ends):
                return None
        return len(shorter)

    def _check_request(self, messages: Sequence[Message], before: str, after: str, place: Place) -> None:
        """Refuses a template that asks for the assistant's turn whether or not it is told to: it would learn to ask."""
        if self._requests_checked or not messages:
            return
        self._requests_checked = True
        if before != self._render(messages, place)[0]:
            return
        shared = itertools.takewhile(
            lambda pair: pair[0] == pair[1], zip(reversed(before), reversed(after), strict=False)
        )
        if any(not letter.isspace() for letter, _ in shared):
            raise DataError(
                f"{place}: the chat template ends every conversation with a request for another turn "
                f"({brief(after[-30:])}), also without `add_generation_prompt`; expected one that does not "
                "(`data.chat_template`), or `data.completion_only_loss: false`"
            )

    def _render(
        self, messages: Sequence[Message], place: Place, *, request: bool = False, marked: bool = False
    ) -> tuple[str, list[Span]]:
        # what `apply_chat_template` calls; that turns the marks into tokens in a way which loses all of them where
        # a turn begins with a space
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            (text,), spans = render_jinja_template(
                conversations=[[dict(message) for message in messages]],
                chat_template=self.template,
                return_assistant_tokens_mask=marked,
                add_generation_prompt=request,
                **self._tokenizer.special_tokens_map,
            )
        except Exception as error:  # a template is a program, and fails as programs do
            raise DataError(f"{place}: the chat template {_failure(error)}") from error
        return text, [(start, end) for start, end in spans[0]] if marked else []

    def _encoded(self, tokens: list[int], offsets: list[Span], spans: Sequence[Span]) -> Encoded:
        targets = _within(np.array(offsets, dtype=np.int64).reshape(-1, 2), spans)
        ids = np.array(tokens, dtype=np.int32)
        last = np.flatnonzero(targets[:-1] & ~targets[1:])  # the tokens with which marked turns end
        followed = np.isin(ids[last + 1], self._special) & ~np.isin(ids[last], self._special)
        self.unended += bool(self._marked and followed.any())
        targets[:1] = False
        return Encoded(ids, targets)


def _within(offsets: np.ndarray[Any, np.dtype[np.int64]], spans: Sequence[Span]) -> Marks:
    """Which tokens lie in the spans, also in part. A token of no width counts where it stands."""
    starts, ends = offsets[:, 0], offsets[:, 1]
    inside: Marks = np.zeros(len(offsets), dtype=np.bool_)
    for start, end in spans:
        inside |= (starts < end) & ((ends > start) | ((starts == ends) & (starts >= start)))
    return inside


def _own_template(tokenizer: Any) -> str:
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        advice = (
            "expected one, for example `data.chat_template: chat.jinja` from the instruction-tuned model of the family"
        )
        raise DataError(f"the tokenizer has no chat template, which conversations need; {advice}") from error
    assert isinstance(template, str)
    return template


def _failure(error: Exception) -> str:
    line = getattr(error, "lineno", None)
    where = f" at its line {line}" if line is not None else ""
    if type(error).__module__.startswith("jinja2"):
        return f"refuses this{where}: {brief(str(error))}"
    return f"fails on this{where}: {type(error).__name__}: {brief(str(error))}"


def _unstable(shorter: str, longer: str, index: int, place: Place) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(shorter, longer, strict=False)) if a != b), min(len(shorter), len(longer))
    )
    seen = f"{brief(longer[at : at + 30])} where the shorter one has {brief(shorter[at : at + 30])}"
    return (
        f"{place}: the chat template writes the beginning of a conversation differently when it goes on ({seen}): "
        f"it does not show where messages[{index}] begins and ends; expected a template with {{% generation %}} around "
        "what the assistant says (`data.chat_template`), or `data.completion_only_loss: false`"
    )
