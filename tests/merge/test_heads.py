"""Full checkpoints of classifiers whose base has another head, or none: names, what is dropped, the configuration."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.plan import MergePlan, plan_merge
from mergekit_bayes.merge.plan_text import plan_text
from tests.golden.compare import GOLDEN, check_golden
from tests.merge.adapter_problem import assert_close
from tests.merge.builders import (
    CONFIG,
    factor_names,
    random_tensors,
    read_json,
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
    BASE_CONFIG,
    CLASSIFIER_CONFIG,
    HEAD,
    METHODS,
    MODULE,
    OTHER_HEAD,
    PRIOR,
    TOLD,
    WEIGHTS,
    Classifier,
    body,
    head,
    recipe,
    run,
    truth,
    write_base,
    write_full,
    write_lora,
)
from tests.merge.truth import lora_update, merge_tensor

START = head(9)
NAMES = ("one", "two")
BASES: Mapping[str, dict[str, Any]] = {"with a head": {}, "alone": {"root": "", "other": False}}
"""The base as a language model, and as the pretrained model alone, whose names lack `model.`."""

every_base = pytest.mark.parametrize("kind", BASES)
every_method = pytest.mark.parametrize("method", METHODS)


def full(root: Path, kind: str = "with a head", **options: Any) -> tuple[Path, list[Classifier]]:
    """The base and two full classifiers."""
    base = write_base(root / "base", **BASES[kind])
    options = {"start": START, "base": base, **options}
    return base, [write_full(root / name, seed, **options) for seed, name in enumerate(NAMES, start=1)]


def lora(root: Path, kind: str = "with a head", **options: Any) -> tuple[Path, list[Classifier]]:
    """The base and two adapters with heads."""
    base = write_base(root / "base", **BASES[kind])
    options = {"start": START, "base": base, **options}
    return base, [write_lora(root / name, seed, **options) for seed, name in enumerate(NAMES, start=1)]


def merged(root: Path, method: str, sources: list[Classifier], base: Path, **extra: Any) -> dict[str, Tensor]:
    """The tensors of a merge into a full checkpoint."""
    run(method, sources, base, root / "out", **extra)
    return read_tensors(root / "out")


def refusal(root: Path, method: str, sources: list[Classifier], base: Path | None, **extra: Any) -> list[str]:
    """The messages of a merge that is refused before anything is written."""
    before = snapshot(root)
    with pytest.raises(MergekitBayesError) as caught:
        run(method, sources, base, root / "out", **extra)
    assert snapshot(root) == before
    return str(caught.value).splitlines()


def start_of(name: str) -> Tensor:
    """What theta_0 is for a tensor of the output."""
    return {**body(0), **START}[name]


# --- numbers and names ------------------------------------------------------------------------------------------------


@every_base
@every_method
def test_full_classifiers_are_merged_from_base_and_start(method: str, kind: str, tmp_path: Path) -> None:
    base, sources = full(tmp_path, kind)
    found = merged(tmp_path, method, sources, base)
    assert sorted(found) == sorted({**body(0), **START})
    for name, tensor in found.items():
        wanted = truth(method, start_of(name), [source.posterior(name) for source in sources])
        assert_close(tensor, wanted.mean)
        if method in ("hessian_weighted", "gradient_matching", "posterior"):
            assert_close(read_precisions(tmp_path / "out")[name], wanted.precision, 1e-6)


@every_base
@every_method
def test_adapters_are_merged_into_base_and_start(method: str, kind: str, tmp_path: Path) -> None:
    base, sources = lora(tmp_path, kind)
    found = merged(tmp_path, method, sources, base, space="full")
    assert sorted(found) == sorted({**body(0), **START})
    for name in HEAD:
        raw = f"base_model.model.{name}"
        wanted = truth(method, START[name], [source.posterior(name, raw=raw) for source in sources])
        assert_close(found[name], wanted.mean)
    if method == "task_arithmetic":
        updates = [lora_update(*(s.tensors[name] for name in factor_names(MODULE)), 1.0) for s in sources]
        wanted_mean = body(0)[f"{MODULE}.weight"] + sum(w * u for w, u in zip(WEIGHTS, updates, strict=True))
        assert_close(found[f"{MODULE}.weight"], wanted_mean)
    for name in body(0).keys() - {f"{MODULE}.weight"}:
        assert torch.equal(found[name], body(0)[name].double())


@every_base
@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching", "posterior"])
def test_an_adapter_and_a_full_model(method: str, kind: str, tmp_path: Path) -> None:
    base, (_, model) = full(tmp_path, kind)
    adapter = write_lora(tmp_path / "lora", 1, base=base, start=START)
    found = merged(tmp_path, method, [adapter, model], base, space="full")
    for name in HEAD:
        posteriors = [adapter.posterior(name, raw=f"base_model.model.{name}"), model.posterior(name)]
        assert_close(found[name], truth(method, START[name], posteriors).mean)
    name = "model.norm.weight"  # which the adapter leaves at the base's
    assert_close(found[name], truth(method, start_of(name), [None, model.posterior(name)]).mean)


@every_base
@every_method
def test_an_adapter_without_the_head_leaves_it_at_the_start(method: str, kind: str, tmp_path: Path) -> None:
    base, sources = lora(tmp_path, kind)
    write_lora(tmp_path / "two", 2, base=base, start=None, trained={}, told=None)
    found = merged(tmp_path, method, sources, base, space="full")
    for name in HEAD:
        left = (START[name], torch.ones(())) if method == "linear" else None
        posteriors = [sources[0].posterior(name, raw=f"base_model.model.{name}"), left]
        assert_close(found[name], truth(method, START[name], posteriors).mean)


@every_base
def test_an_adapter_on_a_model_of_its_own(kind: str, tmp_path: Path) -> None:
    """A language model trained further, with a classifier's adapter on it: its own head has no place either."""
    base, sources = lora(tmp_path, kind, base=None)
    options = BASES[kind]
    own = write_checkpoint(
        tmp_path / "own",
        {**body(5, root=options.get("root", "model.")), **({} if kind == "alone" else random_tensors(6, OTHER_HEAD))},
        config=BASE_CONFIG,
    )
    models = [f"{own}+{tmp_path}/one", str(tmp_path / "two")]
    run("task_arithmetic", models, base, tmp_path / "out", space="full")
    found = read_tensors(tmp_path / "out")
    assert sorted(found) == sorted({**body(0), **START})
    name = "model.norm.weight"
    assert_close(found[name], body(0)[name] + WEIGHTS[0] * (body(5)[name].double() - body(0)[name]))
    raw = "base_model.model.score.weight"
    wanted = truth("task_arithmetic", START["score.weight"], [s.posterior("", raw=raw) for s in sources])
    assert_close(found["score.weight"], wanted.mean)


