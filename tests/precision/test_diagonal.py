"""Diagonal estimators against loops over rows, exact enumeration of labels and their own definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from evaluation.speed.alternate import allocated
from mergekit_bayes.errors import DataError, ModelError, NonFiniteError, ShapeMismatchError
from mergekit_bayes.precision.diagonal import EmpiricalFisher, Fisher, GaussNewton
from mergekit_bayes.precision.estimator import Counts, Estimator
from mergekit_bayes.precision.registry import create
from mergekit_bayes.precision.signals import SIGNALS
from mergekit_bayes.precision.targets import find_targets
from tests.precision.loops import class_batch, exact_fisher, rows_of, squares, text_batch
from tests.precision.small_models import Rooted, Softmax, TwoLayers, adapted, classified, features, sequences, whole

ESTIMATORS = ("fisher", "empirical_fisher", "ggn")


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, rtol: float = 1e-11) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        # a gradient that vanishes but for rounding, as that of the bias of keys, is compared with zero
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=1e-20 + 1e-13 * float(value.max()), msg=name)


def estimated(name: str, model: Any, batch: dict[str, torch.Tensor], *, space: str = "full", **options: Any) -> Any:
    estimator = create(name, model, find_targets(model, space=space), **{"seed": 3, "chunk_size": 3, **options})
    return estimator, estimator.update(batch)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("model_name", ["llama", "llama_tied", "qwen2", "gemma2", "gpt2", "bert"])
def test_equals_a_loop_over_rows(model_name: str, estimator: str) -> None:
    model = whole(model_name)
    batch = class_batch(5) if model_name == "bert" else text_batch(5)
    found, counts = estimated(estimator, model, batch)
    expected = squares(model, batch, SIGNALS[found.signal], dict(model.named_parameters()), seed=3)
    close(found.sums(), expected)
    assert counts == Counts(rows=5, units=5 if model_name == "bert" else int((batch["labels"] != -100).sum()))
    assert all(value.grad is None and value.requires_grad for value in model.parameters())
    assert not model._forward_hooks


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_factors_of_an_adapter(estimator: str) -> None:
    model = adapted("llama", ["q_proj", "down_proj"])
    batch = text_batch(4)
    found, _ = estimated(estimator, model, batch, space="factor")
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    close(found.sums(), squares(model, batch, SIGNALS[found.signal], trained, seed=3))


@pytest.mark.parametrize(
    ("name", "layers", "lora"),
    [
        ("llama", ["q_proj", "v_proj", "down_proj"], {}),
        ("llama", ["embed_tokens", "v_proj"], {}),
        ("gpt2", ["c_attn"], {"fan_in_fan_out": True}),
        ("bert", ["query", "value"], {"modules_to_save": ["classifier"]}),
    ],
)
def test_products_have_the_curvature_of_the_weight_below(name: str, layers: list[str], lora: Any) -> None:
    model = adapted(name, layers, **lora)
    batch = class_batch(4) if name == "bert" else text_batch(4)
    targets = find_targets(model, space="product")
    found, _ = estimated("fisher", model, batch, space="product")
    below = {layer.name: model.get_submodule(layer.path).base_layer.weight for layer in targets.layers}
    below |= {weight.name: model.get_parameter(weight.path) for weight in targets.weights}
    for value in below.values():
        value.requires_grad_()
    expected = squares(model, batch, SIGNALS["sampled_label"], below, seed=3)
    transposed = name == "gpt2"  # stores its weights as (in_features, out_features)
    close(found.sums(), {key: value.T if transposed and "attn" in key else value for key, value in expected.items()})
    if name == "bert":
        assert {"classifier.weight", "classifier.bias"} < below.keys()


def test_models_whose_layers_see_mixed_rows_are_shown_one_row_at_a_time() -> None:
    model = whole("mixtral_fused").float()  # torch has no grouped products in float64
    batch = text_batch(4)
    found, _ = estimated("fisher", model, batch)
    expected = squares(model, batch, SIGNALS["sampled_label"], dict(model.named_parameters()), seed=3)
    for name, value in expected.items():
        torch.testing.assert_close(found.sums()[name], value, rtol=1e-3, atol=1e-5 * float(value.max()), msg=name)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("chunk_size", [1, 2, 7])
def test_cutting_rows_differently_changes_nothing(estimator: str, chunk_size: int) -> None:
    model = whole("llama")
    batch = text_batch(7)
    together, counts = estimated(estimator, model, batch, chunk_size=7)
    apart, _ = estimated(estimator, model, {name: value[:0] for name, value in batch.items()}, chunk_size=chunk_size)
    seen = Counts()
    for rows in ([6, 2], [0], [5, 4, 3, 1]):
        cut = {name: value[rows] for name, value in batch.items()}
        longest = int(cut["attention_mask"].sum(1).max())
        seen += apart.update({name: value[:, :longest] if value.dim() == 2 else value for name, value in cut.items()})
    close(apart.sums(), together.sums(), rtol=1e-9)
    assert seen == counts


@pytest.mark.parametrize("estimator", ["fisher", "ggn"])
def test_unbiased_for_the_fisher_with_every_label(estimator: str) -> None:
    model = TwoLayers().eval()
    batch = sequences(features(2, 4, 5), classes=3)
    exact = exact_fisher(model, batch, dict(model.named_parameters()))
    draws = 4000
    repeated = {name: value.repeat(draws, *[1] * (value.dim() - 1)) for name, value in batch.items()}
    repeated["row"] = torch.arange(2 * draws)
    found, _ = estimated(estimator, model, repeated, chunk_size=2 * draws)
    for name, matrix in exact.items():
        torch.testing.assert_close(found.sums()[name].flatten() / draws, matrix.diag(), rtol=0.1, atol=0)


def test_random_vectors_are_less_noisy_than_labels_of_a_confident_model() -> None:
    model = Softmax().eval()
    with torch.no_grad():
        model.head.weight.mul_(8)
    batch = classified(features(1, 3).abs() + 0.5, classes=4)
    exact = exact_fisher(model, batch, dict(model.named_parameters()))["head.weight"].diag()
    spread = {}
    for estimator in ("fisher", "ggn"):
        draws = []
        for seed in range(300):
            found, _ = estimated(estimator, model, batch, seed=seed)
            draws.append(found.sums()["head.weight"].flatten())
        spread[estimator] = float((torch.stack(draws) - exact).square().mean(0).sum())
    assert spread["ggn"] < spread["fisher"] / 4


def test_differs_from_the_square_of_the_batch_and_from_the_empirical_fisher() -> None:
    model = Softmax().eval()
    batch = classified(features(50, 3), classes=4)
    found, _ = estimated("fisher", model, batch)
    empirical, _ = estimated("empirical_fisher", model, batch)
    loss = torch.nn.functional.cross_entropy(model(batch["x"]), batch["labels"], reduction="sum")
    squared = torch.autograd.grad(loss, model.head.weight)[0].square()
    for other in (squared, empirical.sums()["head.weight"]):
        assert not torch.allclose(found.sums()["head.weight"], other, rtol=0.1)


def test_the_result_is_float32_and_follows_the_seed() -> None:
    model = whole("llama")
    first, again, other = (estimated("fisher", model, text_batch(3), seed=seed) for seed in (0, 0, 1))
    name = "lm_head.weight"
    assert first[0].result(first[1])[name].dtype == torch.float32
    assert torch.equal(first[0].sums()[name], again[0].sums()[name])
    assert not torch.equal(first[0].sums()[name], other[0].sums()[name])


def test_a_model_in_bfloat16_is_summed_in_float32() -> None:
    model = whole("llama")
    exact, _ = estimated("empirical_fisher", model, text_batch(4))
    rough, _ = estimated("empirical_fisher", model.bfloat16(), text_batch(4))
    for name, value in exact.sums().items():
        assert rough.sums()[name].dtype == torch.float32
        torch.testing.assert_close(rough.sums()[name].double().sum(), value.sum(), rtol=0.1, atol=0)


@pytest.mark.parametrize("chunk_size", [1, 4])
def test_a_row_that_is_not_finite_is_named_and_leaves_no_trace(chunk_size: int) -> None:
    model = TwoLayers().eval()
    batch = sequences(features(4, 4, 5), classes=3)
    batch["row"] += 100
    clean, _ = estimated("fisher", model, {name: value[[0, 1, 3]] for name, value in batch.items()})
    batch["x"][2, 1, 0] = float("nan")
    found, counts = estimated("fisher", model, batch, chunk_size=chunk_size)
    assert counts == Counts(rows=3, units=9, skipped=(102,))
    close(found.sums(), clean.sums())


def test_gradients_that_are_not_finite_are_found_before_anything_is_added() -> None:
    model = Rooted().eval()
    batch = sequences(features(4, 4, 5), classes=3)
    clean, _ = estimated("fisher", model, {name: value[[0, 1, 3]] for name, value in batch.items()})
    batch["x"][2] = 0  # logits are finite, the slope of the root is not
    found, counts = estimated("fisher", model, batch, chunk_size=4)
    assert counts == Counts(rows=3, units=9, skipped=(2,))
    close(found.sums(), clean.sums())


def test_rows_without_a_label_do_not_count() -> None:
    model = whole("llama")
    batch = text_batch(3)
    batch["labels"][1] = -100
    found, counts = estimated("fisher", model, batch)
    alone, same = estimated("fisher", model, {name: value[[0, 2]] for name, value in batch.items()})
    assert counts == same
    assert counts.rows == 2
    close(found.sums(), alone.sums())


def test_sums_go_on_where_they_were_loaded() -> None:
    model = whole("llama")
    batch = text_batch(4)
    together, _ = estimated("fisher", model, batch)
    rows = rows_of(batch)
    first, _ = estimated("fisher", model, rows[0])
    second, _ = estimated("fisher", model, {name: value[:0] for name, value in batch.items()})
    second.load_sums(first.sums())
    for row in rows[1:]:
        second.update(row)
    close(second.sums(), together.sums())
    close(first.sums(), estimated("fisher", model, rows[0])[0].sums())  # they were copied


def refuse(kind: type[Exception], match: str, model: Any, batch: dict[str, torch.Tensor]) -> None:
    with pytest.raises(kind, match=match):
        estimated("fisher", model, batch)


def test_what_is_refused() -> None:
    model, batch = whole("llama"), text_batch(2)
    refuse(DataError, "labels among them", model, {name: value for name, value in batch.items() if name != "labels"})
    refuse(DataError, "as many rows in every tensor", model, {**batch, "row": torch.arange(3)})
    refuse(DataError, r"expected \(rows, tokens\)", model, {**batch, "labels": torch.zeros(2, 3, 4)})
    refuse(DataError, "row 11: label 48", model, {**batch, "labels": torch.tensor([[0, 1] * 4 + [2], [48] * 9])})
    refuse(DataError, "logits for every label", model, {**batch, "labels": torch.zeros(2, 5, dtype=torch.int64)})
    refuse(ModelError, "training mode", whole("llama").train(), batch)
    refuse(ModelError, "without logits", model.model, batch)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        estimated("fisher", model, batch, chunk_size=0)
    found, _ = estimated("fisher", model, batch)
    with pytest.raises(ValueError, match="passes 0 to 0"):
        found.start_pass(1)
    with pytest.raises(DataError, match="no row was counted"):
        found.result(Counts())
    with pytest.raises(ShapeMismatchError, match=r"lm_head\.weight"):
        found.load_sums({name: value for name, value in found.sums().items() if name != "lm_head.weight"})
    with pytest.raises(ShapeMismatchError, match=r"model\.norm\.weight"):
        found.load_sums({**found.sums(), "model.norm.weight": torch.zeros(3)})
    found.sums()["model.norm.weight"][0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"model\.norm\.weight"):
        found.result(Counts(1, 1))


def test_the_size_of_a_target_is_what_its_sum_takes() -> None:
    model = whole("llama").float()
    targets = find_targets(model, space="full")
    for kind in (Fisher, EmpiricalFisher, GaussNewton):
        estimator: Estimator = kind(model, targets)
        sizes = {weight.name: kind.size(weight) for weight in targets.weights}
        assert sizes == {name: value.nbytes for name, value in estimator.sums().items()}


def test_memory_is_one_copy_of_what_is_estimated_and_a_chunk() -> None:
    model = torch.nn.Sequential(*[torch.nn.Linear(1024, 1024, bias=False) for _ in range(8)]).eval()
    model.forward = lambda x: torch.nn.Sequential.forward(model, x)  # by name, as the batch has it
    targets = find_targets(model, space="full")
    batch = {"x": torch.randn(16, 4, 1024), "labels": torch.zeros(16, 4, dtype=torch.int64), "row": torch.arange(16)}
    create("fisher", model, targets, seed=0, chunk_size=16).update(batch)  # whatever is made once, is made
    peak, _ = allocated(lambda: create("fisher", model, targets, seed=0, chunk_size=16).update(batch))
    copy = sum(value.nbytes for value in model.parameters())
    assert copy < peak < 1.5 * copy  # gradients of all rows at once would be 16 copies
