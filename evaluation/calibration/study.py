"""Are IVON-LoRA models better calibrated than AdamW-LoRA models, at the mean and averaged over samples?

    python -m evaluation.calibration.study NAME FOLDER... --validation FILE --test FILE

The folders are outputs of `kind: finetune` with AdamW and with IVON, the same seeds of both, trained on the same data.
Temperatures are chosen on the validation file, scores are of the test file, which nothing was chosen by. Writes
results.json (one entry per NAME; others are kept), NAME.png and tables.md into the folder of this file, or --out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import torch

from evaluation.calibration.compare import compare, reliability
from evaluation.calibration.report import figure, tables
from evaluation.calibration.runs import HeldOut, Run, device_name, estimated, held_out, load_model, open_run
from evaluation.calibration.scaling import best_factor, scaled
from mergekit_bayes.predict import (
    BINS,
    ClassPrediction,
    Score,
    TokenPrediction,
    attach_posterior,
    choose_prior,
    choose_temperature,
    class_scores,
    predict_next_tokens,
    predict_probabilities,
    token_scores,
    with_prior,
)

HERE = Path(__file__).parent
Prediction: TypeAlias = ClassPrediction | TokenPrediction
Predictions: TypeAlias = dict[str, Prediction]

WORDS = {"adamw": "AdamW", "ivon": "IVON"}


def predict_run(run: Run, data: HeldOut, options: argparse.Namespace) -> tuple[Predictions, dict[str, float | None]]:
    """Test predictions of a run by variant, and the temperatures or priors they used; a prior of None is the mean."""
    model = load_model(run, data.labels, device=options.device, recipe_dir=options.recipe_dir)
    predict: Callable[..., Any] = predict_probabilities
    if run.task == "causal_lm":
        predict = partial(predict_next_tokens, vocabulary=options.vocabulary)
    at_mean = predict(model, data.test)
    found: Predictions = {"mean": at_mean}
    used: dict[str, float | None] = {}
    if isinstance(at_mean, ClassPrediction):
        factor = best_factor(predict(model, data.validation))
        used["scaled"] = factor
        found["mean, scaled"] = scaled(at_mean, factor)
    chooser = predict_next_tokens if run.task == "causal_lm" else predict_probabilities
    if not run.has_posterior:
        for estimator in options.estimators:
            posterior = attach_posterior(model, estimated(run, estimator, options.recipe_dir))
            chosen_prior = choose_prior(model, data.validation, posterior, predict=chooser, samples=options.samples)
            # an infinite prior is the mean
            width = 0.0 if math.isinf(chosen_prior.prior) else 1.0
            used[f"prior of {estimator}"] = chosen_prior.prior if width else None
            under = with_prior(posterior, chosen_prior.prior) if width else posterior
            found[f"samples, {estimator}"] = predict(
                model, data.test, under, samples=options.samples, temperature=width
            )
        return found, used
    posterior = attach_posterior(model, run.folder)
    chosen = choose_temperature(model, data.validation, posterior, predict=chooser, samples=options.samples)
    temperatures = {"posterior": 1.0, "as trained": run.trained_at, "chosen": chosen.temperature}
    for name, temperature in temperatures.items():
        if temperature is None:
            continue
        used[name] = temperature
        found[f"samples, {name}"] = predict(
            model, data.test, posterior, samples=options.samples, temperature=temperature
        )
    return found, used


def scores_of(prediction: Prediction, bins: int) -> dict[str, Score]:
    return (
        class_scores(prediction, bins=bins)
        if isinstance(prediction, ClassPrediction)
        else token_scores(prediction, bins=bins)
    )


def study(runs: Sequence[Run], options: argparse.Namespace) -> dict[str, Any]:
    """All predictions, scores and comparisons, as plain data."""
    check(runs)
    data = held_out(
        runs[0], options.validation, options.test, batch_size=options.batch_size, recipe_dir=options.recipe_dir
    )
    scores: dict[str, list[dict[str, Score]]] = {}
    curves: dict[str, list[Prediction]] = {}
    rows: list[dict[str, Any]] = []
    for run in sorted(runs, key=lambda run: (run.optimizer, run.seed)):
        print(f"{run.folder.name}: {run.optimizer}, seed {run.seed}", file=sys.stderr)
        predictions, used = predict_run(run, data, options)
        rows.append({"run": run.folder.name, "optimizer": run.optimizer, "seed": run.seed, "temperatures": used})
        for variant, prediction in predictions.items():
            name = f"{WORDS[run.optimizer]}, {variant}"
            scores.setdefault(name, []).append(scores_of(prediction, options.bins))
            curves.setdefault(name, []).append(prediction)
    groups = next(iter(curves.values()))[0]
    return {
        "task": runs[0].task,
        "units": data.units,
        "samples": options.samples,
        "bins": options.bins,
        "optimizers": {run.optimizer: run.report["recipe"]["optimizer"] for run in runs},
        "runs": rows,
        **compare(scores, groups=groups.rows if isinstance(groups, TokenPrediction) else None),
        "reliability": {name: reliability(each, options.bins) for name, each in curves.items()},
    }


def check(runs: Sequence[Run]) -> None:
    """Stops where a comparison would be unequal."""
    seeds = {name: sorted(run.seed for run in runs if run.optimizer == name) for name in WORDS}
    if not seeds["adamw"] or seeds["adamw"] != seeds["ivon"] or len(set(seeds["ivon"])) < len(seeds["ivon"]):
        raise SystemExit(f"expected one run of each optimizer per seed; found seeds {seeds}")
    for what in ("data", "base", "length"):
        keys = ("fingerprint",) if what != "length" else ("steps", "global_batch")
        seen = {tuple(run.report[what][key] for key in keys) for run in runs}
        if len(seen) > 1:
            raise SystemExit(f"the runs differ in {what}: {sorted(seen)}; expected equal data, base and budgets")


def machine() -> dict[str, Any]:
    processor = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "processor": processor[0].split(":")[1].strip() if processor else "unknown",
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "load_at_start": os.getloadavg()[0],
    }


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the experiment in results.json")
    parser.add_argument("folders", nargs="+", type=Path, help="finished fine-tuning runs")
    parser.add_argument("--validation", type=Path, required=True, help="data to choose temperatures on")
    parser.add_argument("--test", type=Path, required=True, help="data to report")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument(
        "--estimators",
        nargs="*",
        default=[],
        help="also sample runs without a posterior, by passes of these estimators over their training data",
    )
    parser.add_argument("--bins", type=int, default=BINS, help="of the calibration error")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument(
        "--vocabulary", action="store_true", help="language models: also accuracy and ece of next tokens"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--recipe-dir", type=Path, help="where relative paths in the runs' recipes start")
    parser.add_argument("--out", type=Path, default=HERE)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write results, figure and tables."""
    options = arguments(argv)
    found = study([open_run(folder) for folder in options.folders], options)
    shown = [options.name, *(folder.name for folder in options.folders)]
    found["command"] = (
        f"python -m evaluation.calibration.study {' '.join(shown)} --validation {options.validation.name} "
        f"--test {options.test.name} --samples {options.samples}"
        + (f" --estimators {' '.join(options.estimators)}" if options.estimators else "")
    )
    found |= {"date": date.today().isoformat(), "machine": machine()}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[options.name] = found
    path.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n")
    figure(options.name, found, options.out / f"{options.name}.png")
    (options.out / "tables.md").write_text(tables(results) + "\n")
    print(tables({options.name: found}))


if __name__ == "__main__":
    main()