def test_a_full_classifier_with_an_adapter_of_its_own(tmp_path: Path) -> None:
    """Its head's start lies beside the model, and the adapter trains that head further."""
    base, (one, two) = full(tmp_path)
    lora_of = write_lora(tmp_path / "lora", 3, base=one.folder, start=None)
    run("task_arithmetic", [f"{one.folder}+{lora_of.folder}", two], base, tmp_path / "out")
    raw = "base_model.model.score.weight"
    posteriors = [lora_of.posterior("", raw=raw), two.posterior("score.weight")]
    wanted = truth("task_arithmetic", START["score.weight"], posteriors)
    assert_close(read_tensors(tmp_path / "out")["score.weight"], wanted.mean)


def test_a_sidecar_of_the_base_goes_by_the_base_s_names(tmp_path: Path) -> None:
    base, sources = full(tmp_path, "alone")
    shapes = {name: info.shape for name, info in tensor_infos(base).items()}
    spread = {name: tensor.exp() for name, tensor in random_tensors(3, shapes).items()}
    write_precisions(base, spread, prior_precision=PRIOR)
    found = merged(tmp_path, "gradient_matching", sources, base, precision={})
    name = "model.norm.weight"
    prior = spread["norm.weight"].double()
    posteriors = [(s.tensors[name], s.precisions[name].double() - 0.5 + prior) for s in sources]
    wanted = merge_tensor("gradient_matching", (start_of(name), prior), posteriors, WEIGHTS)
    assert_close(found[name], wanted.mean)
    wanted = truth("gradient_matching", START["score.bias"], [s.posterior("score.bias") for s in sources])
    assert_close(found["score.bias"], wanted.mean)


