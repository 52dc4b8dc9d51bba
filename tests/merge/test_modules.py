"""One adapted layer at a time: merges in product space, from files to files, against float64 oracles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.errors import NonFiniteError, NonPositivePrecisionError, PlanError
from mergekit_bayes.merge import lora
from mergekit_bayes.merge.modules import coefficients
from mergekit_bayes.merge.registry import get_method
from tests.merge.adapter_problem import (
    PRIOR,
    SHAPES,
    Make,
    Source,
    assert_cheap,
    assert_close,
    data_precision,
    lost_energy,
    merge_sources,
    merged_update,
    merged_variance,
    predicted_loss,
    truncated,
    truth,
    write_sources,
)
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_metadata,
    read_tensors,
    write_adapter,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import merge_tensor, mismatch

PRECISION_METHODS = ("gradient_matching", "posterior", "hessian_weighted")
PRIOR_METHODS = ("gradient_matching", "posterior")
SCALAR_METHODS = ("linear", "task_arithmetic")
WHOLE = {"output": {"rank": 5}}
"""The rank of every layer of the problem: nothing is cut off."""


@pytest.fixture
def sources(tmp_path: Path) -> list[Source]:
    return write_sources(tmp_path, Make(rank=2, scaling=0.5), Make(rank=1, scaling=2.0), Make(rank=2))


# --- product space ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [(0.5, 0.3, 0.2), (1.0, 1.0, 1.0), (0.9, 0.7, 0.0)])
@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_updates_are_merged_as_dense_posteriors(
    method: str, weights: Sequence[float], sources: list[Source], tmp_path: Path
) -> None:
    report = merge_sources(method, sources, weights, tmp_path / "out", **WHOLE).report
    for module in SHAPES:
        wanted = truth(method, [source.posterior(module) for source in sources], weights)
        assert_close(merged_update(tmp_path / "out", module), wanted.mean)
        measured = report["layers"][module]
        assert measured["lost_energy"] == 0.0
        gap = (merged_variance(tmp_path / "out", module) - 1 / wanted.precision).abs().sum()
        # the sidecar is float32
        assert measured["variance_misfit"] == pytest.approx(float(gap / (1 / wanted.precision).sum()), rel=1e-4)


def test_precisions_change_the_merge(sources: list[Source], tmp_path: Path) -> None:
    """What the tests above would not show if precisions were ignored altogether."""
    weights = (0.5, 0.3, 0.2)
    module = next(iter(SHAPES))
    merge_sources("hessian_weighted", sources, weights, tmp_path / "out", **WHOLE)
    plain = sum(w * source.update(module) for w, source in zip(weights, sources, strict=True))
    gap = torch.linalg.norm(merged_update(tmp_path / "out", module) - plain) / torch.linalg.norm(plain)  # type: ignore[arg-type]
    assert float(gap) > 0.2


@pytest.mark.parametrize("method", PRECISION_METHODS)
@pytest.mark.parametrize("rank", [None, 1, 3])
def test_what_the_rank_costs_is_said(method: str, rank: int | None, sources: list[Source], tmp_path: Path) -> None:
    """Energy and predicted loss of what was written; the latter is below that of a plain truncation."""
    weights = (0.5, 0.3, 0.2)
    recipe: dict[str, Any] = {} if rank is None else {"output": {"rank": rank}}
    result = merge_sources(method, sources[:2], weights[:2], tmp_path / "out", **recipe)
    kept = rank or 3  # by default the sum of the ranks, 2 and 1
    for module in SHAPES:
        wanted = truth(method, [source.posterior(module) for source in sources[:2]], weights[:2])
        seen, measured = merged_update(tmp_path / "out", module), result.report["layers"][module]
        loss, plain = assert_cheap(seen, wanted, kept), predicted_loss(truncated(wanted.mean, kept), wanted)
        assert measured["truncation_loss"] == pytest.approx(loss, rel=1e-6)
        assert measured["plain_truncation_loss"] == pytest.approx(plain, rel=1e-6)
        assert loss < 0.999 * plain
        lost = torch.linalg.norm(wanted.mean - seen).square() / torch.linalg.norm(wanted.mean).square()  # type: ignore[arg-type]
        assert measured["lost_energy"] == pytest.approx(float(lost), rel=1e-6)
        assert measured["lost_energy"] > lost_energy(wanted.mean, kept)
    assert "predicted loss of what the rank cuts off" in result.summary()


@pytest.mark.parametrize("method", SCALAR_METHODS)
@pytest.mark.parametrize("rank", [None, 1, 3, 4, 5, 50])
def test_scalar_weights_stack_exactly_unless_a_rank_is_asked_for(
    method: str, rank: int | None, sources: list[Source], tmp_path: Path
) -> None:
    weights = (0.5, 0.3, -0.2)
    recipe: dict[str, Any] = {} if rank is None else {"output": {"rank": rank}}
    report = merge_sources(method, sources, weights, tmp_path / "out", **recipe).report
    effective = [weight / (sum(weights) if method == "linear" else 1.0) for weight in weights]
    kept = min(rank or 5, 5)
    for module in SHAPES:
        exact = sum((w * s.update(module) for w, s in zip(effective, sources, strict=True)), torch.zeros(()).double())
        u, sigma, vh = torch.linalg.svd(exact, full_matrices=False)
        assert_close(merged_update(tmp_path / "out", module), (u[:, :kept] * sigma[:kept]) @ vh[:kept])
        lost = report["layers"].get(module, {"lost_energy": 0.0})["lost_energy"]
        assert lost == pytest.approx(lost_energy(exact, kept), rel=1e-9, abs=1e-15)
    assert not (tmp_path / "out" / "precision.safetensors").exists()


@pytest.mark.parametrize("method", ["task_arithmetic", "gradient_matching"])
def test_weights_may_follow_layers_and_filters(method: str, sources: list[Source], tmp_path: Path) -> None:
    """Positions and filters are those of the base's weights, as in a merge of full models."""
    values = ([0.25, 0.75], [{"filter": "down", "value": 0.4}, {"value": 1.0}])
    models = [{"model": str(s.folder), "parameters": {"weight": v}} for s, v in zip(sources, values, strict=False)]
    report = merge_sources(method, sources[:2], (1.0, 1.0), tmp_path / "out", models=models, **WHOLE).report
    for module in SHAPES:
        weights = (0.75 if "layers.1" in module else 0.25, 0.4 if "down" in module else 1.0)
        if method == "task_arithmetic":
            wanted = sum(
                (w * s.update(module) for w, s in zip(weights, sources, strict=False)), torch.zeros(()).double()
            )
        else:
            wanted = truth(method, [source.posterior(module) for source in sources[:2]], weights).mean
        assert_close(merged_update(tmp_path / "out", module), wanted)
        assert report["method"]["weights"][module] == dict(zip((str(s.folder) for s in sources), weights, strict=False))


