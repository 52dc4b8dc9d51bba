"""Classifiers of transformers and PEFT, as training leaves them, through a merge and back into their libraries."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.checkpoint.initial import FRESH_NAME
from mergekit_bayes.errors import PlanError
from mergekit_bayes.merge.run import merge
from mergekit_bayes.recipe.adapter import AdapterSpec
from tests.conftest import TinyCheckpoints
from tests.merge.adapter_builders import quiet
from tests.model.builders import LABELS, load, logits, trained, with_tokenizer

WEIGHTS = (0.75, 0.5)
TARGETS = {"bert_masked_lm": ("query", "value"), "bert_alone": ("query", "value"), "llama": ("q_proj", "v_proj")}
DROPPED = {"bert_masked_lm": 5, "bert_alone": 0, "llama": 1}
"""Tensors of the base's own head."""

Made = Callable[..., tuple[Path, list[Path]]]

every_base = pytest.mark.parametrize("name", TARGETS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Made:
    """`made("llama", adapters=True)`: a base without a classification head, and two classifiers trained from it."""
    import transformers

    root = tmp_path_factory.mktemp("classifiers")
    bases: dict[str, Path] = {}
    found: dict[tuple[str, bool], list[Path]] = {}

    def base_of(name: str) -> Path:
        plain = tiny_checkpoint("bert_masked_lm" if name == "bert_alone" else name)
        if name == "bert_alone":
            inner = transformers.AutoModelForMaskedLM.from_pretrained(plain).bert
            plain = root / "plain"
            inner.save_pretrained(plain)
        return with_tokenizer(plain, root / name, pad=True)

    def make(name: str, *, adapters: bool) -> tuple[Path, list[Path]]:
        if name not in bases:
            bases[name] = base_of(name)
        if (name, adapters) not in found:
            spec = AdapterSpec(r=4, target_modules=TARGETS[name]) if adapters else None
            kind = "lora" if adapters else "full"
            found[name, adapters] = [
                trained(root / f"{name}-{kind}-{seed}", load(bases[name], spec, labels=LABELS), seed=seed)
                for seed in (1, 2)
            ]
        return bases[name], found[name, adapters]

    return make


def run(method: str, base: Path | None, sources: Sequence[Path], out: Path, **extra: Any) -> dict[str, Any]:
    models = [{"model": str(s), "parameters": {"weight": w}} for s, w in zip(sources, WEIGHTS, strict=True)]
    content = {"merge_method": method, "models": models, **extra}
    if base is not None:
        content["base_model"] = str(base)
    return dict(merge(content, out, threads=1).report)


def started(base: Path) -> Any:
    """The base as a classifier whose head is where training starts."""
    return load(base, None, labels=LABELS).model


def adapted(base: Path, adapter: Path) -> Any:
    """The adapter on the base with some head or other, as users load it."""
    import peft

    with quiet():
        return peft.PeftModel.from_pretrained(started(base), adapter).eval()


def loaded(folder: Path) -> Any:
    """A full classifier; nothing may be missing or left over."""
    import transformers

    model, info = transformers.AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.id2label == dict(enumerate(LABELS))
    return model.eval()


def dense_sum(base: Path, models: Sequence[Any]) -> Any:
    """The started base plus the weighted task vectors of full models, in float64 and rounded once."""
    result = started(base)
    own = dict(result.named_parameters())
    start = {name: parameter.detach().double() for name, parameter in own.items()}
    total = copy.deepcopy(start)
    for model, weight in zip(models, WEIGHTS, strict=True):
        for name, parameter in model.named_parameters():
            total[name] += weight * (parameter.detach().double() - start[name])
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(total[name])
    return result


def assert_same_logits(seen: Any, wanted: Any) -> None:
    torch.testing.assert_close(logits(seen), logits(wanted), rtol=0, atol=1e-6)


@every_base
def test_merged_adapters_give_the_logits_of_the_dense_merge(name: str, made: Made, tmp_path: Path) -> None:
    import peft

    base, sources = made(name, adapters=True)
    run("task_arithmetic", base, sources, tmp_path / "adapter")
    report = run("task_arithmetic", base, sources, tmp_path / "full", space="full")
    with quiet():
        wanted = dense_sum(base, [adapted(base, source).merge_and_unload() for source in sources])
        auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=len(LABELS))
    assert float((logits(started(base)) - logits(wanted)).abs().max()) > 1e-3
    assert_same_logits(adapted(base, tmp_path / "adapter"), wanted)
    auto.config.pad_token_id = wanted.config.pad_token_id  # of a decoder, which PEFT does not know
    assert_same_logits(auto.eval(), wanted)
    full = loaded(tmp_path / "full")
    assert_same_logits(full, wanted)
    assert full.config.pad_token_id == wanted.config.pad_token_id
    assert len(report["tensors"]["dropped"]) == DROPPED[name]


