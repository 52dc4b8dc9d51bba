"""Kronecker factors against loops over tokens, exact Fisher information and the definition of corrected eigenvalues."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_bayes.precision.estimator import Counts
from mergekit_bayes.precision.gram import Gram
from mergekit_bayes.precision.kfac import KFAC
from mergekit_bayes.precision.registry import create, get_estimator
from mergekit_bayes.precision.scale import scaled
from mergekit_bayes.precision.signals import SIGNALS
from mergekit_bayes.precision.targets import Targets, find_targets
from tests.precision.loops import class_batch, exact_fisher, layer_vectors, row_gradients, rows_of, squares, text_batch
from tests.precision.small_models import Softmax, TwoLayers, adapted, classified, features, sequences, whole
from tests.precision.test_coverage import Model, Shift

Batch = dict[str, torch.Tensor]
SAMPLED = SIGNALS["sampled_label"]


class OfTheData(KFAC):
    """With the labels of the data, so that other code can be given the same."""

    signal = "data_label"


def targets_of(model: Any, name: str, space: str = "full", **limits: Any) -> Targets:
    return find_targets(model, space=space, factors=get_estimator(name).factors, **limits)


def run(estimator: Any, *batches: Batch) -> Counts:
    """All passes over the same batches."""
    for index in range(estimator.passes):
        estimator.start_pass(index)
        counts = Counts()
        for batch in batches:
            counts += estimator.update(batch)
    return counts


def estimated(name: str, model: Any, batch: Batch, *, space: str = "full", **options: Any) -> dict[str, torch.Tensor]:
    estimator = create(name, model, targets_of(model, name, space), seed=3, chunk_size=3, options=options)
    counts = run(estimator, batch)
    return estimator.result(counts)


def seen_tokens(row: Batch) -> torch.Tensor:
    """Tokens that some loss of the row depends on: all before the last that is predicted; of classes all attended."""
    attended = row["attention_mask"][0].bool()
    if row["labels"].dim() == 1:
        return attended
    last = int((row["labels"][0] != -100).nonzero().max())
    return attended & (torch.arange(len(attended)) < last)


@pytest.mark.parametrize(
    ("name", "space", "layers"),
    [("llama", "full", None), ("llama", "product", ["q_proj", "down_proj"]), ("gpt2", "product", ["c_attn", "c_proj"])],
)
def test_factors_equal_sums_over_tokens(name: str, space: str, layers: Any) -> None:
    model = whole(name) if layers is None else adapted(name, layers, fan_in_fan_out=name == "gpt2")
    batch = text_batch(4)
    found = estimated("kfac", model, batch, space=space)
    gram = estimated("gram", model, batch, space=space)
    rows = rows_of(batch)
    tokens = sum(int(seen_tokens(row).sum()) for row in rows)
    targets = targets_of(model, "kfac", space)
    assert targets.layers
    for layer in targets.layers:
        pairs = [layer_vectors(model, row, layer.path, SAMPLED, seed=3) for row in rows]
        inputs = torch.cat([x[seen_tokens(row)] for (x, _), row in zip(pairs, rows, strict=True)])
        gradients = torch.cat([d for _, d in pairs])
        close = {"rtol": 1e-5, "atol": 1e-9}
        torch.testing.assert_close(gram[f"{layer.name}.input_factor"][0].double(), inputs.T @ inputs, **close)
        torch.testing.assert_close(found[f"{layer.name}.input_factor"][0].double(), inputs.T @ inputs / tokens, **close)
        torch.testing.assert_close(found[f"{layer.name}.output_factor"][0].double(), gradients.T @ gradients, **close)
        assert found[f"{layer.name}.output_factor"].shape == (1, layer.out_features, layer.out_features)
    assert gram.keys() == {f"{layer.name}.input_factor" for layer in targets.layers}


def test_whatever_has_no_factors_gets_the_diagonal_of_fisher() -> None:
    model = whole("llama_tied")
    batch = text_batch(4)
    found = estimated("kfac", model, batch)
    rest = {name: value for name, value in model.named_parameters() if name in found}
    assert "model.embed_tokens.weight" in rest  # shared with the head
    assert "model.norm.weight" in rest
    expected = squares(model, batch, SAMPLED, rest, seed=3)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-12)
    factored = {name.rpartition(".")[0] for name in found.keys() - rest.keys()}
    assert factored | rest.keys() == {name for name, _ in model.named_parameters()}


def test_exact_where_inputs_tell_nothing_about_the_gradients() -> None:
    model = Softmax().eval()
    with torch.no_grad():
        model.head.weight.zero_()
    x = features(6, 3)
    # every class once for every input: the mean over labels of a model that finds all of them equally likely
    batch = {"x": x.repeat_interleave(4, 0), "labels": torch.arange(4).repeat(6), "row": torch.arange(24)}
    estimator = OfTheData(model, targets_of(model, "kfac"))
    found = estimator.result(run(estimator, batch))
    exact = exact_fisher(model, batch, dict(model.named_parameters()))["head.weight"]
    product = torch.kron(found["head.weight.output_factor"][0].double(), found["head.weight.input_factor"][0].double())
    torch.testing.assert_close(product, exact, rtol=1e-5, atol=1e-6)


def test_corrected_eigenvalues_are_squared_gradients_in_the_eigenbasis() -> None:
    model = TwoLayers().eval()
    batch = sequences(features(6, 4, 5), classes=3)
    plain = estimated("kfac", model, batch)
    found = estimated("kfac", model, batch, eigenvalues=True)
    weights = dict(model.named_parameters())
    gradients = [row_gradients(model, row, SAMPLED, weights, seed=3) for row in rows_of(batch)]
    for name in weights:
        inputs, outputs = (found[f"{name}.{side}_factor"][0].double() for side in ("input", "output"))
        for basis, side in ((inputs, "input"), (outputs, "output")):
            factor = plain[f"{name}.{side}_factor"][0].double()
            rotated = basis.T @ factor @ basis
            torch.testing.assert_close(rotated, rotated.diag().diag(), rtol=0, atol=1e-5 * float(factor.norm()))
            torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=torch.float64), rtol=0, atol=1e-6)
        expected = sum((outputs.T @ row[name] @ inputs).square() for row in gradients)
        eigenvalues = found[f"{name}.eigenvalues"][0].double()
        torch.testing.assert_close(eigenvalues, expected, rtol=1e-4, atol=1e-6 * float(expected.max()))
        # nothing diagonal in that basis is closer to the sum of outer products
        flat = torch.stack([row[name].flatten() for row in gradients])
        basis = torch.kron(outputs, inputs)
        corrected = basis @ eigenvalues.flatten().diag() @ basis.T
        kronecker = torch.kron(plain[f"{name}.output_factor"][0].double(), plain[f"{name}.input_factor"][0].double())
        assert (flat.T @ flat - corrected).norm() < (flat.T @ flat - kronecker).norm()


@pytest.mark.parametrize("name", ["gram", "kfac"])
def test_cutting_rows_differently_changes_nothing(name: str) -> None:
    model = adapted("bert", ["query"], modules_to_save=["classifier"])
    batch = class_batch(5)
    targets = targets_of(model, name, "product")
    together, apart = (create(name, model, targets, seed=3, chunk_size=size) for size in (5, 2))
    counts = run(together, batch)
    assert counts == run(apart, *rows_of(batch)[3:], {key: value[:3] for key, value in batch.items()})
    for key, value in together.result(counts).items():
        torch.testing.assert_close(apart.result(counts)[key], value, rtol=1e-5, atol=1e-7 * float(value.abs().max()))


def test_cutting_rows_differently_changes_no_corrected_curvature() -> None:
    model = TwoLayers().eval()
    batch = sequences(features(6, 4, 5), classes=3)
    together, apart = (
        create("kfac", model, targets_of(model, "kfac"), seed=3, chunk_size=size, options={"eigenvalues": True})
        for size in (6, 1)
    )
    counts = run(together, batch)
    assert counts == run(apart, *rows_of(batch)[::-1])
    for weight in ("first.weight", "second.weight"):
        mine, other = (dense(weight, each.result(counts)) for each in (together, apart))
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def test_a_pass_goes_on_where_it_was_interrupted() -> None:
    model = TwoLayers().eval()
    batch = sequences(features(6, 4, 5), classes=3)
    halves = [{key: value[part] for key, value in batch.items()} for part in (slice(0, 3), slice(3, 6))]
    expected = estimated("kfac", model, batch, eigenvalues=True)
    targets, options = targets_of(model, "kfac"), {"eigenvalues": True}
    first = create("kfac", model, targets, seed=3, options=options)
    counts = run_pass(first, 0, *halves)
    whole_pass = {key: value.clone() for key, value in first.sums().items()}
    run_pass(first, 1, halves[0])
    second = create("kfac", model, targets, seed=3, options=options)
    second.load_sums(whole_pass)
    second.start_pass(1)
    second.load_sums(first.sums())
    second.update(halves[1])
    for key, value in expected.items():
        torch.testing.assert_close(second.result(counts)[key], value, rtol=1e-5, atol=1e-6)


def test_a_parameter_that_hooks_cannot_see_beside_corrected_layers() -> None:
    model = Model(Shift()).eval()
    batch = sequences(features(5, 4, 6), classes=3)
    found, one_by_one = (
        create("kfac", model, targets_of(model, "kfac"), seed=3, chunk_size=size, options={"eigenvalues": True})
        for size in (3, 1)
    )
    counts = run(found, batch)
    assert counts == run(one_by_one, batch)
    shift = {"part.shift": model.part.shift}
    expected = squares(model, batch, SAMPLED, shift, seed=3)["part.shift"]
    torch.testing.assert_close(found.result(counts)["part.shift"].double(), expected, rtol=1e-5, atol=0)
    mine, other = (dense("head.weight", each.result(counts)) for each in (found, one_by_one))
    torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def run_pass(estimator: Any, index: int, *batches: Batch) -> Counts:
    estimator.start_pass(index)
    counts = Counts()
    for batch in batches:
        counts += estimator.update(batch)
    return counts


def test_packed_rows_count_neither_padding_nor_last_tokens() -> None:
    model = whole("llama")
    batch = text_batch(2)
    packed = {
        "input_ids": torch.cat([batch["input_ids"], torch.zeros(2, 3, dtype=torch.int64)], 1),
        "position_ids": torch.cat([torch.arange(9), torch.arange(3)]).expand(2, 12),
        "labels": torch.cat([batch["labels"], torch.full((2, 3), -100)], 1),
        "row": batch["row"],
    }
    for name in ("gram", "kfac"):
        found, expected = estimated(name, model, packed), estimated(name, model, batch)
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=1e-5, atol=1e-9, msg=key)


def test_a_row_that_is_not_finite_leaves_no_trace() -> None:
    model = TwoLayers().eval()
    batch = sequences(features(4, 4, 5), classes=3)
    for name in ("gram", "kfac"):
        clean = estimated(name, model, {key: value[[0, 1, 3]] for key, value in batch.items()})
        broken = {**batch, "x": batch["x"].clone()}
        broken["x"][2, 0, 0] = torch.inf
        estimator = create(name, model, targets_of(model, name), seed=3, chunk_size=4)
        counts = run(estimator, broken)
        assert counts == Counts(rows=3, units=9, skipped=(2,))
        for key, value in clean.items():
            torch.testing.assert_close(estimator.result(counts)[key], value)


@pytest.mark.parametrize(("name", "options"), [("gram", {}), ("kfac", {}), ("kfac", {"eigenvalues": True})])
def test_scaling_multiplies_the_curvature_once(name: str, options: dict[str, object]) -> None:
    found = estimated(name, TwoLayers().eval(), sequences(features(6, 4, 5), classes=3), **options)
    for weight in ("first.weight", "second.weight"):
        before, after = (dense(weight, tensors) for tensors in (found, scaled(found, 3.0)))
        torch.testing.assert_close(after, 3 * before, rtol=1e-5, atol=1e-6 * float(after.abs().max()))
    diagonal = {"a": torch.ones(2)}
    assert torch.equal(scaled(diagonal, 3.0)["a"], torch.full((2,), 3.0))


def dense(weight: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """The curvature of one weight as a matrix."""
    inputs = found[f"{weight}.input_factor"][0].double()
    outputs = found[f"{weight}.output_factor"][0].double() if f"{weight}.output_factor" in found else torch.eye(2)
    basis = torch.kron(outputs, inputs)
    if f"{weight}.eigenvalues" not in found:
        return basis
    return basis @ found[f"{weight}.eigenvalues"].double().flatten().diag() @ basis.T


def test_sizes_are_what_is_kept() -> None:
    model = TwoLayers().float().eval()
    targets = targets_of(model, "kfac")
    for kind, options in ((Gram, {}), (KFAC, {}), (KFAC, {"eigenvalues": True})):
        estimator = kind(model, targets, options=options)
        run(estimator, {**sequences(features(2, 4, 5).float(), classes=3)})
        kept = estimator.result(Counts(1, 1)).values()
        assert sum(kind.size(layer, options) for layer in targets.layers) == sum(value.nbytes for value in kept)
    assert Gram.size(find_targets(model, space="full").weights[0]) == 0


def test_a_classifier_of_single_vectors() -> None:
    model = Softmax().eval()
    batch = classified(features(8, 3), classes=4)
    found = estimated("kfac", model, batch)
    torch.testing.assert_close(
        found["head.weight.input_factor"][0].double(), batch["x"].T @ batch["x"] / 8, rtol=1e-6, atol=1e-9
    )
