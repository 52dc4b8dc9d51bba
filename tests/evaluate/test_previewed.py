"""What a preview says of a model is what an evaluation says of it: the same rows, the same scores."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers

from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.tasks import load_tasks, score
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe
from tests.evaluate.runs import TABLES, recipe, run


@pytest.mark.parametrize("max_rows", [None, 5])
def test_language_models(llama: Path, max_rows: int | None) -> None:
    tasks = [{"data": name, "max_rows": max_rows, "name": name} for name in ("texts", "other texts")]
    content = {"kind": "preview", "base_model": str(llama), "models": [{"model": "a"}, {"model": "b"}], "tasks": tasks}
    preview = load_recipe({**content, "methods": "linear"}, expect=PreviewRecipe, methods=method_schemas())
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    result = run(recipe([llama], data=["texts", "other texts"], max_rows=max_rows))
    for task in load_tasks(preview, tokenizer, tables=TABLES, rows_per_batch=3):
        (found,) = score(model, task)
        for metric in ("loss", "perplexity"):
            assert found[metric] == pytest.approx(result.value(str(llama), task.name, metric), rel=1e-6)


def test_classifiers(bert: Path) -> None:
    labels = ["stone", "animal", "plant"]
    data = [{"eval": name, "labels": labels} for name in ("labelled", "other labelled")]
    tasks = [{"data": own, "metric": "accuracy", "name": own["eval"]} for own in data]
    content = {"kind": "preview", "base_model": str(bert), "models": [{"model": "a"}, {"model": "b"}], "tasks": tasks}
    content |= {"methods": "linear", "evaluation": {"task": "sequence_classification"}}
    preview = load_recipe(content, expect=PreviewRecipe, methods=method_schemas())
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert).eval()
    result = run(recipe([bert], data=["labelled", "other labelled"]))
    for task in load_tasks(preview, tokenizer, tables=TABLES, rows_per_batch=3):
        (found,) = score(model, task)
        assert found["accuracy"] == pytest.approx(result.value(str(bert), task.name, "accuracy"))
        assert found["loss"] == pytest.approx(result.value(str(bert), task.name, "nll"), rel=1e-6)