def test_a_start_in_more_digits_than_the_model(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base", {**body(0, dtype=torch.bfloat16), **random_tensors(1, OTHER_HEAD)}, config=BASE_CONFIG
    )
    sources = [write_full(tmp_path / n, s, base=base, start=START, dtype=torch.bfloat16) for s, n in enumerate(NAMES)]
    run("task_arithmetic", sources, base, tmp_path / "out", dtype=None)
    found = read_tensors(tmp_path / "out")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    wanted = truth("task_arithmetic", START["score.weight"], [s.posterior("score.weight") for s in sources]).mean
    assert torch.equal(found["score.weight"], wanted.to(torch.bfloat16))


# --- every tensor is accounted for ------------------------------------------------------------------------------------


def plan(method: str, sources: list[Classifier], base: Path, **extra: Any) -> MergePlan:
    return plan_merge(load_recipe(recipe(method, sources, base, **extra)))


@pytest.mark.parametrize("make", [full, lora])
def test_the_head_of_the_base_s_own_task_is_dropped_by_name(make: Any, tmp_path: Path) -> None:
    base, sources = make(tmp_path)
    made = plan("task_arithmetic", sources, base, space="full")
    reason = "outside of model.*, the head of the base's own task; no source has it"
    assert made.dropped == dict.fromkeys(sorted(OTHER_HEAD), reason)
    assert {step.name for step in made.steps} | made.dropped.keys() == tensor_infos(base).keys() | HEAD.keys()
    result = run("task_arithmetic", sources, base, tmp_path / "out", space="full")
    assert result.report["tensors"]["dropped"] == made.dropped
    assert "2 of the base dropped" in result.summary()


def test_how_a_plan_with_a_new_head_reads(tmp_path: Path) -> None:
    base, sources = lora(tmp_path)
    made = plan("gradient_matching", sources, base, space="full", dtype="float32")
    text = re.sub(r"memory     about .* at its peak", "memory     about SIZE at its peak", plan_text(made))
    # a sidecar records the name of the base, which is a path of this machine
    text = re.sub(r"(precision\S*: \d+ tensors?, |write      ).*", r"\1SIZE", text)
    check_golden(GOLDEN / "plans" / "heads.txt", text.replace(str(tmp_path), "models") + "\n")


@pytest.mark.parametrize("root", ["model.", ""])
def test_a_pooler_that_no_full_source_has_is_dropped_and_one_that_adapters_leave_alone_is_kept(
    root: str, tmp_path: Path
) -> None:
    pooler = {f"{root}pooler.dense.weight": torch.ones(4, 4)}
    base = write_base(tmp_path / "base", root=root, other=False, extra=pooler)
    adapters = [write_lora(tmp_path / f"lora{seed}", seed, base=base, start=START) for seed in (1, 2)]
    made = plan("task_arithmetic", adapters, base, space="full")
    assert made.dropped == {}
    assert "model.pooler.dense.weight" in {step.name for step in made.steps}
    model = write_full(tmp_path / "two", 2, base=base, start=START)
    made = plan("task_arithmetic", [adapters[0], model], base, space="full")
    assert made.dropped == {f"{root}pooler.dense.weight": "the base's pooler; no source has it"}
    assert "model.pooler.dense.weight" not in {step.name for step in made.steps}
    assert sorted(merged(tmp_path, "task_arithmetic", [adapters[0], model], base)) == sorted({**body(0), **START})


def test_a_buffer_that_no_source_has_is_dropped_and_one_that_all_have_is_copied(tmp_path: Path) -> None:
    """Transformers no longer saves the numbers of positions, which older checkpoints hold."""
    ids = {"embed.position_ids": torch.arange(3), "kept_ids": torch.arange(2)}
    base = write_base(tmp_path / "base", root="", other=False, extra=ids)
    sources = []
    for seed, name in enumerate(NAMES):
        write_checkpoint(
            tmp_path / name, {**body(seed), **head(seed), "model.kept_ids": torch.arange(2)}, config=CLASSIFIER_CONFIG
        )
        write_initial(tmp_path / name, START)
        sources.append(Classifier(tmp_path / name, {}))
    made = plan("task_arithmetic", sources, base)
    assert made.dropped == {"embed.position_ids": "I64 is not a weight; no source has it"}
    assert torch.equal(merged(tmp_path, "task_arithmetic", sources, base)["model.kept_ids"], torch.arange(2))