@pytest.mark.parametrize("method", ["gradient_matching", "posterior"])
@pytest.mark.parametrize("space", ["product", "full"])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_the_prior_of_the_factors_gives_way_to_that_of_the_update(
    method: str, space: str, scale: str, tmp_path: Path
) -> None:
    """S_t = S_0 + H_t, where H_t is what the data added: no prior of this size can take more away than there is."""
    shares, prior = (0.5, 0.25), 1e4
    facts = [{"prior_precision": share, "num_examples": 8} for share in shares]
    sources = write_sources(tmp_path, Make(facts=facts[0]), Make(rank=3, scaling=0.5, facts=facts[1]))
    options = {"precision": {"prior": prior}, "space": space, "scale": scale}
    merge_sources(method, sources, (1.0, 1.0), tmp_path / "out", output={"rank": 5}, **options)
    units = 8.0 if scale == "mean" else 1.0
    for module, shape in SHAPES.items():
        known = [
            data_precision(s.factors[module], s.precisions[module], share, trained=s.scaling, scaling=s.scaling)
            for s, share in zip(sources, shares, strict=True)
        ]
        zero = (torch.zeros(shape, dtype=torch.float64), prior)
        pairs = [(s.update(module), prior + added / units) for s, added in zip(sources, known, strict=True)]
        wanted = merge_tensor(method, zero, pairs, (1.0, 1.0)).mean
        if space == "full":
            base = read_tensors(tmp_path / "base")[f"{module}.weight"].double()
            torch.testing.assert_close(read_tensors(tmp_path / "out")[f"{module}.weight"], base + wanted)
        else:
            torch.testing.assert_close(merged_update(tmp_path / "out", module), wanted)


