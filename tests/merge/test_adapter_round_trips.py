"""Merged adapters are posteriors again: sources of further merges, with the same bytes every time; and odd layers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_bayes import load_posterior, load_recipe, plan_merge
from mergekit_bayes.merge import lora, truncation
from mergekit_bayes.merge.execute import Engine, Options
from mergekit_bayes.merge.run import MergeResult, merge
from tests.merge.adapter_problem import (
    PRIOR,
    SHAPES,
    Make,
    Posterior,
    Source,
    assert_cheap,
    assert_close,
    data_precision,
    merge_sources,
    merged_update,
    merged_variance,
    truncated,
    truth,
    write_base,
    write_source,
    write_sources,
)
from tests.merge.builders import (
    factor_names,
    random_precisions,
    random_tensors,
    read_json,
    read_metadata,
    read_precisions,
    read_tensors,
    write_adapter,
    write_checkpoint,
    write_precisions,
)

PRECISION_METHODS = ("gradient_matching", "posterior", "hessian_weighted")
SCALAR_METHODS = ("linear", "task_arithmetic")
Recipe = dict[str, Any]


def combine(
    method: str, folders: Sequence[Path], weights: Sequence[float], out: Path, *, threads: int = 1, **extra: Any
) -> MergeResult:
    """Merge adapters or checkpoints in folders, on the base beside them."""
    models = [{"model": str(f), "parameters": {"weight": w}} for f, w in zip(folders, weights, strict=True)]
    base = str(write_base(folders[0].parent / "base"))
    recipe: Recipe = {"merge_method": method, "base_model": base, "models": models, "dtype": "float64", **extra}
    return merge(recipe, out, threads=threads)


# --- one merge after another ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", PRECISION_METHODS)
@pytest.mark.parametrize("scale", ["sum", "mean"])
@pytest.mark.parametrize("scalings", [(2.0, 2.0, 2.0), (2.0, 0.5, 1.0)])
def test_in_factor_space_two_merges_are_one(method: str, scale: str, scalings: Sequence[float], tmp_path: Path) -> None:
    """Natural parameters add, and the prior counts once: (1 + 2) + 3 = 1 + 2 + 3, whatever scalings were baked in."""
    makes = [
        Make(scaling=s, facts={"prior_precision": share, "adapter_scaling": s, "num_examples": 10})
        for s, share in zip(scalings, (0.25, 0.5, 0.125), strict=True)
    ]
    sources = write_sources(tmp_path, *makes)
    folders = [source.folder for source in sources]
    prior = 0.0625
    options = {"space": "factor", "scale": scale, "precision": {"prior": prior}}
    combine(method, folders, (0.75, 0.5, 1.0), tmp_path / "whole", **options)
    combine(method, folders[:2], (0.75, 0.5), tmp_path / "part", **options)
    combine(method, [tmp_path / "part", folders[2]], (1.0, 1.0), tmp_path / "again", **options)
    for stem in ("adapter_model", "precision"):
        whole, again = read_tensors(tmp_path / "whole", stem), read_tensors(tmp_path / "again", stem)
        assert whole.keys() == again.keys()
        for name in whole:
            assert_close(again[name], whole[name], 1e-6)  # the sidecar between is float32


@pytest.mark.parametrize("method", PRECISION_METHODS)
@pytest.mark.parametrize("first", ["product", "factor"])
@pytest.mark.parametrize("second", ["product", "factor", "full"])
def test_a_merged_adapter_is_a_source_in_every_space(method: str, first: str, second: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(scaling=0.5), Make(scaling=0.5), Make(rank=4 if first == "product" else 2))
    folders = [source.folder for source in sources]
    options = {"precision": {"prior": PRIOR}} if method != "hessian_weighted" else {}
    combine(method, folders[:2], (0.75, 0.5), tmp_path / "merged", space=first, **options)
    assert read_metadata(tmp_path / "merged").estimator == "merged"
    report = combine(
        method, [tmp_path / "merged", folders[2]], (0.6, 0.3), tmp_path / "out", space=second, **options
    ).report
    assert report["mismatch"].keys() == {str(tmp_path / "merged"), str(folders[2])}
    if second == "factor":
        return
    for module in SHAPES:
        merged = (merged_update(tmp_path / "merged", module), _precision(tmp_path / "merged", module, method))
        wanted = truth(method, [merged, sources[2].posterior(module)], (0.6, 0.3))
        if second == "full":
            base = read_tensors(tmp_path / "base")[f"{module}.weight"].double()
            assert_close(read_tensors(tmp_path / "out")[f"{module}.weight"], base + wanted.mean)
        else:
            assert_cheap(merged_update(tmp_path / "out", module), wanted, 8 if first == "product" else 4)


def _precision(folder: Path, module: str, method: str) -> Tensor:
    """Precision of dW of a merged adapter as a source: its factors' prior, where recorded, gives way to that of dW."""
    metadata, names = read_metadata(folder), factor_names(module)
    if method == "hessian_weighted" or metadata.prior_precision is None:
        return 1 / merged_variance(folder, module)
    tensors, precisions = read_tensors(folder, "adapter_model"), read_precisions(folder)
    (a, b), (s_a, s_b) = ([table[name] for name in names] for table in (tensors, precisions))
    trained = metadata.adapter_scaling or 1.0
    return PRIOR + data_precision((a, b), (s_a, s_b), metadata.prior_precision, trained=trained, scaling=1.0)


