"""A merge that is never written has the scores of the same merge on disk."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import MergekitBayesError, PlanError, RecipeError
from mergekit_bayes.evaluate.describe import describe
from mergekit_bayes.merge.run import merge
from mergekit_bayes.recipe import dump_yaml, load_recipe
from mergekit_bayes.recipe.adapter import AdapterSpec
from mergekit_bayes.recipe.evaluate import EvaluateRecipe
from tests.conftest import TinyCheckpoints
from tests.evaluate.runs import recipe, run
from tests.model.builders import LABELS, load, trained, with_tokenizer


@pytest.fixture(scope="module")
def sources(llama: Path, tuned: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A base, two adapters of it and two models trained from it, with precisions."""
    home = tmp_path_factory.mktemp("sources")
    spec = AdapterSpec(r=2, lora_alpha=4, target_modules=("q_proj", "v_proj"))
    found = {"base": llama, "tuned": tuned}
    for name, adapter, seed in (("second", spec, 5), ("code", None, 6), ("prose", None, 7)):
        (home / name).mkdir()
        found[name] = trained(home / name, load(llama, adapter), seed=seed)
    return found


def merging(sources: dict[str, Path], names: tuple[str, str], **keys: Any) -> dict[str, Any]:
    weights = [30.0 if name in ("tuned", "second") else 0.5 for name in names]
    weighted = zip(names, weights, strict=True)
    models = [{"model": str(sources[name]), "parameters": {"weight": weight}} for name, weight in weighted]
    return {"merge_method": "task_arithmetic", "base_model": str(sources["base"]), "models": models, **keys}


MERGES: dict[str, tuple[tuple[str, str], dict[str, Any]]] = {
    "checkpoints": (("code", "prose"), {}),
    "with precisions": (("code", "prose"), {"merge_method": "posterior"}),
    "written as bfloat16": (("code", "prose"), {"out_dtype": "bfloat16"}),
    "without a base": (("code", "prose"), {"merge_method": "linear", "base_model": None}),
    "seen whole": (("code", "prose"), {"merge_method": "iso_c"}),
    "an adapter and a checkpoint": (("tuned", "prose"), {}),
    "adapters, as a checkpoint": (("tuned", "second"), {"space": "full"}),
    "adapters": (("tuned", "second"), {}),
    "adapters, of lower rank": (("tuned", "second"), {"output": {"rank": 1}}),
    "factors": (("tuned", "second"), {"space": "factor"}),
}


@pytest.mark.parametrize("name", MERGES)
def test_scores_are_those_of_the_merge_on_disk(name: str, sources: dict[str, Path], tmp_path: Path) -> None:
    names, keys = MERGES[name]
    content = {key: value for key, value in merging(sources, names, **keys).items() if value is not None}
    merge(content, tmp_path / "merged")
    result = run(recipe([tmp_path / "merged", {"name": "in memory", "merge": content}, sources["base"]]))
    on_disk = result.value(str(tmp_path / "merged"), "texts", "loss")
    assert result.value("in memory", "texts", "loss") == pytest.approx(on_disk, rel=1e-6)
    assert abs(on_disk - result.value(str(sources["base"]), "texts", "loss")) > 1e-3, "the merge changes something"


def test_weights_are_those_of_the_merge_on_disk_also_as_they_are_stored(
    sources: dict[str, Path], tmp_path: Path
) -> None:
    """Without a `dtype`, a model computes in what it is stored as: half the bits of the base here."""
    content = merging(sources, ("code", "prose"), out_dtype="bfloat16")
    merge(content, tmp_path / "merged")
    result = run(recipe([tmp_path / "merged", {"name": "in memory", "merge": content}], dtype=None))
    assert result.value("in memory", "texts", "loss") == result.value(str(tmp_path / "merged"), "texts", "loss")


