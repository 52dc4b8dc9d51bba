"""Numbers that must not pass, found wherever they are, with file, tensor and share in the message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY
from mergekit_bayes.errors import MergekitBayesError, NonFiniteError, NonPositivePrecisionError
from mergekit_bayes.merge.checks import check_block, check_precision
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.plan import plan_merge
from mergekit_bayes.merge.run import merge, run_merge
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_json,
    read_metadata,
    read_precisions,
    read_tensors,
    snapshot,
    write_adapter,
    write_checkpoint,
    write_precisions,
)

SHAPES: Mapping[str, tuple[int, ...]] = {"a.weight": (4, 5), "b.weight": (3,)}
NAN, INF = float("nan"), float("inf")


def write(root: Path, *, dtype: torch.dtype = torch.float32) -> None:
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(root / name, random_tensors(seed, SHAPES, dtype=dtype))
        if name != "base":
            precisions = random_precisions(seed, SHAPES, above=1.0)
            write_precisions(root / name, precisions, base=root / "base", prior_precision=0.5)


def recipe(root: Path, method: str = "gradient_matching", weights: tuple[float, float] = (1.0, 1.0)) -> dict[str, Any]:
    models = [
        {"model": str(root / n), "parameters": {"weight": w}} for n, w in zip(("one", "two"), weights, strict=True)
    ]
    return {"merge_method": method, "base_model": str(root / "base"), "models": models}


def refusal(root: Path, kind: type[MergekitBayesError], plan: Mapping[str, Any]) -> str:
    before = snapshot(root)
    with pytest.raises(kind) as caught:
        merge(plan, root / "out")
    assert snapshot(root) == before
    return str(caught.value)


def change(file: Path, name: str, edit: Callable[[Tensor], Tensor]) -> None:
    """Change values of a file without its metadata noticing."""
    tensors = load_file(file)
    from mergekit_bayes.checkpoint.header import read_header

    metadata = dict(read_header(file).metadata)
    tensors[name] = edit(tensors[name].clone())
    save_file(tensors, file, metadata=metadata)


def put(index: int, value: float) -> Callable[[Tensor], Tensor]:
    def edit(tensor: Tensor) -> Tensor:
        tensor.view(-1)[index] = value
        return tensor

    return edit


@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["base", "one", "two"])
@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching", "hessian_weighted", "linear"])
def test_a_weight_that_is_no_number_is_traced_to_its_file(
    method: str, where: str, value: float, tmp_path: Path
) -> None:
    write(tmp_path)
    tensors = random_tensors(("base", "one", "two").index(where), SHAPES)
    tensors["a.weight"].view(-1)[7] = value
    write_checkpoint(tmp_path / where, tensors)
    plan = recipe(tmp_path, method)
    for model in plan["models"]:
        model["precision"] = 2.0
    plan["precision"] = {"prior": 0.5}
    if where == "base" and method in ("linear", "hessian_weighted"):
        merge(plan, tmp_path / "out")  # the base's values are not used
        return
    message = refusal(tmp_path, NonFiniteError, plan)
    file = tmp_path / where / "model.safetensors"
    assert message == (
        f"a.weight: 1 of 20 values in {tmp_path / where} ({file}) are NaN or infinite; expected finite numbers"
    )


def test_the_first_of_several_faults_is_told_whoever_finds_it_first(tmp_path: Path) -> None:
    """The fault in the large tensor takes longest to find; the message may not depend on how fast workers are."""
    for name in ("base", "one", "two"):
        tensors = {"a.large": torch.zeros(1 << 20), **{f"b.{i}": torch.zeros(3) for i in range(20)}}
        if name == "two":
            tensors = {key: value.index_fill(0, torch.tensor([len(value) - 1]), NAN) for key, value in tensors.items()}
        write_checkpoint(tmp_path / name, tensors)
    plan = recipe(tmp_path, "task_arithmetic")
    for threads in (1, 4):
        with pytest.raises(NonFiniteError, match=r"^a\.large: 1 of 1048576 values in .*two"):
            merge(plan, tmp_path / "out", threads=threads)


def test_values_that_do_not_fit_the_output_are_refused(tmp_path: Path) -> None:
    write(tmp_path)
    big = {name: tensor * 1e5 for name, tensor in random_tensors(1, SHAPES).items()}
    write_checkpoint(tmp_path / "one", big)
    message = refusal(tmp_path, NonFiniteError, {**recipe(tmp_path, "task_arithmetic"), "out_dtype": "float16"})
    assert "every input is finite but the merged values are not, or do not fit F16" in message
    assert "choose a wider out_dtype" in message


def test_infinite_values_that_are_only_copied_are_refused(tmp_path: Path) -> None:
    """An adapter leaves most of the base alone; what it leaves alone must be sound too."""
    tensors = random_tensors(0, SHAPES)
    tensors["b.weight"][1] = NAN
    write_checkpoint(tmp_path / "base", tensors)
    for name in ("one", "two"):
        write_adapter(tmp_path / name, {"a": (torch.ones(1, 5), torch.ones(4, 1))})
    plan = {**recipe(tmp_path, "task_arithmetic"), "space": "full"}
    message = refusal(tmp_path, NonFiniteError, plan)
    assert message.startswith(f"b.weight: 1 of 3 values in {tmp_path}/base/model.safetensors are NaN or infinite")


def test_copied_values_that_do_not_fit_the_output_are_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "base", {"a.weight": torch.ones(4, 5), "b.weight": torch.full((3,), 1e5)})
    for name in ("one", "two"):
        write_adapter(tmp_path / name, {"a": (torch.ones(1, 5), torch.ones(4, 1))})
    plan = {**recipe(tmp_path, "task_arithmetic"), "space": "full", "out_dtype": "float16"}
    message = refusal(tmp_path, NonFiniteError, plan)
    file = tmp_path / "base" / "model.safetensors"
    assert message == (
        f"b.weight: 3 of 3 values in {file}, written as F16, are NaN or infinite; expected finite numbers"
    )


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (NAN, NonFiniteError, "1 of 20 values in {file} are NaN or infinite; expected finite numbers"),
        (INF, NonFiniteError, "1 of 20 values in {file} are NaN or infinite; expected finite numbers"),
        (0.0, NonPositivePrecisionError, "1 of 20 precisions in {file} are zero or negative (lowest 0)"),
        (-2.5, NonPositivePrecisionError, "1 of 20 precisions in {file} are zero or negative (lowest -2.5)"),
    ],
)
@pytest.mark.parametrize("where", ["base", "one"])
def test_a_precision_that_is_none_is_traced_to_its_file(
    where: str, value: float, kind: type[MergekitBayesError], words: str, tmp_path: Path
) -> None:
    write(tmp_path)
    write_precisions(tmp_path / "base", random_precisions(9, SHAPES, above=0.1))
    file = tmp_path / where / "precision.safetensors"
    change(file, "a.weight", put(3, value))
    message = refusal(tmp_path, kind, recipe(tmp_path))
    assert message.startswith("a.weight: " + words.format(file=file))


def test_lost_positivity_is_told_with_tensor_share_and_weights(tmp_path: Path) -> None:
    write(tmp_path)
    own = {name: torch.full(shape, 0.75) for name, shape in SHAPES.items()}
    removed = {name: torch.full(shape, 0.6) for name, shape in SHAPES.items()}
    removed["a.weight"].view(-1)[:5] = 8.0
    write_precisions(tmp_path / "one", own, prior_precision=0.5)
    write_precisions(tmp_path / "two", removed, prior_precision=0.5)
    message = refusal(tmp_path, NonPositivePrecisionError, recipe(tmp_path, weights=(1.0, -0.5)))
    # 0.5 + (0.75 - 0.5) - 0.5 (8 - 0.5) = -3
    assert message == (
        "a.weight: 25.0% of 20 merged precisions are zero or negative (lowest -3) with weights "
        f"{tmp_path}/one: 1, {tmp_path}/two: -0.5; expected positive ones; make negative weights smaller, "
        "prior precision larger, or set precision.floor"
    )


def test_a_share_of_lost_entries_is_counted_over_all_blocks(tmp_path: Path) -> None:
    shape = {"wide": (300_000,)}
    for name in ("base", "one", "two"):
        write_checkpoint(tmp_path / name, {"wide": torch.zeros(300_000)})
    removed = torch.full((300_000,), 0.6)
    removed[::1000] = 3.0
    write_precisions(
        tmp_path / "one", {key: torch.full(size, 0.75) for key, size in shape.items()}, prior_precision=0.5
    )
    write_precisions(tmp_path / "two", {"wide": removed}, prior_precision=0.5)
    plan = plan_merge(load_recipe(recipe(tmp_path, weights=(1.0, -1.0))), tmp_path / "out")
    with pytest.raises(NonPositivePrecisionError) as caught:
        run_merge(plan, max_memory=1 << 20)
    words = "wide: 0.1% of 300000 merged precisions are zero or negative (lowest -1.75)"
    assert str(caught.value).startswith(words)
    assert not (tmp_path / "out").exists()


def test_a_floor_keeps_the_precision_positive_and_is_reported(tmp_path: Path) -> None:
    write(tmp_path)
    own = {name: torch.full(shape, 0.75) for name, shape in SHAPES.items()}
    removed = {name: torch.full(shape, 0.6) for name, shape in SHAPES.items()}
    removed["a.weight"].view(-1)[:5] = 8.0
    write_precisions(tmp_path / "one", own, prior_precision=0.5)
    write_precisions(tmp_path / "two", removed, prior_precision=0.5)
    plan = {**recipe(tmp_path, weights=(1.0, -0.5)), "precision": {"floor": 0.25}}
    report = merge(plan, tmp_path / "out").report
    assert report["layers"]["a.weight"] == {"entries": 20, "floored_entries": 5}
    assert report["layers"]["b.weight"] == {"entries": 3, "floored_entries": 0}
    assert report["method"]["floor"] == 0.25
    lowest = {name: float(value.min()) for name, value in read_precisions(tmp_path / "out").items()}
    assert lowest == {"a.weight": 0.25, "b.weight": pytest.approx(0.5 + 0.25 - 0.5 * 0.1)}


@pytest.mark.parametrize("written", ["float32", False])
def test_numbers_lose_positivity_too(written: str | bool, tmp_path: Path) -> None:
    write(tmp_path)
    plan = {**recipe(tmp_path, weights=(1.0, -1.0)), "precision": {"prior": 0.5}, "output": {"precision": written}}
    plan["models"][0]["precision"], plan["models"][1]["precision"] = 1.0, 2.0
    message = refusal(tmp_path, NonPositivePrecisionError, plan)
    assert message.startswith("a.weight: 100.0% of 20 merged precisions are zero or negative (lowest -0.5)")
    floored = merge({**plan, "precision": {"prior": 0.5, "floor": 0.25}}, tmp_path / "out").report
    assert floored["layers"]["a.weight"] == {"entries": 20, "floored_entries": 20}


def test_precisions_too_large_for_the_sidecar_are_refused(tmp_path: Path) -> None:
    write(tmp_path, dtype=torch.float64)
    for name in ("one", "two"):
        huge = {key: torch.full(shape, 1e39, dtype=torch.float64) for key, shape in SHAPES.items()}
        write_precisions(tmp_path / name, huge, prior_precision=0.5)
    message = refusal(tmp_path, NonFiniteError, {**recipe(tmp_path), "dtype": "float64"})
    assert message.startswith("a.weight: 20 of 20 values in the merged precision are NaN or infinite")


def test_nothing_is_wrong_with_an_empty_block() -> None:
    check_block(torch.empty(0), "name", "file")
    check_precision(torch.empty(0), "name", "file")


def test_sound_files_pass(tmp_path: Path) -> None:
    """The counterpart of every test above: what they break is what is wrong."""
    write(tmp_path)
    write_precisions(tmp_path / "base", random_precisions(9, SHAPES, above=0.1))
    merge(recipe(tmp_path), tmp_path / "out")
    assert all(tensor.isfinite().all() for tensor in read_tensors(tmp_path / "out").values())
    assert read_json(tmp_path / "out" / "merge_report.json")["layers"] == {}
    assert METADATA_KEY == "mergekit_bayes"
    assert read_metadata(tmp_path / "out").estimator == "merged"
