"""Does the curvature that IVON leaves behind agree with a Fisher pass over the same model and text?

    python -m evaluation.curvature.fisher [--rows 96]

For each adapter of `examples/stdlib_lm` the curvature per token in its sidecar, S / N - weight_decay, is compared entry
by entry with the diagonal Fisher information of windows of its own training text, labels drawn from the model. Writes
results.json beside this file, or to --out, and prints the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.checkpoint.sidecar import open_sidecar
from mergekit_bayes.precision.registry import create
from mergekit_bayes.precision.targets import find_targets

HERE = Path(__file__).parent
EXAMPLE = Path(__file__).parents[2] / "examples" / "stdlib_lm"
WINDOW = 256


def training_windows(domain: str, base: Path, rows: int) -> torch.Tensor:
    """Windows of a domain's training text, evenly spread over it, shape (rows, WINDOW)."""
    sys.path.insert(0, str(EXAMPLE))
    from corpus import join, split_domain
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokens = torch.tensor(tokenizer.backend_tokenizer.encode(join(split_domain(domain).train)).ids)
    windows = tokens[: len(tokens) // WINDOW * WINDOW].view(-1, WINDOW)
    return windows[torch.linspace(0, len(windows) - 1, min(rows, len(windows))).long()]


def factor_fisher(base: Path, adapter: Path, windows: torch.Tensor, *, seed: int) -> dict[str, torch.Tensor]:
    """Fisher diagonal of an average token, of an adapter's factors; names as in the model in memory."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, adapter, is_trainable=True).eval()
    estimator = create("fisher", model, find_targets(model, space="factor"), seed=seed, chunk_size=8)
    counts = estimator.update({"input_ids": windows, "labels": windows, "row": torch.arange(len(windows))})
    return {name: value / counts.units for name, value in estimator.result(counts).items()}


def compare(adapter: Path, fisher: Mapping[str, torch.Tensor]) -> dict[str, dict[str, float]]:
    """Ratio and rank correlation of both curvatures, for the factors A and B apart."""
    sidecar = open_sidecar(adapter)
    units, decay = sidecar.metadata.num_examples, sidecar.metadata.weight_decay
    assert units is not None
    assert decay is not None
    parts: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {"A": [], "B": []}
    with BlockReader() as reader:
        for name, diagonal in fisher.items():
            stored = reader.read_tensor(sidecar.tensors[name.replace(".default.", ".")])
            part = "A" if "lora_A" in name else "B"
            parts[part].append(((stored.double() / units - decay).flatten(), diagonal.flatten()))
    return {part: _agreement(torch.cat([a for a, _ in p]), torch.cat([b for _, b in p])) for part, p in parts.items()}


def _agreement(ours: torch.Tensor, theirs: torch.Tensor) -> dict[str, float]:
    ranks = torch.stack([values.argsort().argsort().double() for values in (ours, theirs)])
    return {
        "median_ratio": float((ours / theirs).median()),
        "ratio_of_means": float(ours.mean() / theirs.double().mean()),
        "spearman": float(torch.corrcoef(ranks)[0, 1]),
    }


def inflation_of(adapter: Path) -> float:
    """What the exported curvature was divided by, from the sidecar's metadata."""
    metadata = open_sidecar(adapter).metadata
    assert metadata.beta2 is not None
    assert metadata.ess is not None
    assert metadata.batch_size is not None
    return 1 + (1 - metadata.beta2) * metadata.ess / (2 * metadata.batch_size)


def table(results: Mapping[str, Any]) -> str:
    lines = ["| adapter | factor | median of h / F | mean h / mean F | rank correlation | h was divided by |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    for domain, found in results["domains"].items():
        for part, values in found["factors"].items():
            numbers = " | ".join(f"{values[key]:.2f}" for key in ("median_ratio", "ratio_of_means", "spearman"))
            lines.append(f"| {domain} | {part} | {numbers} | {found['inflation']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Compare all adapters and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=96, help="windows per adapter")
    parser.add_argument("--domains", nargs="+", default=["code", "docs", "headers"])
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    base = EXAMPLE / "artefacts" / "base"
    found = {}
    for seed, domain in enumerate(arguments.domains):
        adapter = EXAMPLE / "artefacts" / domain
        fisher = factor_fisher(base, adapter, training_windows(domain, base, arguments.rows), seed=seed)
        found[domain] = {"factors": compare(adapter, fisher), "inflation": inflation_of(adapter)}
    command = f"python -m evaluation.curvature.fisher --rows {arguments.rows}"
    results = {"date": date.today().isoformat(), "command": command, "domains": found}
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(table(results))


if __name__ == "__main__":
    main()