@every_base
def test_merged_full_models_give_the_logits_of_the_dense_merge(name: str, made: Made, tmp_path: Path) -> None:
    import transformers

    base, sources = made(name, adapters=False)
    report = run("task_arithmetic", base, sources, tmp_path / "out")
    assert_same_logits(loaded(tmp_path / "out"), dense_sum(base, [loaded(source) for source in sources]))
    assert len(report["tensors"]["dropped"]) == DROPPED[name]
    told = transformers.pipeline("text-classification", model=str(tmp_path / "out"))("w1 w2")
    assert told[0]["label"] in LABELS


@every_base
@pytest.mark.parametrize("method", ["gradient_matching", "posterior", "hessian_weighted"])
def test_with_precisions_adapter_and_checkpoint_agree(method: str, name: str, made: Made, tmp_path: Path) -> None:
    base, sources = made(name, adapters=True)
    prior = {"precision": {"prior": 0.5}}
    run(method, base, sources, tmp_path / "adapter", output={"rank": 16}, **prior)
    run(method, base, sources, tmp_path / "full", space="full", **prior)
    assert_same_logits(adapted(base, tmp_path / "adapter"), loaded(tmp_path / "full"))


def test_a_merged_classifier_is_merged_again_with_a_third(made: Made, tmp_path: Path) -> None:
    base, sources = made("bert_masked_lm", adapters=True)
    third = trained(tmp_path / "third", load(base, AdapterSpec(target_modules=("key",)), labels=LABELS), seed=3)
    run("task_arithmetic", base, sources, tmp_path / "first")
    run("task_arithmetic", base, [tmp_path / "first", third], tmp_path / "out")
    with quiet():
        parts = [adapted(base, folder).merge_and_unload() for folder in (tmp_path / "first", third)]
    assert_same_logits(adapted(base, tmp_path / "out"), dense_sum(base, parts))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "model", "sizes", "dropped"),
    [
        ("DistilBertConfig", "DistilBertForMaskedLM", {}, 5),
        ("DebertaV2Config", "DebertaV2Model", {}, 0),
        ("ModernBertConfig", "ModernBertForMaskedLM", {"cls_token_id": 1, "sep_token_id": 2}, 1),
        ("GPT2Config", "GPT2Model", {"bos_token_id": 1, "eos_token_id": 2}, 0),
    ],
)
def test_other_architectures(config: str, model: str, sizes: dict[str, int], dropped: int, tmp_path: Path) -> None:
    """Heads of several layers, parts of the base's head that are kept, names that lack the outermost module."""
    from tests.model.test_head import other_architecture

    base = other_architecture(config, model, tmp_path / "base", pad_token_id=0, **sizes)
    for kind, spec in (("lora", AdapterSpec(r=4)), ("full", None)):
        sources = [trained(tmp_path / f"{kind}{seed}", load(base, spec, labels=LABELS), seed=seed) for seed in (1, 2)]
        report = run("task_arithmetic", base, sources, tmp_path / kind, space="full")
        assert len(report["tensors"]["dropped"]) == dropped
        with quiet():
            parts = [loaded(s) if spec is None else adapted(base, s).merge_and_unload() for s in sources]
        assert_same_logits(loaded(tmp_path / kind), dense_sum(base, parts))
        if spec is not None:
            run("task_arithmetic", base, sources, tmp_path / "adapter")
            assert_same_logits(adapted(base, tmp_path / "adapter"), loaded(tmp_path / kind))


@pytest.mark.slow
def test_two_runs_are_merged_and_loaded(tmp_path: Path, made: Made) -> None:
    """From a base without a head to a merged classifier, by two recipes and a third."""
    import peft
    import transformers

    from tests.finetune.runs import recipe
    from tests.finetune.runs import run as train

    base, _ = made("bert_masked_lm", adapters=True)
    common = {"task": "sequence_classification", "adapter": {"r": 4, "target_modules": ["query", "value"]}}
    runs = [("one", "labelled", 0), ("two", "other labelled", 0), ("three", "other labelled", 1)]
    for name, rows, seed in runs:
        content = recipe(base, data={"train": rows, "eval": None}, training={"seed": seed}, **common)
        train(content, tmp_path / name)
        assert (tmp_path / name / FRESH_NAME).exists()
    sources = [tmp_path / "one", tmp_path / "two"]
    prior = {"precision": {"prior": 1.0}}
    run("gradient_matching", base, sources, tmp_path / "adapter", output={"rank": 16}, **prior)
    run("gradient_matching", base, sources, tmp_path / "full", space="full", **prior)

    full = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "full").eval()
    assert full.config.id2label == dict(enumerate(LABELS))
    with quiet():
        auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3).eval()
    for model in (adapted(base, tmp_path / "adapter"), auto):
        assert_same_logits(model, full)
    for name in ("one", "two"):
        assert float((logits(adapted(base, tmp_path / name)) - logits(full)).abs().max()) > 1e-5
    with pytest.raises(PlanError, match=r"started from different values .*; train with one training\.seed"):
        run("gradient_matching", base, [tmp_path / "one", tmp_path / "three"], tmp_path / "out", **prior)