@pytest.mark.parametrize("space", ["adapters", "full models"])
def test_a_part_of_the_base_s_head_that_the_classifiers_keep(space: str, tmp_path: Path) -> None:
    """ModernBERT has a layer between the pretrained model and the last one, whatever the task."""
    shared = random_tensors(7, {"neck.weight": (4, 4)})
    base = write_base(tmp_path / "base", extra=shared)
    sources = []
    for seed, name in enumerate(NAMES, start=1):
        own = {**head(seed), **random_tensors(seed, {"neck.weight": (4, 4)})}
        if space == "adapters":
            sources.append(write_lora(tmp_path / name, seed, base=base, start=START, trained=own))
            continue
        write_checkpoint(tmp_path / name, {**body(seed), **own}, config=CLASSIFIER_CONFIG)
        write_initial(tmp_path / name, START, base=base)
        sources.append(Classifier(tmp_path / name, own))
    made = plan("task_arithmetic", sources, base, space="full")
    assert made.dropped.keys() == OTHER_HEAD.keys()
    assert made.dropped["lm_head.bias"].startswith("outside of model.* and neck.*, ")
    found = merged(tmp_path, "task_arithmetic", sources, base, space="full")
    raw = "base_model.model.neck.weight" if space == "adapters" else "neck.weight"
    posteriors = [(source.tensors[raw], torch.ones(())) for source in sources]
    assert_close(found["neck.weight"], truth("task_arithmetic", shared["neck.weight"], posteriors).mean)


@pytest.mark.parametrize("make", [full, lora])
def test_a_part_beside_the_head_that_the_base_has_not(make: Any, tmp_path: Path) -> None:
    """Trained, but without a start: it cannot be told from a tensor of another model."""
    base, _ = make(tmp_path)
    own = {**head(1), "neck.weight": torch.ones(4, 4)}
    if make is lora:
        write_lora(tmp_path / "one", 1, base=base, start=START, trained=own)
    else:
        write_checkpoint(tmp_path / "one", {**body(1), **own}, config=CLASSIFIER_CONFIG)
        (tmp_path / "one" / "precision.safetensors").unlink()
    sources = [Classifier(tmp_path / name, {}) for name in NAMES]
    messages = refusal(tmp_path, "task_arithmetic", sources, base, space="full")
    assert any("neck." in message for message in messages)


def test_what_else_the_sources_lack_is_refused(tmp_path: Path) -> None:
    base, sources = full(tmp_path, leave_out=["model.norm.weight"])
    write_full(tmp_path / "two", 2, base=base, start=START)
    message = f"{tmp_path}/one: has no tensor model.norm.weight; expected the tensors of {base}"
    assert refusal(tmp_path, "task_arithmetic", sources, base) == [message]


def test_what_else_the_sources_have_is_refused(tmp_path: Path) -> None:
    base, sources = full(tmp_path)
    extra = {**body(2), **head(2), "model.layers.1.up.weight": torch.ones(5, 4)}
    write_checkpoint(tmp_path / "two", extra, config=CLASSIFIER_CONFIG)
    (tmp_path / "two" / "precision.safetensors").unlink()
    message = f"{tmp_path}/two: has a tensor model.layers.1.up.weight that {base} has not; "
    assert refusal(tmp_path, "task_arithmetic", sources, base) == [message + "expected the same tensors in every input"]


def test_a_source_without_the_head_is_refused(tmp_path: Path) -> None:
    base, sources = full(tmp_path)
    write_full(tmp_path / "two", 2, base=base, start=START, leave_out=list(HEAD))
    assert refusal(tmp_path, "task_arithmetic", sources, base) == [
        f"{tmp_path}/two: has no tensor {name}; expected the tensors of {base}" for name in sorted(HEAD)
    ]


