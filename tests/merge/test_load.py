"""Posteriors in Python: a folder as a mapping from tensor names to mean and precision."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_bayes import Diagonal, Isotropic, MergekitBayesError, load_posterior, merge_posteriors
from mergekit_bayes.posterior import Kronecker
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_precisions,
    read_tensors,
    write_checkpoint,
    write_precisions,
)
from tests.merge.dense_problem import WEIGHTS, write_problem
from tests.merge.test_kronecker import PRIOR, factors, precision, write_adapters

SHAPES = {"a.weight": (3, 4), "b": (2,), "scale": ()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_checkpoint_is_a_mapping_of_posteriors(dtype: torch.dtype, shards: int, tmp_path: Path) -> None:
    means, precisions = random_tensors(0, SHAPES, dtype=dtype), random_precisions(1, SHAPES)
    write_checkpoint(tmp_path / "model", {**means, "ids": torch.arange(3)}, shards=shards)
    write_precisions(tmp_path / "model", precisions, shards=shards)
    posterior = load_posterior(tmp_path / "model")
    assert list(posterior) == sorted(SHAPES)
    assert len(posterior) == len(SHAPES)
    for name in SHAPES:
        found = posterior[name]
        assert isinstance(found, Diagonal)
        assert found.mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert torch.equal(found.mean, means[name].to(found.mean.dtype))
        assert torch.equal(found.precision, precisions[name].to(found.mean.dtype))


@pytest.mark.parametrize("name", ["ids", "nowhere"])
def test_what_is_no_weight_is_not_in_it(name: str, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", {**random_tensors(0, SHAPES), "ids": torch.arange(3)})
    posterior = load_posterior(tmp_path / "model", precision=2.0)
    assert name not in posterior
    with pytest.raises(KeyError, match=name):
        posterior[name]


def test_a_number_makes_it_isotropic(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", random_tensors(0, SHAPES))
    found = load_posterior(tmp_path / "model", precision=2.0)["b"]
    assert isinstance(found, Isotropic)
    assert float(found.precision_tensor()) == 2.0


def test_what_a_sidecar_leaves_out_has_the_prior(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", random_tensors(0, SHAPES))
    write_precisions(tmp_path / "model", random_precisions(1, {"b": (2,)}), prior_precision=0.25)
    posterior = load_posterior(tmp_path / "model")
    assert isinstance(posterior["b"], Diagonal)
    assert float(posterior["a.weight"].precision_tensor()) == 0.25


def test_a_model_without_precision_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", random_tensors(0, SHAPES))
    with pytest.raises(MergekitBayesError, match=r"model: has no precision sidecar .* or `precision=` as a number"):
        load_posterior(tmp_path / "model")


def test_a_sidecar_of_other_weights_is_refused(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", random_tensors(0, SHAPES))
    write_precisions(tmp_path / "model", random_precisions(1, SHAPES))
    write_checkpoint(tmp_path / "model", random_tensors(2, SHAPES))
    with pytest.raises(MergekitBayesError, match="describes weights with fingerprint"):
        load_posterior(tmp_path / "model")


def test_a_merge_in_python_is_the_merge_of_the_files(tmp_path: Path) -> None:
    problem = write_problem(tmp_path)
    problem.merge(problem.recipe("posterior"))
    base = load_posterior(tmp_path / "base", precision=0.5)
    sources = [load_posterior(tmp_path / name) for name in problem.names]
    written, sidecar = read_tensors(tmp_path / "out"), read_precisions(tmp_path / "out")
    for name in base:
        merged = merge_posteriors(base[name], [source[name] for source in sources], torch.tensor(WEIGHTS)).check()
        torch.testing.assert_close(merged.mean, written[name], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(merged.precision_tensor(), sidecar[name], rtol=1e-6, atol=0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (4, 4)])
def test_factors_make_it_kronecker(shape: tuple[int, int], transposed: bool, tmp_path: Path) -> None:
    """A layer is (out, in) then; a bias tells where the shape does not."""
    means = random_tensors(0, {"h.0.up.weight": shape, "h.0.up.bias": shape[:1], "h.0.down.weight": (5, 3)})
    means["h.0.down.bias"] = torch.zeros(3 if transposed else 5)
    stored = {**means, "h.0.up.weight": means["h.0.up.weight"].T.contiguous()} if transposed else means
    write_checkpoint(tmp_path / "model", stored)
    drawn = factors(1, shape, "kfac", terms=2, name="h.0.up.weight")
    write_precisions(tmp_path / "model", drawn, family="kronecker", prior_precision=0.5)
    posterior = load_posterior(tmp_path / "model")
    found = posterior["h.0.up.weight"]
    assert isinstance(found, Kronecker)
    assert torch.equal(found.mean, means["h.0.up.weight"])
    assert float(found.diagonal) == 0.5
    x = random_tensors(2, {"x": shape})["x"]
    seen = found.quadratic(x)
    wanted = (
        x.double().numpy().reshape(-1) @ precision(drawn, shape, 0.5, "h.0.up.weight") @ x.double().numpy().reshape(-1)
    )
    assert float(seen) == pytest.approx(float(wanted), rel=1e-5)
    assert isinstance(posterior["h.0.up.bias"], Isotropic)


def test_updates_of_an_adapter(tmp_path: Path) -> None:
    means, sidecars = write_adapters(tmp_path, ("kfac", "diagonal"))
    for name, mean, own in zip(("one", "two"), means, sidecars, strict=True):
        posterior = load_posterior(tmp_path / name)
        assert list(posterior) == ["layers.0.up.weight"]
        found = posterior["layers.0.up.weight"]
        torch.testing.assert_close(found.mean.double(), mean, rtol=1e-5, atol=1e-6)
        assert isinstance(found, Kronecker if name == "one" else Diagonal)
        x = torch.ones(3, 4)
        wanted = precision(own, (3, 4), PRIOR).sum()
        assert float(found.quadratic(x)) == pytest.approx(float(wanted), rel=1e-5)