def test_a_single_source_at_weight_one_keeps_its_update_and_about_its_variance(tmp_path: Path) -> None:
    (source,) = write_sources(tmp_path, Make(rank=2, scaling=0.5))
    report = merge_sources("gradient_matching", [source], (1.0,), tmp_path / "out").report
    for module in SHAPES:
        mean, precision = source.posterior(module)
        assert_close(merged_update(tmp_path / "out", module), mean)
        assert report["layers"][module]["lost_energy"] < 1e-12
        assert report["layers"][module]["variance_misfit"] < 0.2
        ratio = merged_variance(tmp_path / "out", module) * precision
        assert 0.8 < float(ratio.mean()) < 1.25


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_a_source_without_the_module_has_the_prior_or_no_say(method: str, tmp_path: Path) -> None:
    everywhere, partly = write_sources(tmp_path, Make(), Make(modules=("layers.0.up",), rank=1))
    weights = (0.6, 0.9)
    report = merge_sources(method, [everywhere, partly], weights, tmp_path / "out", **WHOLE).report
    for module in SHAPES:
        other = partly.posterior(module) if module in partly.factors else None
        wanted = truth(method, [everywhere.posterior(module), other], weights)
        assert_close(merged_update(tmp_path / "out", module), wanted.mean)
    assert report["mismatch"][str(partly.folder)]["by_layer"].keys() == {"layers.0.up"}


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_a_module_of_one_adapter_alone_is_moved_by_the_prior_only(method: str, tmp_path: Path) -> None:
    one, two = write_sources(tmp_path, Make(modules=("layers.0.up",)), Make(modules=("layers.0.down",)))
    merge_sources(method, [one, two], (0.6, 0.9), tmp_path / "out", **WHOLE)
    mean, precision = one.posterior("layers.0.up")
    # a S m / (S_0 + a (S - S_0)), and without a prior a S m / (a S)
    prior = 0.0 if method == "hessian_weighted" else PRIOR
    kept = 0.6 * precision / (prior + 0.6 * (precision - prior))
    assert_close(merged_update(tmp_path / "out", "layers.0.up"), kept * mean)


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_a_number_stands_for_the_precision_of_every_entry(method: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make(facts=None))
    recipe = {
        "models": [
            {"model": str(sources[0].folder), "parameters": {"weight": 0.5}},
            {"model": str(sources[1].folder), "parameters": {"weight": 0.5}, "precision": 0.7},
        ]
    }
    merge_sources(method, sources, (0.5, 0.5), tmp_path / "out", **recipe, **WHOLE)
    for module in SHAPES:
        mean = sources[1].update(module)
        wanted = truth(method, [sources[0].posterior(module), (mean, torch.full_like(mean, 0.7))], (0.5, 0.5))
        assert_close(merged_update(tmp_path / "out", module), wanted.mean)