# --- what the output says ---------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("make", [full, lora])
def test_the_configuration_is_that_of_a_classifier(make: Any, kind: str, tmp_path: Path) -> None:
    base, sources = make(tmp_path, kind)
    result = run("task_arithmetic", sources, base, tmp_path / "out", space="full", dtype=None)
    assert read_json(tmp_path / "out" / "config.json") == CLASSIFIER_CONFIG
    assert not any(note.startswith("config.json") for note in result.report["tensors"]["notes"])
    start = load_file(tmp_path / "out" / FRESH_NAME)
    assert start.keys() == START.keys()
    assert all(torch.equal(start[name], START[name]) for name in START)
    assert "Its head tells animal, plant, stone, in this order." in (tmp_path / "out" / "README.md").read_text()


def test_a_number_of_labels_that_is_none_of_the_base_s_business(tmp_path: Path) -> None:
    base, sources = full(tmp_path)
    write_checkpoint(base, read_tensors(base), config={**BASE_CONFIG, "num_labels": 2})
    run("task_arithmetic", sources, base, tmp_path / "out", dtype=None)
    assert read_json(tmp_path / "out" / "config.json") == CLASSIFIER_CONFIG


@every_base
def test_a_merge_can_be_merged_further(kind: str, tmp_path: Path) -> None:
    base, sources = full(tmp_path, kind)
    run("gradient_matching", sources, base, tmp_path / "first")
    models = [{"model": str(tmp_path / "first"), "parameters": {"weight": 1.0}}]
    run("gradient_matching", [], base, tmp_path / "out", models=models)
    first, again = read_tensors(tmp_path / "first"), read_tensors(tmp_path / "out")
    assert first.keys() == again.keys()
    for name, tensor in first.items():
        assert_close(again[name], tensor, 1e-6)


def test_without_a_base_the_start_is_carried_on(tmp_path: Path) -> None:
    _, sources = full(tmp_path)
    run("linear", sources, None, tmp_path / "out")
    assert load_file(tmp_path / "out" / FRESH_NAME).keys() == START.keys()
    assert read_json(tmp_path / "out" / "config.json")["id2label"] == CLASSIFIER_CONFIG["id2label"]


def named(labels: tuple[str, ...]) -> dict[str, Any]:
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
    }


@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_labels_of_a_head_that_the_base_has_too(method: str, tmp_path: Path) -> None:
    """The base's are generic, or those of what it was trained for before; the sources decide what outputs mean."""
    for seed, name in enumerate(("base", *NAMES)):
        labels = named(("yes", "no", "maybe")) if name == "base" else {}
        config = {**CLASSIFIER_CONFIG, **(named(("LABEL_0", "LABEL_1", "LABEL_2")) if name == "one" else labels)}
        write_checkpoint(tmp_path / name, {**body(seed), **head(seed)}, config=config)
    report = run(method, [tmp_path / name for name in NAMES], tmp_path / "base", tmp_path / "out").report
    assert read_json(tmp_path / "out" / "config.json")["id2label"] == CLASSIFIER_CONFIG["id2label"]
    assert report["tensors"]["notes"] == [
        f"config.json: the labels of {tmp_path}/base are yes, no, maybe; the output has those of the sources"
    ]
    assert not (tmp_path / "out" / FRESH_NAME).exists()


# --- refusals ---------------------------------------------------------------------------------------------------------


@every_base
@pytest.mark.parametrize("make", [full, lora])
def test_heads_that_started_from_different_values(make: Any, kind: str, tmp_path: Path) -> None:
    base, sources = make(tmp_path, kind)
    write_initial(tmp_path / "two", head(8), base=base)
    assert refusal(tmp_path, "gradient_matching", sources, base, space="full") == [
        "score.bias, score.weight: the heads started from different values "
        f"({tmp_path}/one; {tmp_path}/two); train with one training.seed"
    ]
    for method in ("linear", "hessian_weighted"):
        report = run(method, sources, base, tmp_path / method, space="full").report
        assert any("averages them all the same" in note for note in report["tensors"]["notes"])
        assert not (tmp_path / method / FRESH_NAME).exists()


