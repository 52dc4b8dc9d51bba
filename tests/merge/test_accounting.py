"""Every tensor of every input is merged, copied, tied or refused: nothing is dropped, nothing is made up."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.run import MergeResult, merge
from tests.merge.builders import (
    CONFIG,
    random_precisions,
    random_tensors,
    read_json,
    read_precisions,
    read_tensors,
    snapshot,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import assert_one_rounding, merge_tensor

EMBED, HEAD, NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
SHAPES: Mapping[str, tuple[int, ...]] = {EMBED: (6, 4), HEAD: (6, 4), NORM: (4,)}
TIED = {key: shape for key, shape in SHAPES.items() if key != HEAD}
IDS = torch.arange(5)


def config(*, tied: bool) -> dict[str, Any]:
    return {**CONFIG, "tie_word_embeddings": tied}


def write_model(root: Path, name: str, seed: int, *, tied: bool = False, precisions: bool = False) -> dict[str, Tensor]:
    """A model with an output head, stored or tied; returns its tensors as stored."""
    shapes = TIED if tied else SHAPES
    tensors = random_tensors(seed, shapes)
    write_checkpoint(root / name, tensors, config=config(tied=tied))
    if precisions:
        own = random_precisions(seed + 10, shapes, above=0.5)
        write_precisions(root / name, own, prior_precision=0.5, num_examples=10)
    return tensors


def recipe(root: Path, method: str = "task_arithmetic", **extra: object) -> dict[str, Any]:
    models = [{"model": str(root / name), "parameters": {"weight": w}} for name, w in (("one", 0.75), ("two", 0.5))]
    return {"merge_method": method, "base_model": str(root / "base"), "models": models, **extra}


def run(root: Path, **extra: Any) -> MergeResult:
    return merge(recipe(root, **extra), root / "out", threads=1)


def refusal(root: Path, **extra: Any) -> str:
    """The message of a merge that is refused before anything is written."""
    before = snapshot(root)
    with pytest.raises(MergekitBayesError) as caught:
        run(root, **extra)
    assert snapshot(root) == before
    return str(caught.value)


# --- output heads ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base_tied", [False, True])
@pytest.mark.parametrize("sources_tied", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching", "hessian_weighted"])
def test_heads_are_tied_only_where_every_input_ties_them(
    method: str, base_tied: bool, sources_tied: tuple[bool, bool], tmp_path: Path
) -> None:
    with_precisions = method != "task_arithmetic"
    tensors = [write_model(tmp_path, "base", 0, tied=base_tied, precisions=with_precisions)]
    for seed, (name, tied) in enumerate(zip(("one", "two"), sources_tied, strict=True), start=1):
        tensors.append(write_model(tmp_path, name, seed, tied=tied, precisions=with_precisions))
    result = run(tmp_path, method=method)

    everywhere = base_tied and all(sources_tied)
    written = read_tensors(tmp_path / "out")
    assert sorted(written) == sorted(TIED if everywhere else SHAPES)
    assert read_json(tmp_path / "out" / "config.json")["tie_word_embeddings"] is everywhere
    mixed = not everywhere and (base_tied or any(sources_tied))
    assert any(f"{HEAD}: tied to {EMBED}" in note for note in result.report["tensors"]["notes"]) is mixed

    precisions = [read_precisions(tmp_path / name) for name in ("base", "one", "two")]
    for name in written:
        means = [own.get(name, own[EMBED]) for own in tensors]
        used = [own.get(name, own[EMBED]) if own else 1.0 for own in precisions]
        # in a shared space of the base's prior the sources' own share, 0.5, is exchanged for the base's precision
        if method == "gradient_matching":
            used[1:] = [own - 0.5 + used[0] for own in used[1:]]
        pairs = list(zip(means, used, strict=True))
        wanted = merge_tensor(method, pairs[0], pairs[1:], (0.75, 0.5))
        assert_one_rounding(written[name], wanted.mean)


def test_a_tied_head_without_precision_has_the_prior_of_the_head_not_of_the_embedding(tmp_path: Path) -> None:
    base = write_model(tmp_path, "base", 0, precisions=True)
    one, two = (write_model(tmp_path, name, seed, tied=True) for seed, name in enumerate(("one", "two"), start=1))
    plan = recipe(tmp_path, "posterior")
    plan["models"][0]["precision"] = 2.0
    merge(plan, tmp_path / "out")
    prior = read_precisions(tmp_path / "base")[HEAD]
    wanted = merge_tensor("posterior", (base[HEAD], prior), [(one[EMBED], 2.0), (two[EMBED], prior)], (0.75, 0.5))
    assert_one_rounding(read_tensors(tmp_path / "out")[HEAD], wanted.mean)
    assert_one_rounding(read_precisions(tmp_path / "out")[HEAD], wanted.precision)


def test_a_head_is_not_tied_where_the_configuration_says_it_is_not(tmp_path: Path) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        write_model(tmp_path, name, seed)
    write_checkpoint(tmp_path / "two", random_tensors(2, TIED), config=config(tied=False))
    message = refusal(tmp_path)
    assert message == f"{tmp_path}/two: has no tensor lm_head.weight; expected the tensors of {tmp_path}/base"


def test_a_head_that_could_be_tied_to_two_embeddings_is_missing(tmp_path: Path) -> None:
    extra = {"encoder.word_embeddings.weight": (6, 4)}
    for seed, name in enumerate(("base", "one")):
        write_checkpoint(tmp_path / name, random_tensors(seed, {**SHAPES, **extra}), config=config(tied=True))
    write_checkpoint(tmp_path / "two", random_tensors(2, {**TIED, **extra}), config=config(tied=True))
    assert "two: has no tensor lm_head.weight" in refusal(tmp_path)


@pytest.mark.parametrize("where", ["text_config", "top"])
def test_nested_configurations_are_untied_too(where: str, tmp_path: Path) -> None:
    nested = {**CONFIG, "text_config": {"tie_word_embeddings": True}}
    if where == "text_config":
        del nested["tie_word_embeddings"]
    else:
        nested["tie_word_embeddings"] = True
    write_checkpoint(tmp_path / "base", random_tensors(0, TIED), config=nested)
    write_model(tmp_path, "one", 1)
    write_model(tmp_path, "two", 2)
    run(tmp_path)
    written = read_json(tmp_path / "out" / "config.json")
    assert written["tie_word_embeddings"] is False
    assert written["text_config"] == {"tie_word_embeddings": False}


# --- buffers --------------------------------------------------------------------------------------------------------


def write_three(root: Path, extra: Callable[[str], Mapping[str, Tensor]]) -> None:
    """Base and two sources with `extra(name)` beside their weights."""
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(root / name, {**random_tensors(seed, SHAPES), **extra(name)})


BUFFERS = {
    "int64": torch.arange(5),
    "int32": torch.arange(5, dtype=torch.int32),
    "int8": torch.arange(5, dtype=torch.int8),
    "uint8": torch.arange(5, dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(7),
    "empty": torch.zeros((0, 3), dtype=torch.int64),
}


@pytest.mark.parametrize("buffer", BUFFERS.values(), ids=BUFFERS)
def test_tensors_that_are_no_weights_are_copied(buffer: Tensor, tmp_path: Path) -> None:
    write_three(tmp_path, lambda name: {"model.buffer": buffer})
    report = run(tmp_path, out_dtype="bfloat16").report
    written = read_tensors(tmp_path / "out")["model.buffer"]
    assert written.dtype == buffer.dtype
    assert torch.equal(written, buffer)
    assert "is not a weight" in report["tensors"]["copied"]["model.buffer"]


def test_buffers_that_disagree_are_refused(tmp_path: Path) -> None:
    write_three(tmp_path, lambda name: {"model.buffer": IDS + (name == "two")})
    message = refusal(tmp_path)
    assert "model.buffer: I64 is not a weight and is copied" in message
    assert f"{tmp_path}/two holds other values than {tmp_path}/base/model.safetensors" in message
    assert "expected the same bytes in every input" in message


@pytest.mark.parametrize("kind", [torch.complex64, torch.uint16])
def test_rare_dtypes_are_copied_or_refused_by_name(kind: torch.dtype, tmp_path: Path) -> None:
    values = torch.arange(4).to(kind)
    write_three(tmp_path, lambda name: {"model.buffer": values})
    try:
        run(tmp_path)
    except MergekitBayesError as error:
        assert "model.buffer" in str(error)  # noqa: PT017  (either outcome is right, silence is not)
    else:
        assert torch.equal(read_tensors(tmp_path / "out")["model.buffer"].view(torch.uint8), values.view(torch.uint8))


# --- disagreements --------------------------------------------------------------------------------------------------


def test_all_disagreements_are_listed_at_once(tmp_path: Path) -> None:
    base = {**random_tensors(0, SHAPES), "a": torch.zeros(3), "b": torch.zeros(2, 2), "ids": IDS}
    write_checkpoint(tmp_path / "base", base)
    one = {**base, "a": torch.zeros(4), "b": torch.zeros(2, 2, dtype=torch.int8)}
    write_checkpoint(tmp_path / "one", one)
    write_checkpoint(tmp_path / "two", {**base, "b": torch.zeros(2, 3), "ids": IDS.int()})
    lines = refusal(tmp_path).splitlines()
    root = str(tmp_path)
    assert lines == [
        f"a: shape (4,) in {root}/one, (3,) in {root}/base; expected equal shapes",
        f"b: dtype I8 in {root}/one, F32 in {root}/base; "
        "expected the same dtype (weights are never cast from or to integers)",
        f"b: shape (2, 3) in {root}/two, (2, 2) in {root}/base; expected equal shapes",
        f"ids: dtype I32 in {root}/two, I64 in {root}/base; "
        "expected the same dtype (weights are never cast from or to integers)",
    ]


def test_all_missing_and_extra_tensors_are_listed_at_once(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", random_tensors(0, {"a": (2,), "b": (2,), "c": (2,)}))
    write_checkpoint(tmp_path / "one", random_tensors(1, {"a": (2,), "c": (2,), "x": (2,)}))
    write_checkpoint(tmp_path / "two", random_tensors(2, {"a": (2,), "b": (2,), "y": (2,)}))
    root = str(tmp_path)
    assert refusal(tmp_path).splitlines() == [
        f"{root}/one: has no tensor b; expected the tensors of {root}/base",
        f"{root}/two: has no tensor c; expected the tensors of {root}/base",
        f"{root}/one: has a tensor x that {root}/base has not; expected the same tensors in every input",
        f"{root}/two: has a tensor y that {root}/base has not; expected the same tensors in every input",
    ]


@pytest.mark.parametrize("name", [EMBED, HEAD])
def test_a_resized_vocabulary_is_called_by_its_name(name: str, tmp_path: Path) -> None:
    write_three(tmp_path, lambda _: {})
    write_checkpoint(tmp_path / "two", random_tensors(2, {**SHAPES, name: (8, 4)}))
    message = refusal(tmp_path)
    assert f"{name}: shape (8, 4) in {tmp_path}/two, (6, 4) in {tmp_path}/base" in message
    assert "was the vocabulary resized?" in message


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_is_refused_with_the_reason(dtype: torch.dtype, tmp_path: Path) -> None:
    write_three(tmp_path, lambda name: {"quantised": torch.ones(4).to(dtype)})
    message = refusal(tmp_path)
    assert f"{tmp_path}/base/model.safetensors: quantised is stored as F8_E" in message
    assert "dequantise" in message


def test_int8_in_place_of_a_float_is_refused(tmp_path: Path) -> None:
    write_three(tmp_path, lambda name: {})
    tensors = random_tensors(2, SHAPES)
    write_checkpoint(tmp_path / "two", {**tensors, NORM: tensors[NORM].to(torch.int8)})
    message = refusal(tmp_path)
    assert message.startswith(f"{NORM}: dtype I8 in {tmp_path}/two, F32 in {tmp_path}/base; expected the same dtype")


def test_different_float_dtypes_need_a_decision(tmp_path: Path) -> None:
    write_three(tmp_path, lambda name: {})
    write_checkpoint(tmp_path / "two", random_tensors(2, SHAPES, dtype=torch.bfloat16))
    message = refusal(tmp_path)
    assert f"BF16 in {tmp_path}/two; expected one dtype, or `out_dtype` in the recipe" in message
    assert len(message.splitlines()) == len(SHAPES)
    run(tmp_path, out_dtype="float32")
    assert {tensor.dtype for tensor in read_tensors(tmp_path / "out").values()} == {torch.float32}


def test_sources_must_agree_with_each_other_where_there_is_no_base(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "one", random_tensors(1, {"a": (2,), "b": (2,)}))
    write_checkpoint(tmp_path / "two", random_tensors(2, {"a": (3,), "c": (2,)}))
    plain = recipe(tmp_path, "linear")
    del plain["base_model"]
    with pytest.raises(MergekitBayesError) as caught:
        merge(plain, tmp_path / "out")
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/two: has no tensor b; expected the tensors of {tmp_path}/one",
        f"{tmp_path}/two: has a tensor c that {tmp_path}/one has not; expected the same tensors in every input",
    ]


def test_names_that_are_no_file_names_are_only_names(tmp_path: Path) -> None:
    odd = "../../etc/x\n\0"
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(tmp_path / name, random_tensors(seed, {odd: (3,), "plain": (2,)}))
    run(tmp_path)
    assert sorted(read_tensors(tmp_path / "out")) == [odd, "plain"]


def test_a_checkpoint_without_tensors_is_refused(tmp_path: Path) -> None:
    write_three(tmp_path, lambda name: {})
    save_file({}, tmp_path / "two" / "model.safetensors")
    assert "two: holds no tensors" in refusal(tmp_path)


def test_the_base_among_the_models_is_left_out(tmp_path: Path) -> None:
    write_three(tmp_path, lambda name: {})
    plain = recipe(tmp_path)
    plain["models"].insert(0, {"model": str(tmp_path / "base")})
    result = merge(plain, tmp_path / "out")
    assert any("its task vector is zero, it is left out" in note for note in result.report["tensors"]["notes"])
    merge(recipe(tmp_path), tmp_path / "same")
    assert read_tensors(tmp_path / "out").keys() == read_tensors(tmp_path / "same").keys()
    for name, tensor in read_tensors(tmp_path / "same").items():
        assert torch.equal(tensor, read_tensors(tmp_path / "out")[name])


def test_identical_tensors_are_merged_all_the_same(tmp_path: Path) -> None:
    frozen = torch.randn(4, generator=torch.Generator().manual_seed(9))
    write_three(tmp_path, lambda name: {"frozen": frozen})
    run(tmp_path)
    assert torch.equal(read_tensors(tmp_path / "out")["frozen"], frozen)
