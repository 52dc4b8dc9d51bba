"""Adapters that cannot be merged: every reason at once, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.run import merge
from tests.merge.adapter_problem import SHAPES, Make, Source, write_base, write_source, write_sources
from tests.merge.builders import (
    random_tensors,
    read_json,
    snapshot,
    write_adapter,
    write_checkpoint,
    write_precisions,
)

Recipe = dict[str, Any]


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    base = write_base(tmp_path / "base")
    found = write_sources(tmp_path, Make(facts=None), Make(facts=None))
    for source in found:
        write_precisions(source.folder, source.raw_precisions, base=base, prior_precision=0.5, adapter_scaling=1.0)
    return found


def recipe(root: Path, method: str = "gradient_matching", **extra: Any) -> Recipe:
    models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    prior = {"precision": {"prior": 0.25}} if method == "gradient_matching" else {}
    return {"merge_method": method, "base_model": str(root / "base"), "models": models, **prior, **extra}


def refuse(root: Path, content: Recipe, *messages: str) -> None:
    """The merge is refused with all of these messages, and nothing is written."""
    before = snapshot(root)
    with pytest.raises(MergekitBayesError) as caught:
        merge(content, root / "out")
    for message in messages:
        assert re.search(message, str(caught.value)), f"{message!r} is not in:\n{caught.value}"
    assert snapshot(root) == before


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**read_json(path), **changes}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_is_refused_below_is_accepted_without_the_fault(sources: list[Source], tmp_path: Path) -> None:
    for space in ("product", "factor", "full"):
        for method in ("gradient_matching", "task_arithmetic", "hessian_weighted"):
            merge(recipe(tmp_path, method, space=space), tmp_path / f"{space}-{method}", threads=1)


# --- the wrong base ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["product", "full"])
@pytest.mark.parametrize("method", ["gradient_matching", "task_arithmetic", "linear"])
def test_an_adapter_of_other_shapes_or_modules(method: str, space: str, sources: list[Source], tmp_path: Path) -> None:
    shapes = {"layers.0.up": (7, 6), "layers.0.gate": (7, 5)}
    write_source(tmp_path / "two", 7, Make(modules=tuple(shapes)), shapes=shapes)
    refuse(
        tmp_path,
        recipe(tmp_path, method, space=space),
        r"two: layers\.0\.up updates a weight of shape \(7, 6\), but layers\.0\.up\.weight is \(7, 5\)",
        r"two: adapts layers\.0\.gate, but .*base has no such tensor",
    )


@pytest.mark.parametrize("space", ["product", "factor", "full"])
@pytest.mark.parametrize("method", ["gradient_matching", "task_arithmetic", "hessian_weighted"])
def test_a_sidecar_that_names_another_base(method: str, space: str, sources: list[Source], tmp_path: Path) -> None:
    other = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    write_checkpoint(tmp_path / "base", random_tensors(9, other))
    message = r"(one|two): belongs to a base with fingerprint blake2b-16:\w+; expected blake2b-16:\w+, that of .*base"
    refuse(tmp_path, recipe(tmp_path, method, space=space), message)


@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_a_merged_adapter_remembers_its_base(space: str, sources: list[Source], tmp_path: Path) -> None:
    merge(recipe(tmp_path, "task_arithmetic"), tmp_path / "merged", threads=1)
    shutil.rmtree(tmp_path / "one")
    shutil.move(tmp_path / "merged", tmp_path / "one")
    (tmp_path / "two" / "precision.safetensors").unlink()
    write_checkpoint(tmp_path / "base", random_tensors(9, {f"{name}.weight": shape for name, shape in SHAPES.items()}))
    refuse(tmp_path, recipe(tmp_path, "task_arithmetic", space=space), r"one: belongs to a base with fingerprint")


def test_adapters_of_different_bases_without_a_base_to_compare_with(sources: list[Source], tmp_path: Path) -> None:
    content = recipe(tmp_path, "linear")
    del content["base_model"]
    merge(content, tmp_path / "one base", threads=1)
    other = write_checkpoint(
        tmp_path / "other", random_tensors(9, {f"{name}.weight": shape for name, shape in SHAPES.items()})
    )
    write_precisions(tmp_path / "two", sources[1].raw_precisions, base=other)
    refuse(tmp_path, content, r"belong to different bases \(.*one: blake2b-16:\w+.*\); expected adapters of one base")
    # what the first merge knew of its base went into its header
    content["models"][0] = {"model": str(tmp_path / "one base"), "parameters": {"weight": 1.0}}
    refuse(tmp_path, content, r"belong to different bases \(.*one base: blake2b-16:\w+")


def test_an_adapter_with_an_embedding_of_its_own(tmp_path: Path) -> None:
    shapes = {"embed.weight": (6, 4)}
    base = write_checkpoint(tmp_path / "base", random_tensors(0, shapes))
    factors = random_tensors(1, {"a": (2, 6), "b": (4, 2)})
    for name in ("one", "two"):
        write_adapter(tmp_path / name, {"embed": (factors["a"], factors["b"])}, embeddings=["embed"], base=base)
    copy = load_file(base / "model.safetensors")["embed.weight"]
    key = "base_model.model.embed.base_layer.weight"
    edit_tensors(tmp_path / "one", lambda tensors: tensors.update({key: copy.clone()}))
    merge(recipe(tmp_path, "task_arithmetic"), tmp_path / "fine")
    edit_tensors(tmp_path / "two", lambda tensors: tensors.update({key: copy + 1}))
    for space in ("product", "full"):
        refuse(tmp_path, recipe(tmp_path, "task_arithmetic", space=space), r"two: brings its own embed.*resized\?")


def test_adapters_on_models_of_their_own(sources: list[Source], tmp_path: Path) -> None:
    other = write_checkpoint(
        tmp_path / "other", random_tensors(9, {f"{name}.weight": shape for name, shape in SHAPES.items()})
    )
    content = recipe(tmp_path, "task_arithmetic", space="product")
    content["models"][1]["model"] = f"{tmp_path / 'base'}+{tmp_path / 'two'}"
    merge(content, tmp_path / "fine", threads=1)
    (tmp_path / "two" / "precision.safetensors").unlink()
    content["models"][1]["model"] = f"{other}+{tmp_path / 'two'}"
    refuse(tmp_path, content, r"two: its adapter is on .*other, which differs from .*base.*use space: full")
    del content["base_model"]
    content["merge_method"] = "linear"
    content["models"][0]["model"] = f"{tmp_path / 'base'}+{tmp_path / 'one'}"
    refuse(tmp_path, content, r"two: its adapter is on .*other, which differs from .*base")


def test_a_base_with_an_adapter(sources: list[Source], tmp_path: Path) -> None:
    content = recipe(tmp_path, "task_arithmetic", base_model=f"{tmp_path / 'base'}+{tmp_path / 'one'}")
    content["models"] = content["models"][1:]
    refuse(tmp_path, content, r"base_model: .* is a model with an adapter.*expected the model alone")


# --- the wrong sidecar ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_the_sidecar_of_another_adapter(space: str, sources: list[Source], tmp_path: Path) -> None:
    shutil.copy(tmp_path / "one" / "precision.safetensors", tmp_path / "two" / "precision.safetensors")
    message = r"two/precision\.safetensors: describes weights with fingerprint .*; expected .*that of the weights"
    refuse(tmp_path, recipe(tmp_path, space=space), message)


def test_a_sidecar_of_other_modules_and_shapes(sources: list[Source], tmp_path: Path) -> None:
    raw = sources[1].raw_precisions
    gone, longer, *_ = raw
    changed = {name: precision for name, precision in raw.items() if name != gone}
    write_precisions(tmp_path / "two", {**changed, longer: torch.ones(9, 2), "extra": torch.ones(1)})
    refuse(
        tmp_path,
        recipe(tmp_path),
        rf"holds no precision for {re.escape(gone)}",
        r"holds precisions for extra",
        rf"precision of {re.escape(longer)} has shape \(9, 2\); expected \(7, 2\)",
    )


@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_a_scaling_changed_since_the_precisions_were_estimated(
    space: str, sources: list[Source], tmp_path: Path
) -> None:
    edit_config(tmp_path / "two", lora_alpha=1)
    message = r"two/precision.*factors with scaling 1; 3 modules have another \(layers\.0\.down: 0\.5\)"
    refuse(tmp_path, recipe(tmp_path, space=space), message)
    merge(recipe(tmp_path, "task_arithmetic", space="product"), tmp_path / "out", threads=1)


@pytest.mark.parametrize("method", ["gradient_matching", "hessian_weighted"])
def test_no_precision_where_the_method_needs_one(method: str, sources: list[Source], tmp_path: Path) -> None:
    (tmp_path / "two" / "precision.safetensors").unlink()
    for space in ("product", "factor", "full"):
        refuse(tmp_path, recipe(tmp_path, method, space=space), rf"two: no precision.*; {method} needs one")


def test_a_prior_that_belongs_to_the_factors_is_not_one_of_dw(sources: list[Source], tmp_path: Path) -> None:
    content = recipe(tmp_path)
    del content["precision"]
    refuse(tmp_path, content, r"gradient_matching needs the prior precision S_0.*one: 0\.5.*belong to the LoRA factors")
    merge({**content, "space": "factor"}, tmp_path / "out", threads=1)


# --- adapters that are no plain LoRA, or do not go together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora is True.*DoRA rescales"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"bias": "all"}, "bias is .*all"),
        ({"peft_type": "IA3"}, "peft_type is .*IA3"),
        ({"target_parameters": ["experts"]}, "target_parameters"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is .*pissa"),
        ({"r": 3}, "its rank is 2; expected 3"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
    ],
)
@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_variants_of_lora(
    change: dict[str, object], message: str, space: str, sources: list[Source], tmp_path: Path
) -> None:
    edit_config(tmp_path / "two", **change)
    refuse(tmp_path, recipe(tmp_path, "task_arithmetic", space=space), rf"two.*{message}")


@pytest.mark.parametrize("space", ["product", "factor"])
@pytest.mark.parametrize("method", ["gradient_matching", "hessian_weighted"])
def test_a_scaling_of_zero_with_precisions(method: str, space: str, sources: list[Source], tmp_path: Path) -> None:
    edit_config(tmp_path / "two", lora_alpha=0)
    write_precisions(tmp_path / "two", sources[1].raw_precisions)
    refuse(tmp_path, recipe(tmp_path, method, space=space), r"two: layers\.0\.up has scaling 0 \(lora_alpha\)")


@pytest.mark.parametrize("space", ["product", "factor"])
def test_a_scaling_of_zero_without_precisions_adds_nothing(space: str, sources: list[Source], tmp_path: Path) -> None:
    edit_config(tmp_path / "two", lora_alpha=0)
    merge(recipe(tmp_path, "task_arithmetic", space=space), tmp_path / "out", threads=1)


def test_factor_space_needs_the_same_modules_and_ranks(sources: list[Source], tmp_path: Path) -> None:
    write_source(tmp_path / "two", 8, Make(rank=3, facts=None, modules=("layers.0.up", "layers.0.down")))
    refuse(
        tmp_path,
        recipe(tmp_path, "task_arithmetic", space="factor"),
        r"layers\.0\.up: rank 3 in .*two, 2 in .*one; factor space needs equal ranks, use space: product",
        r"layers\.1\.up: not adapted by .*two; factor space needs it in all, use space: product",
    )
    merge(recipe(tmp_path, "task_arithmetic", space="product"), tmp_path / "out", threads=1)


def test_updates_of_different_shapes_without_a_base_to_compare_with(sources: list[Source], tmp_path: Path) -> None:
    write_source(tmp_path / "two", 8, Make(facts=None, modules=("layers.0.up",)), shapes={"layers.0.up": (5, 7)})
    content = recipe(tmp_path, "linear")
    del content["base_model"]
    refuse(tmp_path, content, r"layers\.0\.up: the update is 5 x 7 in .*two, 7 x 5 in .*one")


def test_an_embedding_in_one_and_a_linear_layer_in_the_other(sources: list[Source], tmp_path: Path) -> None:
    write_adapter(tmp_path / "two", dict(sources[1].factors), embeddings=["layers.0.up"])
    content = recipe(tmp_path, "linear")
    del content["base_model"]
    refuse(tmp_path, content, r"layers\.0\.up: adapted as embedding in .*two, as linear in .*one")


def test_a_module_adapted_by_one_and_stored_whole_by_another(sources: list[Source], tmp_path: Path) -> None:
    whole = {"layers.0.up.weight": torch.zeros(7, 5)}
    others = {name: pair for name, pair in sources[1].factors.items() if name != "layers.0.up"}
    write_adapter(tmp_path / "two", others, saved=whole)
    message = r"layers\.0\.up: adapted by .*one and stored whole by .*two.*use space: full"
    for space in ("product", "factor"):
        refuse(tmp_path, recipe(tmp_path, "task_arithmetic", space=space), message)
    merge(recipe(tmp_path, "task_arithmetic", space="full"), tmp_path / "out", threads=1)


def test_what_is_stored_whole_needs_the_base_where_one_leaves_it_alone(sources: list[Source], tmp_path: Path) -> None:
    head = {"score.weight": torch.ones(3, 5)}
    write_adapter(tmp_path / "two", dict(sources[1].factors), saved=head)
    content = recipe(tmp_path, "linear")
    refuse(tmp_path, content, r"score\.weight: stored whole by an adapter.*\(.*one leave it alone\)")
    write_adapter(tmp_path / "one", dict(sources[0].factors), saved=head)
    refuse(tmp_path, recipe(tmp_path, "task_arithmetic"), r"score\.weight: stored whole .*base_model that has them")
    class_unknown = r"one, .*two: with a head that .*base has not \(score\.weight\).*which class.*space: product"
    refuse(tmp_path, recipe(tmp_path, "linear", space="full"), class_unknown)
    merge(content, tmp_path / "out", threads=1)  # a new head that every adapter brings along needs no base
    write_adapter(tmp_path / "one", dict(sources[0].factors), saved={"score.weight": torch.ones(2, 5)})
    refuse(tmp_path, content, r"score\.weight: shape \(3, 5\) in .*two; expected \(2, 5\)")


def test_factors_of_different_dtypes(sources: list[Source], tmp_path: Path) -> None:
    def narrow(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: tensor.bfloat16() for name, tensor in tensors.items()})

    edit_tensors(tmp_path / "two", narrow)
    refuse(tmp_path, recipe(tmp_path, "linear"), r"layers\.0\.up: dtype F32 .*BF16 in .*two.*`out_dtype`")
    merge(recipe(tmp_path, "linear", out_dtype="float32"), tmp_path / "out", threads=1)


@pytest.mark.parametrize("space", ["product", "factor"])
def test_a_full_model_among_adapters(space: str, sources: list[Source], tmp_path: Path) -> None:
    content = recipe(tmp_path, "linear", space=space)
    content["models"].append({"model": str(tmp_path / "base"), "parameters": {"weight": 1.0}})
    refuse(tmp_path, content, rf"{space} merges adapters, but .*base is a full model; expected adapters, or full")


def test_an_adapter_without_tensors(sources: list[Source], tmp_path: Path) -> None:
    edit_tensors(tmp_path / "two", lambda tensors: tensors.clear())
    refuse(tmp_path, recipe(tmp_path, "linear"), r"two.*holds no tensors; expected LoRA factors")


def test_everything_is_said_at_once(sources: list[Source], tmp_path: Path) -> None:
    edit_config(tmp_path / "one", use_dora=True)
    edit_config(tmp_path / "two", bias="all", lora_bias=True)
    refuse(tmp_path, recipe(tmp_path), r"one.*use_dora", r"two.*lora_bias", r"two.*bias is")
