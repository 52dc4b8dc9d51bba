"""Language modelling: five domains of text that any Python installation carries, and the base of examples/stdlib_lm."""

from __future__ import annotations

import sys
import sysconfig
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path

import torch
from torch import Tensor, nn

from evaluation.merging.family import Batch

EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib_lm"
BASE = EXAMPLE / "artefacts" / "base"
LAYERS = r".*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"

_CHARACTERS_HELD_OUT = 110_000
_LARGEST_DOCUMENT = 30_000
_CODE_POINTS = 128
_SHARED = ("docs", "headers")


@dataclass(frozen=True)
class Texts:
    """Documents of one domain; `tuning` and `test` are held out by whole document."""

    train: str
    tuning: str
    test: str


def read_texts() -> dict[str, Texts]:
    """The five domains: `docs` and `headers` as the example splits them, `readmes`, `unicode` and `fonts`.

    `readmes` are the descriptions in the metadata of the installed packages, `unicode` is the character database:
    one line per character, one document per 128 code points; `fonts` are the tables of metrics that matplotlib brings.
    The example's third domain, `code`, is what the base was made from: an expert of it has next to nothing to gain.
    """
    sys.path.insert(0, str(EXAMPLE))
    try:
        import corpus
    finally:
        sys.path.remove(str(EXAMPLE))
    found = {}
    for domain in _SHARED:
        split = corpus.split_domain(domain)
        found[domain] = (split.train, split.held_out)
    for domain, documents in (("readmes", read_readmes()), ("unicode", read_characters()), ("fonts", read_fonts())):
        held_out = _hold_out(domain, documents)
        train = {name: text for name, text in documents.items() if name not in held_out}
        found[domain] = (corpus.without_paragraphs_of(held_out.values(), train), held_out)
    return {domain: _texts(train, held_out, corpus.join) for domain, (train, held_out) in found.items()}


def read_readmes() -> dict[str, str]:
    """Long descriptions of the installed packages, by file name."""
    found = {}
    for path in sorted(Path(sysconfig.get_path("purelib")).glob("*.dist-info/METADATA")):
        _, _, body = path.read_text(encoding="utf-8", errors="replace").partition("\n\n")
        if body.strip():
            found[path.parent.name] = body
    return found


def read_fonts() -> dict[str, str]:
    """Metrics of the glyphs of fonts, by file name."""
    folder = Path(sysconfig.get_path("purelib")) / "matplotlib" / "mpl-data" / "fonts"
    return {path.name: path.read_text(encoding="latin-1") for path in sorted(folder.rglob("*.afm"))}


def read_characters() -> dict[str, str]:
    """Code, category and name of every named character, ideographs and syllables made by rule left out."""
    found: dict[str, str] = {}
    for start in range(0, 0x20000, _CODE_POINTS):
        lines = [_line(code) for code in range(start, start + _CODE_POINTS)]
        text = "".join(line for line in lines if line)
        if len(text) > 500:
            found[f"{start:05X}"] = text
    return found


def _line(code: int) -> str:
    name = unicodedata.name(chr(code), "")
    if not name or name.startswith(("CJK UNIFIED", "CJK COMPAT", "HANGUL SYLLABLE", "TANGUT", "KHITAN", "NUSHU")):
        return ""
    return f"{code:04X};{name};{unicodedata.category(chr(code))}\n"


def _hold_out(domain: str, documents: Mapping[str, str]) -> dict[str, str]:
    held_out: dict[str, str] = {}
    for name in sorted(documents, key=lambda name: blake2b(f"{domain}/{name}".encode()).digest()):
        if len(documents[name]) <= _LARGEST_DOCUMENT:
            held_out[name] = documents[name]
        if sum(map(len, held_out.values())) >= _CHARACTERS_HELD_OUT:
            break
    return held_out


def _texts(train: Mapping[str, str], held_out: Mapping[str, str], join: object) -> Texts:
    """Held-out documents in turn: one for tuning, then two for the test."""
    assert callable(join)
    parts: dict[str, dict[str, str]] = {"tuning": {}, "test": {}}
    for place, (name, text) in enumerate(held_out.items()):
        parts["test" if place % 3 else "tuning"][name] = text
    return Texts(join(train), join(parts["tuning"]), join(parts["test"]))


class Language:
    """Next tokens in windows of text, and the loss over all of them but the first.

    Args:
        texts: documents by domain.
        folder: the base, a causal language model with its tokenizer.
        window: tokens of a row.
        rows: windows of a training batch.
        limits: at most so many windows of tuning and of test data per domain.
    """

    name = "language"
    loss_unit = "token"
    lora_layers = LAYERS

    def __init__(
        self,
        texts: Mapping[str, Texts],
        *,
        folder: Path = BASE,
        window: int = 128,
        rows: int = 8,
        limits: tuple[int, int] = (16, 48),
    ) -> None:
        from transformers import AutoTokenizer

        self.folder, self.rows = folder, rows
        self.tasks = tuple(texts)
        tokenizer = AutoTokenizer.from_pretrained(folder).backend_tokenizer

        def windows(text: str) -> Tensor:
            tokens = torch.tensor(tokenizer.encode(text).ids)
            return tokens[: len(tokens) // window * window].view(-1, window)

        self._train = {task: windows(text.train) for task, text in texts.items()}
        self._held_out = {
            (task, part): windows(getattr(text, part))[:limit]
            for task, text in texts.items()
            for part, limit in zip(("tuning", "test"), limits, strict=True)
        }

    def models(self, seed: int) -> dict[str, nn.Module]:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return dict.fromkeys(self.tasks, model)

    def training(self, task: str, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 * seed + self.tasks.index(task))
        while True:
            order = torch.randperm(len(self._train[task]), generator=generator)
            for rows in order.split(self.rows):
                yield _batch(self._train[task][rows])

    def sample(self, task: str, rows: int) -> Batch:
        windows = self._train[task]
        order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(1))
        return _batch(windows[order[:rows]])

    def training_units(self, task: str) -> int:
        rows, window = self._train[task].shape
        return rows * (window - 1)

    def held_out(self, task: str, part: str) -> Sequence[Batch]:
        return [_batch(rows) for rows in self._held_out[task, part].split(8)]


def _batch(windows: Tensor) -> Batch:
    return {"input_ids": windows, "attention_mask": torch.ones_like(windows), "labels": windows}