@pytest.mark.parametrize("method", SCALAR_METHODS)
@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_a_merge_without_precisions_is_a_source_too(method: str, space: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, *(Make(scaling=scaling, facts=None) for scaling in (0.5, 0.5, 1.0)))
    folders = [source.folder for source in sources]
    combine(method, folders[:2], (0.75, 0.25), tmp_path / "merged", space="factor" if space == "factor" else "product")
    combine(method, [tmp_path / "merged", folders[2]], (0.5, 0.5), tmp_path / "out", space=space)
    for module in SHAPES:
        wanted = 0.5 * merged_update(tmp_path / "merged", module) + 0.5 * sources[2].update(module)
        if space == "full":
            base = read_tensors(tmp_path / "base")[f"{module}.weight"].double()
            assert_close(read_tensors(tmp_path / "out")[f"{module}.weight"], base + wanted)
        elif space == "product":
            assert_close(merged_update(tmp_path / "out", module), wanted)


@pytest.mark.parametrize("method", PRECISION_METHODS)
def test_a_checkpoint_made_of_adapters_is_a_source(method: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make(rank=3), Make())
    folders = [source.folder for source in sources]
    options = {"precision": {"prior": PRIOR}} if method != "hessian_weighted" else {}
    combine(method, folders[:2], (0.75, 0.5), tmp_path / "merged", space="full", **options)
    combine(method, [tmp_path / "merged", folders[2]], (0.6, 0.3), tmp_path / "out", **options)
    base = read_tensors(tmp_path / "base")
    tensors, precisions = read_tensors(tmp_path / "merged"), read_precisions(tmp_path / "merged")
    for module in SHAPES:
        name = f"{module}.weight"
        update = tensors[name].double() - base[name].double()
        wanted = truth(method, [(update, precisions[name].double()), sources[2].posterior(module)], (0.6, 0.3))
        assert_close(read_tensors(tmp_path / "out")[name], base[name].double() + wanted.mean)
        assert_close(read_precisions(tmp_path / "out")[name], wanted.precision, 1e-6)