@pytest.mark.parametrize("kind", BASES)
@pytest.mark.parametrize("method", METHODS)
def test_full_classifiers_that_tell_no_start(method: str, kind: str, tmp_path: Path) -> None:
    """One line per source, not one per tensor."""
    base, sources = full(tmp_path, kind, start=None)
    messages = refusal(tmp_path, method, sources, base)
    assert len(messages) == 2
    for message, name in zip(messages, NAMES, strict=True):
        assert message.startswith(
            f"{tmp_path}/{name}: is a ToyForSequenceClassification, {base} a ToyForCausalLM, and "
        )
        assert f"expected {FRESH_NAME} beside a new head" in message
        other = "no base_model" if method in ("linear", "hessian_weighted") else "adapters in space: product"
        assert message.endswith(f"; or {other}")


def test_one_start_that_is_not_known(tmp_path: Path) -> None:
    base, sources = full(tmp_path)
    (tmp_path / "two" / FRESH_NAME).unlink()
    (message,) = refusal(tmp_path, "task_arithmetic", sources, base)
    assert message.startswith(f"score.bias, score.weight: stored whole by {tmp_path}/two, and {base} has nothing of")


@pytest.mark.parametrize("told", [None, {"labels": ["animal", "plant", "stone"]}])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_adapters_that_do_not_tell_their_class(method: str, told: dict[str, Any] | None, tmp_path: Path) -> None:
    base, sources = lora(tmp_path, told=told)
    (message,) = refusal(tmp_path, method, sources, base, space="full")
    assert message == (
        f"{tmp_path}/one, {tmp_path}/two: with a head that {base} has not (score.bias, score.weight); a full "
        "checkpoint says which class of model it is, and they do not, or differ in it; expected adapters or models "
        "that bayes-merge trained, or space: product, whose adapter loads into any class"
    )
    run(method, sources, base, tmp_path / "out", space="product")


def test_classes_that_differ(tmp_path: Path) -> None:
    base, sources = lora(tmp_path)
    write_lora(tmp_path / "two", 2, base=base, start=START, told={**TOLD, "architecture": "OtherForClassification"})
    assert "or differ in it" in refusal(tmp_path, "linear", sources, base, space="full")[0]


def test_tensors_beside_pretrained_model_and_head(tmp_path: Path) -> None:
    """An adapter that changes the language model's own head, among classifiers."""
    base, sources = lora(tmp_path)
    write_lora(tmp_path / "two", 2, base=base, start=None, trained={"lm_head.bias": torch.ones(6)}, told=None)
    (message,) = refusal(tmp_path, "task_arithmetic", sources, base, space="full")
    assert message == (
        f"{tmp_path}/one: with a head that {base} has not (score.bias, score.weight), beside tensors of lm_head., "
        "model.; expected one module, the pretrained model, with the head outside of it, as in the classes of "
        "transformers, in all sources; for adapters, use space: product"
    )


