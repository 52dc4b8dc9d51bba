"""Multiple-choice questions from the held-out text: which of four passages comes next?

    python examples/stdlib_lm/continuations.py

writes `questions/{code,docs,headers}.jsonl` beside this file, rows `{"question": ..., "choices": ..., "answer": ...}`:
some lines of a document, and the lines behind them among three that stand behind other questions of the same domain.
Every wrong choice is thus right elsewhere, so that choices differ by nothing but what they follow.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from corpus import DOMAINS, SEPARATOR

HERE = Path(__file__).resolve().parent
QUESTIONS = HERE / "questions"

_QUESTION, _CHOICE = 240, 80  # characters, at least
_CHOICES = 4
_SEED = 0


def passages(text: str) -> Iterator[tuple[str, str]]:
    """Lines of a text and those behind them, again and again; no line is in two of them.

    Args:
        text: documents, each followed by the separator.
    """
    for document in text.split(SEPARATOR):
        lines = iter(document.strip("\n").split("\n"))
        while True:
            before, after = _some(lines, _QUESTION), _some(lines, _CHOICE)
            if not after:
                break
            yield before, after


def _some(lines: Iterator[str], characters: int) -> str:
    """The next lines, until they have so many characters besides indentation; empty where the text is over before."""
    taken: list[str] = []
    while sum(len(line.strip()) for line in taken) < characters:
        line = next(lines, None)
        if line is None:
            return ""
        taken.append(line)
    return "\n".join(taken)


def questions(text: str, *, seed: int = _SEED) -> list[dict[str, object]]:
    """Questions about a text, in its order; the same ones for the same seed.

    Args:
        text: documents, each followed by the separator.
        seed: of the wrong choices and the places of the right ones.
    """
    draw = random.Random(seed)
    found = list(passages(text))
    endings = sorted({after for _, after in found})
    rows: list[dict[str, object]] = []
    for before, after in found:
        choices = draw.sample([other for other in endings if other != after], _CHOICES - 1)
        answer = draw.randrange(_CHOICES)
        choices.insert(answer, after)
        rows.append({"question": before, "choices": choices, "answer": answer})
    return rows


def write_questions(folder: Path = QUESTIONS) -> None:
    """Write one JSON line per question and one file per domain."""
    folder.mkdir(exist_ok=True)
    for domain in DOMAINS:
        text = (HERE / "held_out" / f"{domain}.txt").read_text(encoding="utf-8")
        lines = [json.dumps(row) + "\n" for row in questions(text)]
        (folder / f"{domain}.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    write_questions()