def test_a_head_that_the_base_has_not(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> None:
    base = with_tokenizer(tiny_checkpoint("bert"), tmp_path / "base", pad=True)
    for name, seed in (("one", 4), ("two", 5)):
        (tmp_path / name).mkdir()
        trained(tmp_path / name, load(base, labels=LABELS), seed=seed)
    content = merging({name: tmp_path / name for name in ("base", "one", "two")}, ("one", "two"))
    merge(content, tmp_path / "merged")
    result = run(recipe([tmp_path / "merged", {"name": "in memory", "merge": content}], data="labelled"))
    for metric in ("accuracy", "nll"):
        on_disk = result.value(str(tmp_path / "merged"), "labelled", metric)
        assert result.value("in memory", "labelled", metric) == pytest.approx(on_disk, rel=1e-6)
    assert result.results["models"]["in memory"]["labels"] == list(LABELS)


def test_a_recipe_on_disk_has_its_own_relative_paths(sources: dict[str, Path], tmp_path: Path) -> None:
    """And the command takes it for what it is."""
    (tmp_path / "recipes").mkdir()
    for name, folder in sources.items():
        (tmp_path / "recipes" / name).symlink_to(folder)
    content = merging({name: Path(name) for name in sources}, ("code", "prose"))
    (tmp_path / "recipes" / "merge.yaml").write_text(dump_yaml(content))
    models = [{"merge": "recipes/merge.yaml"}, {"merge": merging(sources, ("code", "prose")), "name": "written out"}]
    result = run(recipe(models), recipe_dir=tmp_path)
    losses = {found["texts"]["loss"]["value"] for found in result.results["scores"].values()}
    assert len(losses) == 1
    assert set(result.results["scores"]) == {"recipes/merge.yaml", "written out"}


def test_what_is_known_of_a_merge_holds_until_it_is_another(
    sources: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("code", "prose"):
        shutil.copytree(sources[name], tmp_path / name)
    mine = sources | {name: tmp_path / name for name in ("code", "prose")}

    def evaluated(content: dict[str, Any]) -> None:
        run(recipe([{"name": "merge", "merge": content}]), tmp_path / "out", overwrite=True)

    evaluated(merging(mine, ("code", "prose")))
    monkeypatch.setattr("mergekit_bayes.evaluate.merged.Merged.load", _not_loaded)
    evaluated(merging(mine, ("code", "prose"), output={"path": "elsewhere", "max_shard_size": 1000}))
    with pytest.raises(AssertionError, match="loaded"):
        evaluated(merging(mine, ("code", "prose"), scale="mean"))
    shutil.copy(sources["prose"] / "model.safetensors", tmp_path / "code" / "model.safetensors")
    shutil.copy(sources["prose"] / "precision.safetensors", tmp_path / "code" / "precision.safetensors")
    with pytest.raises(AssertionError, match="loaded"):
        evaluated(merging(mine, ("code", "prose")))


def _not_loaded(*_: object, **__: object) -> None:
    raise AssertionError("loaded")


def test_the_plan_says_what_is_merged(sources: dict[str, Path]) -> None:
    content = recipe([{"name": "mine", "merge": merging(sources, ("tuned", "second"))}])
    loaded = load_recipe({**content, "data": str(sources["base"] / "tokenizer.json")}, expect=EvaluateRecipe)
    assert "mine: at its mean; task_arithmetic of 2 models, merged in memory" in describe(loaded)


def refusal_of(models: list[object], kind: type[MergekitBayesError] = PlanError, **keys: Any) -> str:
    with pytest.raises(kind) as caught:
        run(recipe(models, **keys))
    return str(caught.value)


def test_samples_and_pruning_need_a_sidecar(sources: dict[str, Path]) -> None:
    model = {"name": "mine", "merge": merging(sources, ("code", "prose"))}
    found = refusal_of([model], samples=2)
    assert found.startswith("model mine: is merged in memory, at its mean alone, and `samples` needs its precisions;")
    assert "`prune` needs" in refusal_of([model], prune=0.5)
    assert len(run(recipe([{**model, "samples": False}, sources["code"]], samples=2)).results["models"]) == 3


def test_merges_that_cannot_be_made(sources: dict[str, Path], tmp_path: Path) -> None:
    missing = merging({**sources, "prose": tmp_path / "nothing"}, ("code", "prose"))
    assert refusal_of([{"name": "mine", "merge": missing}]).startswith("model mine: ")
    found = refusal_of([{"merge": "nothing.yaml"}])
    assert "models[0].merge: there is no nothing.yaml; expected the path of a merge recipe" in found
    assert "what is on disk is a `model`" in refusal_of([{"merge": str(tmp_path)}])
    (tmp_path / "other.yaml").write_text("kind: precision\nmodel: a\n")
    assert "expected a recipe of kind `merge`" in refusal_of([{"merge": str(tmp_path / "other.yaml")}])
    wrong = {**merging(sources, ("code", "prose")), "merge_method": "linaer"}
    found = refusal_of([{"name": "mine", "merge": wrong}], RecipeError)
    assert found.startswith("models[0].merge.merge_method: ")
    assert "linear" in found


def test_an_output_that_lies_in_a_source(sources: dict[str, Path]) -> None:
    content = recipe([{"name": "mine", "merge": merging(sources, ("tuned", "second"))}])
    with pytest.raises(MergekitBayesError, match="lies inside an input"):
        run(content, sources["second"] / "scores")