def test_a_source_without_sidecar_has_the_precision_of_the_prior_where_the_method_allows_it(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make(facts=None))
    merge_sources("posterior", sources, (0.5, 0.8), tmp_path / "out", **WHOLE)
    for module in SHAPES:
        mean = sources[1].update(module)
        wanted = truth("posterior", [sources[0].posterior(module), (mean, torch.full_like(mean, PRIOR))], (0.5, 0.8))
        assert_close(merged_update(tmp_path / "out", module), wanted.mean)


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_scale_mean_divides_the_precision_of_the_update_by_the_training_units(method: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(facts={"num_examples": 3}), Make(facts={"num_examples": 40}))
    weights = (0.5, 0.4)
    report = merge_sources(method, sources, weights, tmp_path / "out", scale="mean", **WHOLE).report
    for module in SHAPES:
        posteriors = [source.posterior(module) for source in sources]
        shares = [(m, S / n) for (m, S), n in zip(posteriors, (3, 40), strict=True)]
        wanted = truth(method, shares, weights)
        assert_close(merged_update(tmp_path / "out", module), wanted.mean)
        # what is written counts all data again
        ratio = merged_variance(tmp_path / "out", module) * wanted.precision * 43
        assert 0.8 < float(ratio.mean()) < 1.25
        prior = 0.0 if method == "hessian_weighted" else PRIOR
        gap = mismatch(wanted.mean, shares[1][0], shares[1][1], prior)
        assert report["mismatch"][str(sources[1].folder)]["by_layer"][module] == pytest.approx(40 * gap, rel=1e-6)


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_the_mismatch_is_that_of_the_merge_before_anything_is_cut_off(
    method: str, sources: list[Source], tmp_path: Path
) -> None:
    weights = (0.5, 0.3, 0.2)
    report = merge_sources(method, sources, weights, tmp_path / "out", output={"rank": 1}).report
    prior = 0.0 if method == "hessian_weighted" else PRIOR
    for source in sources:
        by_layer = report["mismatch"][str(source.folder)]["by_layer"]
        for module in SHAPES:
            posteriors = [each.posterior(module) for each in sources]
            wanted = truth(method, posteriors, weights)
            gap = mismatch(wanted.mean, *source.posterior(module), prior)
            assert by_layer[module] == pytest.approx(gap, rel=1e-9)


@pytest.mark.parametrize("method", PRECISION_METHODS)
@pytest.mark.parametrize("space", ["product", "factor"])
def test_removing_more_than_there_is_names_the_module_and_the_share(method: str, space: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make())
    with pytest.raises(NonPositivePrecisionError, match=r"layers\..*% of \d+ merged precisions.*one: 0\.2, .*two: -1"):
        merge_sources(method, sources, (0.2, -1.0), tmp_path / "out", space=space)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("weights", "prior", "advice"), [((1.0, 1.0), 1e3, "prior precision smaller"), ((0.5, -0.4), 1e-6, "larger")]
)
def test_the_advice_fits_the_weights(weights: Sequence[float], prior: float, advice: str, tmp_path: Path) -> None:
    """A prior counted twice takes precision away where weights add up to more than one; else it only gives."""
    sources = write_sources(tmp_path, Make(), Make())
    with pytest.raises(NonPositivePrecisionError, match=advice):
        merge_sources("gradient_matching", sources, weights, tmp_path / "out", precision={"prior": prior})


@pytest.mark.parametrize("method", PRIOR_METHODS)
@pytest.mark.parametrize("space", ["product", "factor"])
def test_weights_that_sum_to_one_remove_the_prior_whatever_its_size(method: str, space: str, tmp_path: Path) -> None:
    # 1 - sum is zero in float64 and 6e-8 in float32
    sources, weights = write_sources(tmp_path, Make(), Make(), Make(), Make()), (0.01, 0.01, 0.53, 0.45)
    options: dict[str, Any] = {"dtype": "float32", "space": space, **WHOLE}
    for prior in (1e-3, 1e7):
        merge_sources(method, sources, weights, tmp_path / f"{prior}", precision={"prior": prior}, **options)
    for module in SHAPES:
        assert_close(merged_update(tmp_path / "10000000.0", module), merged_update(tmp_path / "0.001", module), 1e-4)


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_a_floor_holds_up_the_precision_and_its_share_is_reported(method: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make())
    weights, floor = (0.8, -0.5), 0.1
    recipe = {"precision": {"floor": floor, "prior": PRIOR}}
    report = merge_sources(method, sources, weights, tmp_path / "out", **recipe, **WHOLE).report
    for module, (rows, columns) in SHAPES.items():
        wanted = truth(method, [source.posterior(module) for source in sources], weights, floor=floor)
        assert_close(merged_update(tmp_path / "out", module), wanted.mean)
        raised = int((wanted.precision <= floor).sum())
        assert 0 < raised < rows * columns
        assert report["layers"][module]["floored_entries"] == raised
        assert report["layers"][module]["entries"] == rows * columns


