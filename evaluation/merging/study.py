"""Does a richer posterior merge better? Two families of tasks, full fine-tuning and LoRA, three seeds.

    python -m evaluation.merging.train MODELS
    python -m evaluation.merging.study MODELS

Knobs are chosen on the tuning data of the first seed and kept for all; scores are of the test data. What was estimated
or scored is kept in MODELS and not done again. Writes results.json, FAMILY.png and tables.md into the folder of this
file, or --out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from evaluation.merging.experts import FINAL, JOINT, Experts, Place, encoder_tensors, load_experts, with_heads
from evaluation.merging.family import Family, put
from evaluation.merging.methods import Method, Source, merge, methods_of
from evaluation.merging.precisions import ROWS, curvature
from evaluation.merging.report import figure, tables
from evaluation.merging.scoring import score, score_task
from evaluation.merging.summary import average_normalised, differences, summary
from evaluation.merging.train import MODES, SCHEDULES, family_named

HERE = Path(__file__).parent
PAIRS = (
    ("linear", "hessian_weighted"),
    ("hessian_weighted", "mixture"),
    ("hessian_weighted", "gram"),
    ("hessian_weighted", "gram, fisher elsewhere"),
    ("hessian_weighted", "kronecker"),
    ("gram", "kronecker"),
    ("task arithmetic, 1.0", "gradient_matching"),
    ("gradient_matching", "kronecker, 1.0"),
    ("task arithmetic, tuned", "kronecker"),
    ("iso_c", "kronecker"),
    ("tsv_m", "kronecker"),
    ("kronecker", "joint training"),
)


def study(family: Family, root: Path, mode: str, seeds: Sequence[int]) -> dict[str, Any]:
    """All rows of one family and one way of training, as plain data."""
    methods = methods_of(family.name, mode)
    places = [Place(root, family.name, mode, seed) for seed in seeds]
    chosen = {name: tune(family, places[0], name, method) for name, method in methods.items()}
    runs: dict[str, list[dict[str, list[float]]]] = {}
    for place in places:
        for row, scores in {**anchors(family, place, "test"), "joint training": joint(family, place)}.items():
            runs.setdefault(row, []).append(scores)
        for name, method in methods.items():
            runs.setdefault(name, []).append(scored(family, place, name, method, chosen[name][0], "test"))
    order = ["base", *methods, "joint training", "experts"]
    found = summary({row: runs[row] for row in order})
    return {
        "tasks": list(family.tasks),
        "seeds": list(seeds),
        "units": {task: family.training_units(task) for task in family.tasks},
        "examples": {part: held_out_sizes(family, part) for part in ("tuning", "test")},
        "precision_rows": ROWS.get(family.name),
        "schedule": vars(SCHEDULES.get((family.name, mode))) if (family.name, mode) in SCHEDULES else None,
        "knobs": {
            name: {"knob": methods[name].knob, "chosen": best, "tried": tried} for name, (best, tried) in chosen.items()
        },
        "rows": found,
        "differences": differences(found, PAIRS),
    }


def anchors(family: Family, place: Place, part: str) -> dict[str, dict[str, list[float]]]:
    """Scores of the base, and of every expert on its own task: what 0 and 1 are."""
    path = place.folder("scores") / f"anchors-{part}.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    models = with_heads(family, place)
    base = score(family, models, part)
    experts = {}
    for task in family.tasks:
        put(models[task], encoder_tensors(place, task))
        experts[task] = score_task(models[task], family.held_out(task, part))
    return keep(path, {"base": base, "experts": experts})  # type: ignore[no-any-return]


def joint(family: Family, place: Place) -> dict[str, list[float]]:
    """Test scores of the jointly trained model."""
    path = place.folder("scores") / "joint.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    models = with_heads(family, place, joint=True)
    for model in dict.fromkeys(models.values()):
        put(model, encoder_tensors(place, JOINT))
    return keep(path, score(family, models, "test"))  # type: ignore[no-any-return]


def tune(family: Family, place: Place, name: str, method: Method) -> tuple[float, dict[str, float]]:
    """The knob with the best normalised score averaged over tasks on the tuning data, and what was tried."""
    if len(method.tries) == 1:
        return method.tries[0], {}
    ends = anchors(family, place, "tuning")
    tried = {}
    for knob in method.tries:
        scores = scored(family, place, name, method, knob, "tuning")
        tried[f"{knob:g}"] = round(average_normalised(scores, ends["base"], ends["experts"]), 4)
    return max(method.tries, key=lambda knob: tried[f"{knob:g}"]), tried


def scored(family: Family, place: Place, name: str, method: Method, knob: float, part: str) -> dict[str, list[float]]:
    """Scores of one merge; from its file if it was scored before."""
    path = place.folder("scores") / f"{name.replace(', ', '-').replace(' ', '_')}-{knob:g}-{part}.json"
    if path.exists():
        return json.loads(path.read_text())  # type: ignore[no-any-return]
    experts = load_experts(family, place)
    tasks = components(family, place, method, experts)
    started = time.perf_counter()
    merged = merge(method, knob, experts.base, tasks)
    seconds = time.perf_counter() - started
    models = with_heads(family, place)
    for model in dict.fromkeys(models.values()):
        put(model, merged)
    found: dict[str, list[float]] = keep(path, score(family, models, part))
    average = sum(sum(values) / len(values) for values in found.values()) / len(found)
    print(
        f"{place.family} {place.mode} {place.seed} {name} {knob:g} {part}: {average:.4f}, merged in {seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return found


def components(
    family: Family, place: Place, method: Method, experts: Experts, *, tasks: Sequence[str] | None = None
) -> list[list[Source]]:
    """What of every task of the family, or of these, enters the method: means, with curvatures where it takes them."""
    found = []
    for task in tasks or family.tasks:
        parts = []
        for when in method.components:
            means = (experts.final if when == FINAL else experts.half)[task]
            estimates = [curvature(family, place, task, name, when=when) for name in method.estimators]
            parts.append(Source(means, {name: value for each in estimates for name, value in each.items()} or None))
        found.append(parts)
    return found


def held_out_sizes(family: Family, part: str) -> dict[str, int]:
    return {task: sum(len(batch["labels"]) for batch in family.held_out(task, part)) for task in family.tasks}


def keep(path: Path, found: Any) -> Any:
    """Write scores to their file, and give them back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(found))
    unfinished.rename(path)
    return found


def machine() -> dict[str, Any]:
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": processor[0].split(":")[1].strip() if processor else "unknown",
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
        **{name: version(name) for name in ("torch", "transformers", "peft")},
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Estimate, merge, score; write results, figures and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="what evaluation.merging.train wrote")
    parser.add_argument("--family", nargs="+", default=["language", "packages"])
    parser.add_argument("--modes", nargs="+", default=list(MODES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(argv)
    for name in options.family:
        write(options.out, family_named(name), options.models, modes=options.modes, seeds=options.seeds)


def write(out: Path, family: Family, models: Path, *, modes: Sequence[str], seeds: Sequence[int]) -> None:
    """Put one family's results beside those that are there."""
    path = out / "results.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    found = {mode: study(family, models, mode, seeds) for mode in modes}
    results[family.name] = {
        **results.get(family.name, {}),
        **found,
        "machine": machine(),
        "date": date.today().isoformat(),
    }
    out.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    (out / "tables.md").write_text(tables(results) + "\n")
    figure(family.name, results[family.name], out / f"{family.name}.png")
    print(tables({family.name: results[family.name]}))


if __name__ == "__main__":
    main()