@pytest.mark.parametrize("space", ["product", "factor"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", False])
def test_the_sidecar_is_as_it_was_asked_for(stored: str | bool, space: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(scaling=0.5), Make())
    options: Recipe = {"space": space, "output": {"precision": stored}}
    merge_sources("hessian_weighted", sources, (0.5, 0.5), tmp_path / "out", **options)
    assert (tmp_path / "out" / "precision.safetensors").exists() == (stored is not False)
    if stored is False:
        return
    dtype = getattr(torch, str(stored))
    assert {precision.dtype for precision in read_precisions(tmp_path / "out").values()} == {dtype}
    folders = [tmp_path / "out", sources[0].folder]
    combine("hessian_weighted", folders, (0.5, 0.5), tmp_path / "again")


@pytest.mark.parametrize("method", ["linear", "hessian_weighted"])
def test_progress_adds_up_to_the_plan(method: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make(rank=1))
    models = [{"model": str(source.folder), "parameters": {"weight": 0.5}} for source in sources]
    plan = plan_merge(load_recipe({"merge_method": method, "models": models}))
    advanced: list[int] = []
    engine = Engine(plan, Options(threads=1), progress=advanced.append)
    for unit in plan.units:
        engine.run_unit(unit, tmp_path)
    headers = sum(
        len(layout.header) for unit in plan.units for layout in (unit.layout, unit.precision_layout) if layout
    )
    assert sum(advanced) == plan.bytes_read + plan.bytes_written - headers


def test_a_merged_adapter_is_a_posterior_in_python(tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(scaling=0.5), Make())
    merge_sources("gradient_matching", sources, (0.5, 0.5), tmp_path / "out")
    posterior = load_posterior(tmp_path / "out")
    assert set(posterior) == {name for module in SHAPES for name in factor_names(module)}
    tensors, precisions = read_tensors(tmp_path / "out", "adapter_model"), read_precisions(tmp_path / "out")
    for name, part in posterior.items():
        assert torch.equal(part.mean, tensors[name])
        assert torch.equal(part.precision_tensor(), precisions[name].to(part.mean.dtype))


# --- the same bytes ---------------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> list[Source]:
    """Layers large enough that linear algebra works in blocks, and one beyond the exact decomposition."""
    root = tmp_path_factory.mktemp("wide")
    return [
        write_source(root / f"source{seed}", seed, Make(rank=4, modules=tuple(WIDE)), shapes=WIDE) for seed in (0, 1)
    ]


WIDE = {"layers.0.up": (96, 64), "layers.0.down": (64, 96), "layers.1.up": (96, 64), "layers.1.down": (64, 96)}


@pytest.mark.parametrize("side", [1024, 32])
@pytest.mark.parametrize(
    ("method", "space"), [("hessian_weighted", "product"), ("hessian_weighted", "factor"), ("linear", "product")]
)
def test_threads_order_and_repetition_do_not_change_a_byte(
    method: str, space: str, side: int, wide: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "EXACT_SVD_SIDE", side)
    options: Recipe = {"space": space, "dtype": "float32", "output": {"rank": 5}}
    merge_sources(method, wide, (0.7, 0.4), tmp_path / "one", **options)
    wanted = contents(tmp_path / "one")
    assert "adapter_model.safetensors" in wanted
    assert ("precision.safetensors" in wanted) == (method != "linear")
    for threads in (1, 2, 4):
        merge_sources(method, wide, (0.7, 0.4), tmp_path / f"threads{threads}", threads=threads, **options)
        assert contents(tmp_path / f"threads{threads}") == wanted
    merge_sources(method, wide[::-1], (0.4, 0.7), tmp_path / "turned", **options)
    turned = contents(tmp_path / "turned")
    assert turned["adapter_model.safetensors"] == wanted["adapter_model.safetensors"]
    assert turned.get("precision.safetensors") == wanted.get("precision.safetensors")


def test_the_seed_belongs_to_the_approximation_alone(
    wide: list[Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(truncation, "EXACT_SVD_SIDE", 32)
    found = []
    for seed in (0, 1):
        merge_sources("hessian_weighted", wide, (0.7, 0.4), tmp_path / str(seed), seed=seed, output={"rank": 5})
        found.append(merged_update(tmp_path / str(seed), "layers.0.up"))
    assert not torch.equal(found[0], found[1])
    assert_close(found[0], found[1], 0.05)


# --- odd layers -------------------------------------------------------------------------------------------------------

ODD: dict[str, tuple[int, int]] = {"score": (1, 6), "gate": (6, 1), "scalar": (1, 1), "square": (3, 3)}


def odd_sources(root: Path, *, size: float = 1.0, rank: int = 4, facts: bool = True) -> list[Source]:
    make = Make(rank=rank, modules=tuple(ODD), size=size, facts={} if facts else None)
    return [write_source(root / f"source{seed}", seed, make, shapes=ODD) for seed in (0, 1)]


def posteriors(sources: Sequence[Source], module: str) -> list[Posterior]:
    return [source.posterior(module) for source in sources]


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", SCALAR_METHODS + PRECISION_METHODS)
@pytest.mark.parametrize("rank", [None, 1])
def test_layers_of_one_row_and_ranks_beyond_the_layer(
    method: str, rank: int | None, dtype: str, tmp_path: Path
) -> None:
    sources, weights = odd_sources(tmp_path), (0.6, 0.4)
    options: Recipe = {"dtype": dtype, **({} if rank is None else {"output": {"rank": rank}})}
    if method != "linear":
        options["base_model"] = str(_odd_base(tmp_path))
    merge_sources(method, sources, weights, tmp_path / "out", **options)
    largest = 8 if method in SCALAR_METHODS else 3  # a stack is exact; what is cut needs no more than a layer has
    assert read_json(tmp_path / "out" / "adapter_config.json")["r"] == (rank or largest)
    for module, shape in ODD.items():
        kept, tolerance = rank or min(shape), 1e-5 if dtype == "float32" else 1e-10
        seen = merged_update(tmp_path / "out", module)
        if method in PRECISION_METHODS:
            assert_cheap(seen, truth(method, posteriors(sources, module), weights), kept, tolerance)
        else:
            updates = [w * source.update(module) for w, source in zip(weights, sources, strict=True)]
            assert_close(seen, truncated(sum(updates, torch.zeros(shape).double()), kept), tolerance)


def _odd_base(root: Path) -> Path:
    return write_checkpoint(root / "base", random_tensors(0, {f"{name}.weight": shape for name, shape in ODD.items()}))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", SCALAR_METHODS + PRECISION_METHODS)
@pytest.mark.parametrize("space", ["product", "factor"])
def test_fresh_adapters_whose_b_is_zero_merge_to_nothing(method: str, space: str, dtype: str, tmp_path: Path) -> None:
    sources = write_sources(tmp_path, Make(), Make())
    for source in sources:
        for _, b in source.factors.values():
            b.zero_()
        write_adapter(source.folder, dict(source.factors))
        write_precisions(source.folder, source.raw_precisions)
    options: Recipe = {"dtype": dtype, "space": space}
    report = merge_sources(method, sources, (0.6, 0.4), tmp_path / "out", **options).report
    for module in SHAPES:
        assert not merged_update(tmp_path / "out", module).any()
        assert report["layers"].get(module, {}).get("lost_energy", 0.0) == 0.0
        assert report["layers"].get(module, {}).get("cross_terms", 0.0) == 0.0
    if method in PRECISION_METHODS and space == "product":
        for module in SHAPES:
            wanted = truth(method, posteriors(sources, module), (0.6, 0.4))
            gap = (merged_variance(tmp_path / "out", module) * wanted.precision - 1).abs().mean()
            assert float(gap) < 0.3


@pytest.mark.parametrize("method", PRECISION_METHODS)
@pytest.mark.parametrize("precision", [1e-6, 1e12])
def test_small_updates_and_extreme_precisions_stay_numbers(method: str, precision: float, tmp_path: Path) -> None:
    """Precisions at data scale: a million tokens times a curvature; updates late in a decay: 1e-7."""
    sources = write_sources(tmp_path, Make(size=1e-4, facts=None), Make(size=1e-4, facts=None))
    known = []
    for seed, source in enumerate(sources):
        shapes = {name: tuple(p.shape) for name, p in source.raw_precisions.items()}
        raw = {name: precision * p for name, p in random_precisions(seed, shapes, above=1.0).items()}
        write_precisions(source.folder, raw)
        pairs = {module: tuple(raw[name] for name in factor_names(module)) for module in SHAPES}
        known.append(Source(source.folder, source.factors, pairs, 1.0))  # type: ignore[arg-type]
    options: Recipe = {"dtype": "float32", "output": {"rank": 5}}
    if method != "hessian_weighted":
        options["precision"] = {"prior": 1e-30}
    merge_sources(method, sources, (0.6, 0.4), tmp_path / "out", **options)
    for module in SHAPES:
        wanted = truth("hessian_weighted", posteriors(known, module), (0.6, 0.4))
        assert_close(merged_update(tmp_path / "out", module), wanted.mean, 1e-4)
        gap = (merged_variance(tmp_path / "out", module) * wanted.precision - 1).abs().mean()
        assert float(gap) < 0.3


def test_padding_adds_next_to_nothing_to_the_variance(tmp_path: Path) -> None:
    """A module that only one adapter has is written with the rank of the others."""
    sources = write_sources(tmp_path, Make(rank=2), Make(rank=1, modules=("layers.0.up",)))
    merge_sources("hessian_weighted", sources, (0.6, 0.4), tmp_path / "out")
    tensors, precisions = read_tensors(tmp_path / "out", "adapter_model"), read_precisions(tmp_path / "out")
    a, b = factor_names("layers.0.down")
    assert tensors[a].shape[0] == 3
    assert not tensors[a][2].any()
    assert not tensors[b][:, 2].any()
    cut = lora.Factors(
        tensors[a][:2], tensors[b][:, :2], 1 / precisions[a][:2].double(), 1 / precisions[b][:, :2].double()
    )
    without = lora.product_variance(cut, slice(None))
    torch.testing.assert_close(merged_variance(tmp_path / "out", "layers.0.down"), without, rtol=1e-5, atol=0)
