"""Is the front of merges near the front of real multi-task training, and nearer the richer the posteriors?

    python -m evaluation.merging.train MODELS --family language --modes lora
    python -m evaluation.fronts.train MODELS
    python -m evaluation.fronts.study MODELS

Merges and scores every group; what was scored is kept in MODELS/fronts and not done again. Writes results.json,
fronts.png, triple.png and tables.md into the folder of this file, or --out.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from evaluation.fronts.design import GROUPS, MODE, SEEDS, WINDOWS, Group, Rule, Weights, label, rules
from evaluation.fronts.maps import has_triples, maps
from evaluation.fronts.report import figure, tables
from evaluation.fronts.summary import REAL, Scores, summary
from evaluation.fronts.train import run_folder
from evaluation.merging import study as merging
from evaluation.merging.experts import Experts, Place, load_experts
from evaluation.merging.family import Family, put
from evaluation.merging.language import Language, read_texts
from evaluation.merging.methods import merge
from evaluation.merging.scoring import score_task
from evaluation.merging.study import anchors, components, keep, machine
from evaluation.merging.train import SCHEDULES

HERE = Path(__file__).parent


def study(family: Family, root: Path, groups: Sequence[Group], seeds: Sequence[int], found: Mapping[str, Rule]) -> Any:
    """Fronts of every group, as plain data."""
    scored: dict[str, list[dict[str, dict[str, Scores]]]] = {group.name: [] for group in groups}
    for seed in seeds:
        place = Place(root, family.name, MODE, seed)
        for group in groups:
            scored[group.name].append(_seed(family, place, group, found))
    schedule = SCHEDULES.get((family.name, MODE))
    return {
        "seeds": list(seeds),
        "schedule": None if schedule is None else vars(schedule),
        "windows": {task: _windows(family, task) for group in groups for task in group.tasks},
        "knobs": {name: rule.knob for name, rule in found.items()},
        "groups": {
            group.name: summary(group.tasks, {label(each): each for each in group.weights}, scored[group.name])
            for group in groups
        },
        "machine": machine(),
        "date": date.today().isoformat(),
    }


def _seed(family: Family, place: Place, group: Group, found: Mapping[str, Rule]) -> dict[str, dict[str, Scores]]:
    """Mean scores by row, weights and task; `base` and `experts` are what the rest is normalised by."""
    experts = load_experts(family, place)
    known = anchors(family, place, "test")
    rows: dict[str, dict[str, Scores]] = {
        "anchors": {"base": {task: _first(family, task, known["base"]) for task in group.tasks}},
        "experts": {},
    }
    for task in group.tasks:
        others = [other for other in group.tasks if other != task]
        away = means(family, place, f"{group.name}-expert-{task}", experts.final[task], others)
        rows["experts"][task] = {**away, task: _first(family, task, known["experts"])}
    for name, rule in found.items():
        rows[name] = {label(each): _merged(family, place, group, (name, rule), each, experts) for each in group.weights}
    rows[REAL] = {}
    for weights in group.weights:
        tensors = load_file(run_folder(place.root, group, weights, place.seed) / "final.safetensors")
        rows[REAL][label(weights)] = means(family, place, f"{group.name}-real-{label(weights)}", tensors, group.tasks)
    return rows


def _merged(
    family: Family, place: Place, group: Group, named: tuple[str, Rule], weights: Weights, experts: Experts
) -> Scores:
    name, rule = named
    key = f"{group.name}-{name.replace(', ', '-').replace(' ', '_')}-{label(weights)}"
    if not _path(place, key).exists():
        chosen = components(family, place, rule.method, experts, tasks=group.tasks)
        started = time.perf_counter()
        merged = merge(rule.method, rule.knob, experts.base, chosen, weights=weights)
        print(place.seed, key, f"merged in {time.perf_counter() - started:.1f} s", flush=True)
        return means(family, place, key, merged, group.tasks)
    return means(family, place, key, {}, group.tasks)


def means(family: Family, place: Place, key: str, tensors: dict[str, Tensor], tasks: Sequence[str]) -> Scores:
    """Mean test score of every task under one model; from its file if it was scored before."""
    path = _path(place, key)
    if not path.exists():
        models = family.models(place.seed)
        for model in dict.fromkeys(models.values()):
            put(model, tensors)
        scores = {task: score_task(models[task], family.held_out(task, "test")) for task in tasks}
        keep(path, scores)
    kept = json.loads(path.read_text())
    return {task: sum(values) / len(values) for task, values in kept.items()}


def _windows(family: Family, task: str) -> int:
    return sum(len(batch["labels"]) for batch in family.held_out(task, "test"))


def _first(family: Family, task: str, scores: Mapping[str, Sequence[float]]) -> float:
    """Mean score of the examples that are scored here; the merging study may have scored more."""
    values = scores[task][: _windows(family, task)]
    return sum(values) / len(values)


def _path(place: Place, key: str) -> Path:
    return place.root / "fronts" / "scores" / str(place.seed) / f"{key}.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Merge, score; write results, figure and tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, help="what evaluation.merging.train and evaluation.fronts.train wrote")
    parser.add_argument("--groups", nargs="+", type=int, default=list(range(len(GROUPS))), help="of design.GROUPS")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(argv)
    chosen = json.loads((Path(merging.__file__).parent / "results.json").read_text())["language"][MODE]["knobs"]
    family = Language(read_texts(), limits=(WINDOWS, WINDOWS))
    groups = [GROUPS[index] for index in options.groups]
    write(options.out, study(family, options.models, groups, options.seeds, rules(chosen)))


def write(out: Path, results: Any) -> None:
    """The results, what the page shows of them, and the figures."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (out / "tables.md").write_text(tables(results) + "\n")
    figure(results, out / "fronts.png")
    if has_triples(results):
        maps(results, out / "triple.png")
    print(tables(results))


if __name__ == "__main__":
    main()
