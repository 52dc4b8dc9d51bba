"""One of two processes that share the rows of evaluations. Started by the tests."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from mergekit_bayes.evaluate import open_model
from mergekit_bayes.evaluate.measure import measure_block
from tests.evaluate.runs import recipe, run
from tests.say import say


def language(llama: Path, tuned: Path) -> dict[str, Any]:
    """Means, samples at a chosen temperature, and a pruned model."""
    samples = {"count": 2, "temperature": "validation"}
    models = [{"model": str(llama), "precision": False, "name": "base"}, {"model": str(tuned), "samples": samples}]
    return recipe(models, data=["texts", "other texts"], validation="other texts")


def classes(bert: Path) -> dict[str, Any]:
    """A classifier, pruned too, on fewer blocks than there are processes."""
    return recipe([bert], data="other labelled", batch_size=16, prune=0.5)


def questions(llama: Path) -> dict[str, Any]:
    """A language model that answers questions, of which some have more choices than a batch has rows."""
    return recipe([llama], data="questions", task="multiple_choice")


def harness(llama: Path, tuned: Path, tasks: Path) -> dict[str, Any]:
    """A base and a merge in memory, which are put to three tasks of lm-eval-harness."""
    source = {"model": str(tuned), "parameters": {"weight": 20.0}}
    merge = {"merge_method": "task_arithmetic", "base_model": str(llama), "models": [source]}
    spec = {"tasks": ["pick", "read", "continue"], "include_path": str(tasks), "limit": 4}
    models = [str(llama), {"name": "merged", "merge": merge}]
    return {"kind": "evaluate", "models": models, "lm_eval": spec}


def main(llama: Path, tuned: Path, bert: Path, folder: Path) -> None:
    """Evaluate in both processes, without a folder too, and one that is cut short and goes on."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    run(language(llama, tuned), folder / "language")
    run(classes(bert), folder / "classes")
    run(questions(llama), folder / "questions")
    run(harness(llama, tuned, folder / "tasks"), folder / "harness")
    alone = run(classes(bert)).results
    say("results" if alone else "no results")
    computed = []

    def measured(*arguments: Any, **options: Any) -> Any:
        if len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(arguments)
        return measure_block(*arguments, **options)

    open_model.measure_block = measured  # type: ignore[attr-defined]
    try:
        run(language(llama, tuned), folder / "cut")
    except KeyboardInterrupt:
        say("interrupted")


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
