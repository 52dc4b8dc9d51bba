"""One class for each format of rows: what a row holds, and how it becomes tokens."""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

from mergekit_bayes.data.chat import ChatEncoder
from mergekit_bayes.data.choices import choices_in, right_choice
from mergekit_bayes.data.columns import Columns
from mergekit_bayes.data.files import Place
from mergekit_bayes.data.labels import FoundLabels
from mergekit_bayes.data.messages import Message, canonical, conversation
from mergekit_bayes.data.questions import cut_question, joined
from mergekit_bayes.data.rows import Encoded
from mergekit_bayes.data.tokenise import LabelledEncoder, TextEncoder
from mergekit_bayes.errors import DataError

Content = TypeVar("Content")


class Chat(NamedTuple):
    """A conversation, learned from message `first` on."""

    place: Place
    messages: Sequence[Message]
    first: int = 0


class Labelled(NamedTuple):
    """A text, or a pair of texts, and the name of its label."""

    text: str
    pair: str | None
    label: str


class Question(NamedTuple):
    """A question, what can follow it, and the index of what should."""

    text: str
    choices: tuple[str, ...]
    answer: int


Completion: TypeAlias = tuple[str, str] | Chat


class Encoders:
    """The encoders of one run, made when a row first needs them.

    Args:
        tokenizer: of transformers.
        append_eos: as in the recipe.
        whole: learn prompts too.
        template: Jinja source of the chat template; None for the tokenizer's.
    """

    def __init__(self, tokenizer: Any, *, append_eos: bool, whole: bool, template: str | None) -> None:
        self._tokenizer, self._append_eos, self._whole, self._template = tokenizer, append_eos, whole, template

    @functools.cached_property
    def text(self) -> TextEncoder:
        """For texts and completions."""
        return TextEncoder(self._tokenizer, append_eos=self._append_eos, whole=self._whole)

    @functools.cached_property
    def chat(self) -> ChatEncoder:
        """For conversations."""
        return ChatEncoder(self._tokenizer, template=self._template, whole=self._whole)

    @functools.cached_property
    def labelled(self) -> LabelledEncoder:
        """For texts to classify."""
        return LabelledEncoder(self._tokenizer)

    @functools.cached_property
    def choice(self) -> TextEncoder:
        """For the choices of questions, which are compared as they stand, without a token that ends them."""
        return TextEncoder(self._tokenizer, append_eos=False, whole=False)

    @property
    def chatted(self) -> bool:
        """Whether any row was a conversation."""
        return "chat" in self.__dict__

    def remarks(self) -> Mapping[str, int]:
        """What happened so far in how many rows, in words."""
        merged = self.text.merged if "text" in self.__dict__ else 0
        unended = self.chat.unended if self.chatted else 0
        choices = self.choice.merged if "choice" in self.__dict__ else 0
        return {
            "rows where the prompt's last token merges with the completion, which is learned with it": merged,
            "conversations where {% generation %} leaves out the token that ends a turn, so it is not learned": unended,
            "choices whose first token holds the end of their question too, which is scored with it": choices,
        }


class FormatReader(ABC, Generic[Content]):
    """Reads the rows of one format.

    Args:
        columns: where the rows hold what.
        encoders: of the run.
    """

    def __init__(self, columns: Columns, encoders: Encoders) -> None:
        self.columns, self.encoders = columns, encoders

    @abstractmethod
    def take(self, place: Place, row: Mapping[str, object]) -> Content | None:
        """The content of a row; None if it is empty.

        Raises:
            DataError: the row holds something else than its format says.
        """

    @abstractmethod
    def key(self, content: Content) -> str:
        """One text for equal contents only."""

    @abstractmethod
    def encode(self, contents: Sequence[Content]) -> list[Encoded]:
        """Rows of tokens, of any length."""


class TextReader(FormatReader[str]):
    """Texts that are learned as a whole."""

    def take(self, place: Place, row: Mapping[str, object]) -> str | None:
        """The text, if it has more than white space."""
        text = self.columns.text(place, row, "text")
        return text if text and text.strip() else None

    def key(self, content: str) -> str:
        """The text itself."""
        return content.strip()

    def encode(self, contents: Sequence[str]) -> list[Encoded]:
        """As `TextEncoder.texts`."""
        return self.encoders.text.texts(contents)


