"""Heads that adapters bring along and the base has not: what they started from takes the base's place."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.errors import CheckpointError, MergekitBayesError, MissingInputError, PlanError
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.plan import MergePlan, plan_merge
from tests.merge.adapter_problem import assert_close
from tests.merge.builders import (
    PREFIX,
    random_tensors,
    read_json,
    read_metadata,
    read_precisions,
    read_tensors,
    snapshot,
    tensor_infos,
    write_adapter,
    write_checkpoint,
    write_initial,
    write_precisions,
)
from tests.merge.head_problem import (
    HEAD,
    LABELS,
    METHODS,
    MODULE,
    TOLD,
    WEIGHTS,
    Classifier,
    head,
    recipe,
    run,
    truth,
    write_base,
    write_lora,
)

START = head(9)
SPACES = ("product", "factor")


def two(root: Path, **options: Any) -> tuple[Path, list[Classifier]]:
    """The base and two adapters with heads that started alike."""
    base = write_base(root / "base")
    options = {"start": START, "base": base, **options}
    return base, [write_lora(root / name, seed, **options) for seed, name in enumerate(("one", "two"), start=1)]


def plan(method: str, sources: list[Classifier], base: Path | None, **extra: Any) -> MergePlan:
    return plan_merge(load_recipe(recipe(method, sources, base, **extra)))


def refusal(root: Path, method: str, sources: list[Classifier], base: Path | None, **extra: Any) -> list[str]:
    """The messages of a merge that is refused before anything is written."""
    before = snapshot(root)
    with pytest.raises(MergekitBayesError) as caught:
        run(method, sources, base, root / "out", **extra)
    assert snapshot(root) == before
    assert isinstance(caught.value, PlanError)
    return [str(problem) for problem in caught.value.problems]


# --- numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", METHODS)
def test_a_new_head_is_merged_from_where_it_started(method: str, space: str, tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    run(method, sources, base, tmp_path / "out", space=space)
    merged = read_tensors(tmp_path / "out", "adapter_model")
    for name in HEAD:
        raw = f"{PREFIX}{name}"
        wanted = truth(method, START[name], [source.posterior(name, raw=raw) for source in sources])
        assert_close(merged[raw], wanted.mean, 1e-6)  # written in float32, as the adapters are
        if method in ("hessian_weighted", "gradient_matching", "posterior"):
            assert_close(read_precisions(tmp_path / "out")[raw], wanted.precision, 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_without_the_head_leaves_it_at_the_start(method: str, tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    write_lora(tmp_path / "two", 2, base=base, start=None, trained={}, told=None)
    run(method, sources, base, tmp_path / "out")
    merged = read_tensors(tmp_path / "out", "adapter_model")
    for name in HEAD:
        raw = f"{PREFIX}{name}"
        posteriors = [
            sources[0].posterior(name, raw=raw),
            (START[name], torch.ones(())) if method == "linear" else None,
        ]
        assert_close(merged[raw], truth(method, START[name], posteriors).mean, 1e-6)


@pytest.mark.parametrize("method", ["gradient_matching", "posterior"])
def test_a_head_without_precision_of_its_own_has_the_prior_s(method: str, tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    (tmp_path / "two" / "precision.safetensors").unlink()
    extra = {}
    if method == "gradient_matching":
        known = recipe(method, sources, base)["models"]
        known[1]["precision"] = 2.0
        extra = {"models": known}
    run(method, sources, base, tmp_path / "out", **extra)
    name = "score.weight"
    own = 2.0 if method == "gradient_matching" else 0.25
    posteriors = [sources[0].posterior(name, raw=PREFIX + name), (sources[1].tensors[PREFIX + name], torch.tensor(own))]
    merged = read_tensors(tmp_path / "out", "adapter_model")[PREFIX + name]
    assert_close(merged, truth(method, START[name], posteriors).mean, 1e-6)


def test_the_prior_of_a_base_sidecar_is_a_number_where_the_base_has_no_tensor(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    shapes = {name: info.shape for name, info in tensor_infos(base).items()}
    spread = {name: torch.full(shape, 2.0) for name, shape in shapes.items()}
    write_precisions(base, spread, prior_precision=0.25)
    run("gradient_matching", sources, base, tmp_path / "out", precision={})
    raw = f"{PREFIX}score.weight"
    wanted = truth("gradient_matching", START["score.weight"], [s.posterior("score.weight", raw=raw) for s in sources])
    assert_close(read_tensors(tmp_path / "out", "adapter_model")[raw], wanted.mean, 1e-6)
    write_precisions(base, spread)
    (message, other) = refusal(tmp_path, "gradient_matching", sources, base, precision={}, output={"rank": 2})
    assert "no precision for score.bias, and no prior_precision to fall back on" in message
    assert "score.weight" in other
    assert message.endswith("or a number for precision.prior")


def test_weights_by_filter_reach_the_head(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    content = recipe("task_arithmetic", sources, base)
    content["models"][0]["parameters"]["weight"] = [{"filter": "score", "value": 0.0}, {"value": 1.0}]
    run("task_arithmetic", sources, base, tmp_path / "out", models=content["models"])
    raw = f"{PREFIX}score.weight"
    wanted = truth("task_arithmetic", START["score.weight"], [s.posterior("", raw=raw) for s in sources], (0.0, 0.5))
    assert_close(read_tensors(tmp_path / "out", "adapter_model")[raw], wanted.mean, 1e-6)


def test_a_head_of_two_classes_is_not_tied_to_an_embedding_of_two_rows(tmp_path: Path) -> None:
    """BERT has two token types, and its configuration ties the embedding of words."""
    config = {"architectures": ["ToyForMaskedLM"], "tie_word_embeddings": True, "vocab_size": 6}
    tensors = random_tensors(0, {f"{MODULE}.weight": (5, 4), "model.token_type_embeddings.weight": (2, 4)})
    base = write_checkpoint(tmp_path / "base", tensors, config=config)
    start, trained = torch.zeros(2, 4), [torch.full((2, 4), value) for value in (1.0, 3.0)]
    sources = [
        write_lora(tmp_path / name, seed, base=base, start={"score.weight": start}, trained={"score.weight": own})
        for seed, (name, own) in enumerate(zip(("one", "two"), trained, strict=True))
    ]
    run("task_arithmetic", sources, base, tmp_path / "out")
    merged = read_tensors(tmp_path / "out", "adapter_model")[f"{PREFIX}score.weight"]
    assert torch.equal(merged, torch.full((2, 4), 0.75 * 1.0 + 0.5 * 3.0))
    for source in sources:
        (source.folder / FRESH_NAME).unlink()
    assert "score.weight: stored whole by" in refusal(tmp_path, "task_arithmetic", sources, base)[0]


# --- what the output says ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_the_output_carries_head_start_and_labels(method: str, tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    run(method, sources, base, tmp_path / "out")
    config = read_json(tmp_path / "out" / "adapter_config.json")
    assert config["modules_to_save"] == ["score"]
    start = load_file(tmp_path / "out" / FRESH_NAME)
    assert start.keys() == START.keys()
    assert all(torch.equal(start[name], START[name]) for name in START)
    for file in ("adapter_model.safetensors", FRESH_NAME):
        told = header(tmp_path / "out" / file)
        assert told.items() >= {**TOLD, "base_fingerprint": fingerprint(tensor_infos(base))}.items()
    report = read_json(tmp_path / "out" / "merge_report.json")
    assert report["tensors"]["started"] == sorted(HEAD)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Its head tells animal, plant, stone, in this order." in card
    assert "AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=3)" in card
    assert "pipeline_tag: text-classification" in card


def header(file: Path) -> dict[str, Any]:
    raw = file.read_bytes()
    fields = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    told: dict[str, Any] = json.loads(fields["__metadata__"]["mergekit_bayes"])
    return told


def test_a_merge_can_be_merged_further(tmp_path: Path) -> None:
    """Task vectors add up, whichever are added first."""
    base, sources = two(tmp_path)
    third = write_lora(tmp_path / "three", 3, base=base, start=START)
    run("task_arithmetic", sources, base, tmp_path / "first")
    content = recipe("task_arithmetic", [tmp_path / "first", third], base)
    content["models"][0]["parameters"]["weight"] = 1.0
    run("task_arithmetic", [], base, tmp_path / "out", models=content["models"])
    raw = f"{PREFIX}score.weight"
    posteriors = [source.posterior("", raw=raw) for source in (*sources, third)]
    wanted = truth("task_arithmetic", START["score.weight"], posteriors, (*WEIGHTS, WEIGHTS[1]))
    assert_close(read_tensors(tmp_path / "out", "adapter_model")[raw], wanted.mean, 1e-6)
    assert (tmp_path / "out" / FRESH_NAME).exists()


def test_a_posterior_of_a_merge_is_one_of_the_next(tmp_path: Path) -> None:
    """With the same prior, weight 1 on a merge of two gives what weights on the two give."""
    base, sources = two(tmp_path)
    run("gradient_matching", sources, base, tmp_path / "first")
    assert read_metadata(tmp_path / "first").estimator == "merged"
    models = [{"model": str(tmp_path / "first"), "parameters": {"weight": 1.0}}]
    run("gradient_matching", [], base, tmp_path / "out", models=models)
    for part in (lambda folder: read_tensors(folder, "adapter_model"), read_precisions):
        first, again = part(tmp_path / "first"), part(tmp_path / "out")
        for name in HEAD:
            assert_close(again[PREFIX + name], first[PREFIX + name], 1e-6)


def test_the_plan_names_the_start(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    made = plan("task_arithmetic", sources, base)
    note = (
        f"score.bias, score.weight: not in {base}; what they started from ({FRESH_NAME} of the sources) takes its place"
    )
    assert made.notes == (note,)
    assert made.initial is not None
    assert sorted(made.initial.tensors) == sorted(HEAD)
    assert made.task.labels == LABELS


def test_another_start_is_another_job(tmp_path: Path) -> None:
    """Also where the method does not read it: it is written again."""
    base, sources = two(tmp_path)
    job = plan("linear", sources, base).job
    for source in sources:
        write_initial(source.folder, head(8))
    assert plan("linear", sources, base).job != job


def test_the_order_of_sources_does_not_show(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    models = recipe("gradient_matching", sources, base)["models"]
    run("gradient_matching", sources, base, tmp_path / "out")
    run("gradient_matching", [], base, tmp_path / "again", models=models[::-1])
    for file in ("adapter_model.safetensors", FRESH_NAME):
        assert (tmp_path / "out" / file).read_bytes() == (tmp_path / "again" / file).read_bytes()


# --- starts that are not common, or not known -------------------------------------------------------------------------


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching", "posterior"])
def test_heads_that_started_from_different_values(method: str, space: str, tmp_path: Path) -> None:
    """One message, however many tensors and sources; biases start from zero in any case."""
    base, sources = two(tmp_path)
    zero = torch.zeros(3)
    starts = ({**START, "score.bias": zero}, {**head(8), "score.bias": zero}, {**START, "score.bias": zero})
    three = write_lora(tmp_path / "three", 3, base=base, start=None)
    for source, start in zip((*sources, three), starts, strict=True):
        write_initial(source.folder, start, base=base)
    models = [{"model": str(s.folder), "parameters": {"weight": 0.5}} for s in (*sources, three)]
    (message,) = refusal(tmp_path, method, [], base, models=models, space=space)
    assert message == (
        f"score.weight: the heads started from different values ({tmp_path}/one and {tmp_path}/three; {tmp_path}/two); "
        "train with one training.seed"
    )


@pytest.mark.parametrize("method", ["linear", "hessian_weighted"])
def test_methods_without_a_base_average_them_and_say_so(method: str, tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    write_initial(tmp_path / "two", {**START, "score.weight": START["score.weight"] + 1}, base=base)
    report = run(method, sources, base, tmp_path / "out").report
    first, second = report["tensors"]["notes"]
    assert first == (
        f"score.weight: the heads started from different values ({tmp_path}/one; {tmp_path}/two); "
        f"{method} averages them all the same"
    )
    assert second.startswith("score.weight: no start that all sources have in common")
    assert load_file(tmp_path / "out" / FRESH_NAME).keys() == {"score.bias"}


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching", "posterior"])
@pytest.mark.parametrize("of", ["one", "both"])
def test_a_start_that_is_not_known(of: str, method: str, space: str, tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    for source in sources if of == "both" else sources[:1]:
        (source.folder / FRESH_NAME).unlink()
    who = f"{tmp_path}/one, {tmp_path}/two" if of == "both" else f"{tmp_path}/one"
    (message,) = refusal(tmp_path, method, sources, base, space=space)
    assert message == (
        f"score.bias, score.weight: stored whole by {who}, and {base} has nothing of that name, so it is not known "
        f"what training added; expected {FRESH_NAME} beside them, which bayes-merge writes when it trains a new head, "
        "or a base_model that has them, or a method that needs no base (linear, hessian_weighted)"
    )


@pytest.mark.parametrize("method", ["linear", "hessian_weighted"])
@pytest.mark.parametrize("of", ["one", "both"])
def test_methods_without_a_base_need_no_start(of: str, method: str, tmp_path: Path) -> None:
    _, sources = two(tmp_path)
    for source in sources if of == "both" else sources[:1]:
        (source.folder / FRESH_NAME).unlink()
    report = run(method, sources, None, tmp_path / "out").report
    assert not (tmp_path / "out" / FRESH_NAME).exists()
    told = [note for note in report["tensors"]["notes"] if note.startswith("score.bias, score.weight: no start")]
    assert len(told) == (1 if of == "one" else 0)  # of heads made elsewhere nobody expects one
    assert report["tensors"]["started"] == []


def test_methods_without_a_base_carry_the_start_on(tmp_path: Path) -> None:
    _, sources = two(tmp_path)
    run("linear", sources, None, tmp_path / "out")
    assert load_file(tmp_path / "out" / FRESH_NAME).keys() == START.keys()


def test_a_start_for_what_the_base_has(tmp_path: Path) -> None:
    base, sources = two(tmp_path, base=None)
    write_base(tmp_path / "base", extra=head(3))
    messages = refusal(tmp_path, "task_arithmetic", sources, base)
    assert messages == [
        f"{tmp_path}/{name}: its score.bias, score.weight started from values of its own ({FRESH_NAME}), but {base} "
        "has such tensors; expected the base that it was trained from"
        for name in ("one", "two")
    ]


def test_a_start_of_another_base(tmp_path: Path) -> None:
    base, sources = two(tmp_path, base=None)
    other = write_base(tmp_path / "other", extra={"model.more": torch.ones(2)})
    write_initial(tmp_path / "two", START, base=other)
    (message,) = refusal(tmp_path, "task_arithmetic", sources, base)
    assert re.fullmatch(
        rf"{tmp_path}/two: belongs to a base with fingerprint (\S+); expected (\S+), that of {base}", message
    )


def test_a_start_of_another_shape(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    write_initial(tmp_path / "two", {**START, "score.bias": torch.zeros(2)}, base=base)
    messages = refusal(tmp_path, "task_arithmetic", sources, base)
    assert f"{tmp_path}/two/{FRESH_NAME}: score.bias has shape (2,); expected (3,), as trained" in messages


def test_heads_of_different_shapes(tmp_path: Path) -> None:
    """Without labels, which would be what is told apart first."""
    base, sources = two(tmp_path, told=None)
    longer = {"score.weight": torch.ones(2, 4), "score.bias": torch.ones(2)}
    write_lora(tmp_path / "two", 2, base=base, start=longer, trained=longer, told=None)
    for method in METHODS:
        messages = refusal(tmp_path, method, sources, base)
        assert f"score.bias: shape (2,) in {tmp_path}/two; expected (3,)" in messages


def test_a_head_that_one_leaves_alone_at_an_unknown_start(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    (tmp_path / "one" / FRESH_NAME).unlink()
    write_lora(tmp_path / "two", 2, base=base, start=None, trained={}, told=None)
    (bias, weight) = refusal(tmp_path, "linear", sources, base)
    assert weight == (
        f"score.weight: stored whole by an adapter, so the base's weights are needed ({tmp_path}/two leave it alone); "
        f"expected a base_model that has them, or {FRESH_NAME} beside the others"
    )
    assert bias.startswith("score.bias: ")


# --- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [("stone", "plant", "animal"), ("animal", "plant"), ("a", "b", "c")])
@pytest.mark.parametrize("method", METHODS)
def test_different_labels(method: str, labels: tuple[str, ...], tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    write_lora(tmp_path / "two", 2, base=base, start=START, told={**TOLD, "labels": labels})
    (message,) = refusal(tmp_path, method, sources, base)
    told = f"{tmp_path}/one: animal, plant, stone; {tmp_path}/two: {', '.join(labels)}"
    assert message == (
        f"the labels of the sources differ ({told}), so an output of one head means something else in another; "
        "expected the same labels in the same order; train with one data.labels"
    )


def test_a_head_without_labels_takes_those_of_the_others(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    write_lora(tmp_path / "two", 2, base=base, start=START, told=None)
    run("task_arithmetic", sources, base, tmp_path / "out")
    assert header(tmp_path / "out" / "adapter_model.safetensors")["labels"] == list(LABELS)


def test_heads_without_labels_give_one_without(tmp_path: Path) -> None:
    base, sources = two(tmp_path, told=None)
    run("task_arithmetic", sources, base, tmp_path / "out")
    assert header(tmp_path / "out" / "adapter_model.safetensors").keys() == {"base_fingerprint", "method"}
    assert "Its head" not in (tmp_path / "out" / "README.md").read_text()


# --- errors have classes ----------------------------------------------------------------------------------------------


def test_what_is_missing_and_what_contradicts_are_told_apart(tmp_path: Path) -> None:
    base, sources = two(tmp_path)
    write_initial(tmp_path / "two", head(8), base=base)
    with pytest.raises(PlanError) as caught:
        run("task_arithmetic", sources, base, tmp_path / "out")
    assert [type(problem) for problem in caught.value.problems] == [CheckpointError]
    shutil.rmtree(tmp_path / "two")
    write_adapter(tmp_path / "two", {MODULE: (torch.ones(2, 4), torch.ones(5, 2))}, saved=head(2))
    with pytest.raises(PlanError) as caught:
        run("task_arithmetic", sources, base, tmp_path / "out")
    assert [type(problem) for problem in caught.value.problems] == [MissingInputError]