def test_rows_are_merged_in_blocks(sources: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = (0.5, 0.3, 0.2)
    merge_sources("gradient_matching", sources, weights, tmp_path / "whole")
    monkeypatch.setattr(lora, "ROWS_ELEMENTS", 11)
    merge_sources("gradient_matching", sources, weights, tmp_path / "cut")
    for module in SHAPES:
        assert_close(merged_update(tmp_path / "cut", module), merged_update(tmp_path / "whole", module))
        assert_close(merged_variance(tmp_path / "cut", module), merged_variance(tmp_path / "whole", module), 1e-6)


# --- both -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", ["product", "factor"])
@pytest.mark.parametrize("method", SCALAR_METHODS + PRECISION_METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_factor_that_is_no_number_is_named(method: str, space: str, bad: float, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make())
    sources[1].factors["layers.0.down"][1][2, 1] = bad
    write_adapter(sources[1].folder, dict(sources[1].factors), alpha=2.0)
    recipe: dict[str, Any] = {"precision": {"prior": 0.125}} if method in PRIOR_METHODS else {}
    write_precisions(sources[1].folder, sources[1].raw_precisions)
    with pytest.raises(NonFiniteError, match=r"layers\.0\.down\.lora_B.*1 of 10 values in .*two"):
        merge_sources(method, sources, (0.5, 0.5), tmp_path / "out", space=space, **recipe)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("linear", [0.75, -0.25]),
        ("task_arithmetic", [0.75, -0.25]),
        ("gradient_matching", [0.75, -0.25]),
        ("posterior", [0.75, -0.25]),
        ("hessian_weighted", [1.5, -0.5]),
    ],
)
def test_coefficients_are_what_equal_precisions_leave_of_the_weights(method: str, expected: list[float]) -> None:
    assert coefficients(get_method(method), [0.75, -0.25]) == pytest.approx(expected, rel=1e-15)


# --- the base's own precisions as the prior ---------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("method", PRIOR_METHODS)
def test_a_sidecar_of_the_base_is_the_prior_of_dw(method: str, scale: str, tmp_path: Path) -> None:
    """In the orientation of each weight; and for a source that has no precision of its own."""
    facts = {"num_examples": 5}
    makes = (Make(facts=facts), Make(facts=facts, modules=("layers.0.up",)), Make(facts=None, rank=1))
    sources, weights = write_sources(tmp_path, *makes)[: 3 if method == "posterior" else 2], (0.6, 0.9, 0.5)
    turned = "layers.0.down"
    shapes = {f"{name}.weight": shape[::-1] if name == turned else shape for name, shape in SHAPES.items()}
    base = write_checkpoint(tmp_path / "base", random_tensors(0, shapes))
    known = {name: 0.01 * spread for name, spread in random_precisions(1, shapes).items()}
    write_precisions(base, known, num_examples=2)
    options: dict[str, Any] = {"scale": scale, "precision": {}, **WHOLE}
    report = merge_sources(method, sources, weights[: len(sources)], tmp_path / "out", **options).report
    units = 5 if scale == "mean" else 1
    for module in SHAPES:
        spread = known[f"{module}.weight"].double() / (2 if scale == "mean" else 1)
        prior = (torch.zeros(SHAPES[module]).double(), spread.T if module == turned else spread)
        posteriors = []
        for source in sources:
            if module not in source.factors:
                posteriors.append(prior)
            elif source is sources[0] or source is sources[1]:
                posteriors.append((source.posterior(module)[0], source.posterior(module)[1] / units))
            else:
                posteriors.append((source.update(module), prior[1]))
        wanted = merge_tensor(method, prior, posteriors, weights[: len(sources)])
        assert_close(merged_update(tmp_path / "out", module), wanted.mean)
        gap = mismatch(wanted.mean, *posteriors[0], prior[1])
        assert report["mismatch"][str(sources[0].folder)]["by_layer"][module] == pytest.approx(units * gap, rel=1e-6)
    assert read_metadata(tmp_path / "out").prior_precision is None


def test_a_sidecar_of_the_base_says_nothing_about_factors(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make())
    shapes = {f"{name}.weight": shape for name, shape in SHAPES.items()}
    base = write_checkpoint(tmp_path / "base", random_tensors(0, shapes))
    write_precisions(base, random_precisions(1, shapes))
    with pytest.raises(PlanError, match=r"needs the prior precision S_0.*expected a number$"):
        merge_sources("gradient_matching", sources, (0.5, 0.5), tmp_path / "out", space="factor", precision={})