class CompletionReader(FormatReader[Completion]):
    """Prompts with completions, both texts or both lists of messages."""

    def take(self, place: Place, row: Mapping[str, object]) -> Completion | None:
        """Prompt and completion; a row without either is empty, an empty prompt is none."""
        values = [self.columns.value(row, name) for name in ("prompt", "completion")]
        lists = [isinstance(value, Sequence) and not isinstance(value, str) for value in values]
        if any(lists):
            if not all(lists):
                names = [self.columns.names[name] for name in ("prompt", "completion")]
                raise DataError(f"{place}: one of `{names[0]}` and `{names[1]}` is text, the other a list of messages")
            prompt, completion = (
                conversation(value, place, self.columns.names[name])
                for value, name in zip(values, ("prompt", "completion"), strict=True)
            )
            return Chat(place, [*prompt, *completion], len(prompt)) if prompt and completion else None
        texts = self.columns.text(place, row, "prompt"), self.columns.text(place, row, "completion")
        if texts[0] is None or not texts[1] or not texts[1].strip():
            return None
        return texts[0], texts[1]

    def key(self, content: Completion) -> str:
        """Prompt and completion."""
        return canonical(content.messages) if isinstance(content, Chat) else "\0".join(part.strip() for part in content)

    def encode(self, contents: Sequence[Completion]) -> list[Encoded]:
        """As `TextEncoder.completions`, and `ChatEncoder.encode` for messages."""
        texts = iter(self.encoders.text.completions([c for c in contents if not isinstance(c, Chat)]))
        chats = [content for content in contents if isinstance(content, Chat)]
        encoded = iter(self.encoders.chat.encode(chats) if chats else [])
        return [next(encoded if isinstance(content, Chat) else texts) for content in contents]


class ChatReader(FormatReader[Chat]):
    """Conversations of which the assistant's turns are learned."""

    def take(self, place: Place, row: Mapping[str, object]) -> Chat | None:
        """The messages, if there are any."""
        messages = conversation(self.columns.value(row, "messages"), place, self.columns.names["messages"])
        return Chat(place, messages) if messages else None

    def key(self, content: Chat) -> str:
        """The messages in one spelling."""
        return canonical(content.messages)

    def encode(self, contents: Sequence[Chat]) -> list[Encoded]:
        """As `ChatEncoder.encode`."""
        return self.encoders.chat.encode(contents) if contents else []


class LabelledReader(FormatReader[Labelled]):
    """Texts, or pairs of texts, with labels.

    Attributes:
        labels: those found so far.
    """

    def __init__(self, columns: Columns, encoders: Encoders, class_names: Mapping[str, tuple[str, ...]]) -> None:
        super().__init__(columns, encoders)
        column = columns.names["label"]
        self.labels = FoundLabels(column, class_names.get(column, ()))
        self._paired = "text_pair" in columns.names

    def take(self, place: Place, row: Mapping[str, object]) -> Labelled | None:
        """Text and label; a row without text is empty, and a pair without either of its texts."""
        text, pair = self.columns.text(place, row, "text"), self.columns.text(place, row, "text_pair")
        if not text or not text.strip() or (self._paired and not pair):
            return None
        return Labelled(text, pair, self.labels.add(self.columns.value(row, "label"), place))

    def key(self, content: Labelled) -> str:
        """The texts without their label: a text that is known with another label is known all the same."""
        return "\0".join(part.strip() for part in content[:2] if part is not None)

    def encode(self, contents: Sequence[Labelled], *, max_length: int | None = None) -> list[Encoded]:
        """As `LabelledEncoder.encode`."""
        texts = [content.text for content in contents]
        pairs = [content.pair or "" for content in contents] if self._paired else None
        return self.encoders.labelled.encode(texts, pairs, max_length=max_length)


class QuestionReader(FormatReader[Question]):
    """Questions with choices."""

    def take(self, place: Place, row: Mapping[str, object]) -> Question | None:
        """Question, choices and answer; a row is empty without a question, without choices, or with a blank one."""
        text, names = self.columns.text(place, row, "question"), self.columns.names
        choices = choices_in(self.columns.value(row, "choices"), place, names["choices"])
        if not text or not text.strip() or choices is None:
            return None
        answer = right_choice(self.columns.value(row, "answer"), choices, place, names["answer"])
        return Question(text, choices.texts, answer)

    def key(self, content: Question) -> str:
        """Question and choices."""
        return "\0".join(part.strip() for part in (content.text, *content.choices))

    def encode(self, contents: Sequence[Question]) -> list[Encoded]:
        """The question with each of its choices, as `TextEncoder.completions`."""
        pairs = [(entry.text, self.columns.separator + choice) for entry in contents for choice in entry.choices]
        encoded = iter(self.encoders.choice.completions(pairs))
        return [
            joined(
                [next(encoded) for _ in entry.choices],
                answer=entry.answer,
                sizes=[len(choice.encode()) for choice in entry.choices],
            )
            for entry in contents
        ]

    def cut(self, row: Encoded, limit: int) -> Encoded | None:
        """As `cut_question`."""
        return cut_question(row, limit, kept=self.encoders.choice.beginning)


def reader_for(columns: Columns, encoders: Encoders, class_names: Mapping[str, tuple[str, ...]]) -> FormatReader[Any]:
    """The reader of a format.

    Args:
        columns: format and columns.
        encoders: of the run.
        class_names: columns whose integers stand for these names.
    """
    match columns.format:
        case "text":
            return TextReader(columns, encoders)
        case "prompt_completion":
            return CompletionReader(columns, encoders)
        case "messages":
            return ChatReader(columns, encoders)
        case "labelled":
            return LabelledReader(columns, encoders, class_names)
        case "multiple_choice":
            return QuestionReader(columns, encoders)
