"""Held-out loss of a model on every domain.

    python examples/stdlib_lm/evaluate.py FOLDER [FOLDER ...]

A folder is a full checkpoint or a PEFT adapter of the base in `artefacts/base`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from corpus import DOMAINS
from language_model import WINDOW, encode
from rich.console import Console
from rich.table import Table
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
ARTEFACTS = HERE / "artefacts"
HELD_OUT = HERE / "held_out"


def load_model(folder: Path) -> torch.nn.Module:
    """A checkpoint or adapter as a float32 model for evaluation; an adapter is attached to the base of the example."""
    is_adapter = (folder / "adapter_config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(ARTEFACTS / "base" if is_adapter else folder, dtype=torch.float32)
    if is_adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, folder)
    return model.eval()


def held_out_tokens(*, characters: int | None = None) -> dict[str, torch.Tensor]:
    """Held-out token ids of every domain, each cut to its first `characters` characters."""
    tokenizer = AutoTokenizer.from_pretrained(ARTEFACTS / "base")
    texts = {domain: (HELD_OUT / f"{domain}.txt").read_text(encoding="utf-8") for domain in DOMAINS}
    return {domain: encode(tokenizer, text[:characters]) for domain, text in texts.items()}


@torch.no_grad()
def loss_per_token(model: torch.nn.Module, tokens: torch.Tensor, *, batch: int = 8) -> float:
    """Mean next-token loss in nats over consecutive windows; the first token of a window is context only."""
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    total = 0.0
    for rows in windows.split(batch):
        logits = model(input_ids=rows).logits[:, :-1]
        total += cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
    return total / (len(windows) * (WINDOW - 1))


def evaluate(model: torch.nn.Module, tokens: dict[str, torch.Tensor]) -> dict[str, float]:
    """Loss in nats per token by domain."""
    return {domain: loss_per_token(model, tokens[domain]) for domain in tokens}


def loss_table(losses: dict[str, dict[str, float]]) -> Table:
    """Rows of models, columns of domains; each cell is nats per token and perplexity."""
    table = Table(title="held-out loss: nats per token (perplexity)")
    table.add_column("model", no_wrap=True)
    for heading in (*DOMAINS, "average"):
        table.add_column(heading, justify="right")
    best = {domain: min(row[domain] for row in losses.values()) for domain in DOMAINS}
    for name, row in losses.items():
        cells = []
        for domain in DOMAINS:
            cell = f"{row[domain]:.3f} ({math.exp(row[domain]):.1f})"
            cells.append(f"[bold]{cell}[/bold]" if row[domain] == best[domain] else cell)
        table.add_row(name, *cells, f"{sum(row.values()) / len(row):.3f}")
    return table


def main() -> None:
    """Print the table for the folders on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path)
    folders = parser.parse_args().folders
    tokens = held_out_tokens()
    Console().print(loss_table({str(folder): evaluate(load_model(folder), tokens) for folder in folders}))


if __name__ == "__main__":
    main()