def test_names_without_a_module(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", {"up": torch.ones(5, 4)}, config=BASE_CONFIG)
    write_checkpoint(tmp_path / "one", {"up": torch.ones(5, 4), **head(1)}, config=CLASSIFIER_CONFIG)
    write_initial(tmp_path / "one", START)
    assert refusal(tmp_path, "task_arithmetic", [Classifier(tmp_path / "one", {})], base) == [
        f"{tmp_path}/one: has a tensor up that {base} has not; expected the same tensors in every input",
        f"{tmp_path}/one: has no tensor up.up; expected the tensors of {base}",
    ]


def test_a_start_for_what_the_base_has(tmp_path: Path) -> None:
    base, sources = full(tmp_path, base=None)
    write_base(tmp_path / "base", other=False, extra=head(3))
    messages = refusal(tmp_path, "task_arithmetic", sources, base)
    assert len(messages) == 2
    assert "started from values of its own" in messages[0]


@pytest.mark.parametrize("sidecar", [True, False])
def test_a_start_of_another_base(sidecar: bool, tmp_path: Path) -> None:
    """Without a sidecar the file of starting values is all that knows the base."""
    base, sources = full(tmp_path)
    write_base(tmp_path / "base", extra={"lm_head.more": torch.ones(2)})
    if not sidecar:
        for source in sources:
            (source.folder / "precision.safetensors").unlink()
    messages = refusal(tmp_path, "task_arithmetic", sources, base)
    assert len(messages) == 2
    for message, name in zip(messages, NAMES, strict=True):
        file = "precision.safetensors" if sidecar else FRESH_NAME
        assert message.startswith(f"{tmp_path}/{name}/{file}: belongs to a base with fingerprint blake2b-16:")


def test_adapters_on_models_without_a_base_model(tmp_path: Path) -> None:
    base, _ = lora(tmp_path)
    models = [f"{base}+{tmp_path}/{name}" for name in NAMES]
    messages = refusal(tmp_path, "linear", models, None)
    assert messages == [
        f"{model}: has a head that {model} has not (score.bias, score.weight); expected a base_model, the model that "
        "its adapter was trained on"
        for model in models
    ]
    run("linear", models, base, tmp_path / "out")
    assert sorted(read_tensors(tmp_path / "out")) == sorted({**body(0), **START})


def test_a_base_with_an_adapter_that_has_a_head(tmp_path: Path) -> None:
    base, (_, two) = full(tmp_path)
    write_lora(tmp_path / "lora", 3, base=base, start=START)
    content = recipe("task_arithmetic", [two], None, base_model=f"{base}+{tmp_path}/lora")
    (tmp_path / "two" / "precision.safetensors").unlink()
    messages = refusal(tmp_path, "task_arithmetic", [], None, **{k: content[k] for k in ("models", "base_model")})
    assert messages[0].startswith(f"base_model: {base}+{tmp_path}/lora has an adapter with a head that {base}")


def test_different_labels(tmp_path: Path) -> None:
    base, sources = full(tmp_path)
    write_full(
        tmp_path / "two", 2, base=base, start=START, config={**CLASSIFIER_CONFIG, **named(("stone", "plant", "animal"))}
    )
    for method in METHODS:
        (message,) = refusal(tmp_path, method, sources, base)
        assert "two: stone, plant, animal), so an output of one head means something else" in message


@pytest.mark.parametrize(
    "labels",
    [["a", "b"], {"0": "a", "2": "b"}, {"zero": "a"}, {"0": 1, "1": 2}, {}, "a", {"0": "LABEL_0", "1": "LABEL_1"}],
)
def test_labels_that_are_none(labels: object, tmp_path: Path) -> None:
    for seed, name in enumerate(("base", *NAMES)):
        config = {**CONFIG, "id2label": labels} if name == "two" else {**CONFIG, **named(("a", "b"))}
        write_checkpoint(tmp_path / name, body(seed), config=config)
    run("task_arithmetic", [tmp_path / name for name in NAMES], tmp_path / "base", tmp_path / "out")
    assert read_json(tmp_path / "out" / "config.json")["id2label"] == {"0": "a", "1": "b"}


def test_a_classifier_of_as_many_classes_as_token_types_is_not_tied_to_them(tmp_path: Path) -> None:
    """Full models without their start: the base's embedding of two rows is not its head."""
    config = {"architectures": ["ToyForMaskedLM"], "tie_word_embeddings": True, "vocab_size": 6}
    shapes = {"model.embed.weight": (6, 4), "model.type_embed.weight": (2, 4)}
    base = write_checkpoint(tmp_path / "base", random_tensors(0, shapes), config=config)
    for seed, name in enumerate(NAMES, start=1):
        tensors = random_tensors(seed, {**shapes, "score.weight": (2, 4)})
        write_checkpoint(tmp_path / name, tensors, config={**config, "architectures": ["ToyForClassification"]})
    sources = [Classifier(tmp_path / name, {}) for name in NAMES]
    messages = refusal(tmp_path, "task_arithmetic", sources, base)
    assert all("1 tensors are in one of them only: score.weight" in message for message in messages)


def test_an_adapter_of_the_pretrained_model_alone_on_a_model_with_a_head(tmp_path: Path) -> None:
    """Names may lack the module in the base, not in the adapter."""
    base, sources = lora(tmp_path)
    (tmp_path / "two" / "precision.safetensors").unlink()
    drawn = random_tensors(3, {"a": (2, 4), "b": (5, 2)})
    write_adapter(tmp_path / "two", {"layers.0.up": (drawn["a"], drawn["b"])}, saved=head(2), told=TOLD)
    write_initial(tmp_path / "two", START)
    messages = refusal(tmp_path, "task_arithmetic", sources, base, space="full")
    assert messages[0].startswith(f"{tmp_path}/two: adapts layers.0.up, but {base} has no such tensor")
