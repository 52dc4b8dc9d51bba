"""Samples of precisions with Kronecker terms, and of the updates that an adapter makes to the weights of its base."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mergekit_bayes.errors import (
    CheckpointError,
    EvaluateError,
    NonPositivePrecisionError,
    ShapeMismatchError,
    SidecarMismatchError,
)
from mergekit_bayes.merge.run import merge
from mergekit_bayes.posterior import Kronecker, Term
from mergekit_bayes.predict import attach_posterior, prune_posterior, sample_posterior
from tests.conftest import TinyCheckpoints
from tests.estimate.runs import recipe, run
from tests.merge.builders import write_checkpoint, write_precisions
from tests.oracles.kronecker import full
from tests.posterior.kronecker_problem import Draw, matrix
from tests.predict.small_models import same, weights_in

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # PEFT, where it saves a copy

IDS = torch.arange(1, 11).view(2, 5)
PRIOR = 0.3
COUNT = 1500
ROWS, COLUMNS = 2, 3


class Layer(nn.Module):
    """One weight, (out, in) = (2, 3), stored as it is or as Conv1D of transformers stores it."""

    def __init__(self, mean: Tensor, *, turned: bool) -> None:
        super().__init__()
        self.layer: nn.Module = nn.Linear(COLUMNS, ROWS, bias=False)
        if turned:
            self.layer = transformers.pytorch_utils.Conv1D(ROWS, COLUMNS)
            self.layer.bias = None
        self.layer.weight = nn.Parameter((mean.mT if turned else mean).float().contiguous())


def stored(terms: Sequence[Term], diagonal: Tensor | None = None) -> dict[str, Tensor]:
    """The tensors of a sidecar for the weight of `Layer`."""
    parts: dict[str, Any] = {
        "input_factor": [term.input for term in terms],
        "output_factor": [term.output for term in terms],
        "eigenvalues": [term.eigenvalues for term in terms],
    }
    tensors = {f"layer.weight.{name}": torch.stack(each).float() for name, each in parts.items() if each[0] is not None}
    return tensors if diagonal is None else {**tensors, "layer.weight": diagonal.float().contiguous()}


def sidecar(folder: Path, model: Layer, tensors: dict[str, Tensor], **metadata: Any) -> Path:
    write_checkpoint(folder, {"layer.weight": model.layer.get_parameter("weight").detach()})
    facts: dict[str, Any] = {"family": "kronecker", "prior_precision": PRIOR, **metadata}
    return write_precisions(folder, tensors, **facts)


@pytest.mark.parametrize("turned", [False, True], ids=["linear", "transposed"])
@pytest.mark.parametrize("kinds", [("plain",), ("gram",), ("corrected",), ("plain", "plain")], ids=" and ".join)
def test_samples_have_the_covariance_of_the_posterior(tmp_path: Path, kinds: tuple[str, ...], turned: bool) -> None:
    draw = Draw(5, shape=(ROWS, COLUMNS))
    diagonal = 0.3 + draw.normal(ROWS, COLUMNS).square() if len(kinds) > 1 else None
    posterior = draw.posterior(*kinds, prior=PRIOR if diagonal is None else diagonal)
    model = Layer(posterior.mean, turned=turned)
    beside = None if diagonal is None else diagonal.mT if turned else diagonal
    path = sidecar(tmp_path / "model", model, stored(posterior.terms, beside))
    attached, before = attach_posterior(model, path), weights_in(model)
    weight = model.layer.get_parameter("weight")
    draws = []
    for sample in range(COUNT):
        with sample_posterior(model, attached, sample=sample, temperature=0.5):
            draws.append((weight.detach().mT if turned else weight.detach()).double() - posterior.mean)
    assert same(weights_in(model), before)
    # whitened by the full precision, every second moment is 0 or 1, known to about sqrt(2 / COUNT)
    white = torch.stack(draws).reshape(COUNT, -1).numpy() @ np.linalg.cholesky(matrix(posterior) / 0.5)
    np.testing.assert_allclose(white.T @ white / COUNT, np.eye(ROWS * COLUMNS), atol=5 * (2 / COUNT) ** 0.5)
    assert np.abs(white.mean(axis=0)).max() < 5 / COUNT**0.5


def test_a_square_layer_is_turned_as_its_module_stores_it(tmp_path: Path) -> None:
    """Shapes cannot tell; certain outputs must stay where they are, whichever side of the weight they are on."""
    terms = [Term(torch.eye(3), torch.diag(torch.tensor([1e12, 1.0, 1e12])))]
    for turned in (False, True):
        model = nn.Module()
        model.layer = transformers.pytorch_utils.Conv1D(3, 3) if turned else nn.Linear(3, 3)
        model.layer.bias = None
        folder = write_checkpoint(tmp_path / f"{turned}", {"layer.weight": model.layer.weight.detach()})
        path = write_precisions(folder, stored(terms), family="kronecker", prior_precision=1.0)
        before = model.layer.weight.detach().clone()
        with sample_posterior(model, path, sample=0):
            moved = (model.layer.weight.detach() - before).abs()
        moved = moved.mT if turned else moved
        assert moved[1].min() > 1e-4
        assert moved[[0, 2]].max() < 1e-4


def test_a_sample_depends_on_seed_sample_and_name_alone(tmp_path: Path) -> None:
    posterior = Draw(6, shape=(ROWS, COLUMNS)).posterior("plain")
    model = Layer(posterior.mean, turned=False)
    path = sidecar(tmp_path / "model", model, stored(posterior.terms))
    drawn = []
    for seed, sample, temperature in ((1, 2, 1.0), (1, 2, 1.0), (1, 2, 4.0), (2, 2, 1.0), (1, 3, 1.0)):
        torch.manual_seed(len(drawn))
        with sample_posterior(model, path, sample=sample, seed=seed, temperature=temperature):
            drawn.append(model.layer.get_parameter("weight").detach() - posterior.mean.float())
    assert torch.equal(drawn[0], drawn[1])
    torch.testing.assert_close(2 * drawn[0], drawn[2], rtol=1e-4, atol=1e-6)
    assert not any(torch.allclose(drawn[0], other) for other in drawn[3:])


@pytest.mark.parametrize(
    ("tensors", "metadata", "error", "message"),
    [
        (stored([Term(torch.eye(4), torch.eye(2))]), {}, ShapeMismatchError, r"\(2, 4\); expected \(2, 3\), that of"),
        (stored([Term(torch.eye(3), torch.eye(2))]), {"prior_precision": None}, CheckpointError, "no diagonal part"),
    ],
)
def test_factors_that_do_not_fit_are_refused(
    tmp_path: Path, tensors: dict[str, Tensor], metadata: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = Layer(torch.ones(ROWS, COLUMNS), turned=False)
    path = sidecar(tmp_path / "model", model, tensors, **metadata)
    alone = tmp_path / "precision.safetensors"  # without the weights beside it, whose shapes would speak first
    path.rename(alone)
    with pytest.raises(error, match=message):
        attach_posterior(model, alone)


def test_a_precision_that_is_not_positive_is_named(tmp_path: Path) -> None:
    """An output factor with a negative eigenvalue, which its diagonal does not show."""
    model = Layer(torch.ones(ROWS, COLUMNS), turned=False)
    bad = torch.tensor([[1.0, 3.0], [3.0, 1.0]])
    path = sidecar(tmp_path / "model", model, stored([Term(torch.eye(COLUMNS), bad)]))
    before = weights_in(model)
    with (
        pytest.raises(NonPositivePrecisionError, match=r"sample of layer.weight: .* eigenvalues zero or negative"),
        sample_posterior(model, path, sample=0),
    ):
        pass
    assert same(weights_in(model), before)


@pytest.fixture(scope="module")
def bases(tiny_checkpoint: TinyCheckpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.model.builders import with_tokenizer

    root = tmp_path_factory.mktemp("correlated")
    return {name: with_tokenizer(tiny_checkpoint(name), root / name, pad=True) for name in ("llama", "gpt2")}


LORA: dict[str, dict[str, Any]] = {
    "llama": {"target_modules": ["q_proj", "down_proj", "embed_tokens"]},
    "gpt2": {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True},
}


@pytest.fixture(scope="module")
def adapters(bases: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    from tests.tiny_models import save_tiny_adapter

    root = tmp_path_factory.mktemp("adapters")
    return {name: save_tiny_adapter(base, root / name, seed=1, **LORA[name]) for name, base in bases.items()}


def adapted(base: Path, adapter: Path) -> Any:
    model = transformers.AutoModelForCausalLM.from_pretrained(base, torch_dtype=torch.float64)
    return peft.PeftModel.from_pretrained(model, adapter).double().eval()


@pytest.mark.parametrize("estimator", ["kfac", "gram", "fisher"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_sample_of_updates_is_that_of_the_merged_weights(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path, name: str, estimator: str
) -> None:
    asked = recipe(bases[name], adapters[name], estimator=estimator, space="product")
    folder = run(asked, tmp_path / "precision").folder
    model = adapted(bases[name], adapters[name])
    before = weights_in(model)
    with torch.no_grad(), sample_posterior(model, folder, sample=0, temperature=0.1) as posterior:
        inside, logits = weights_in(model), model(IDS).logits
    assert same(weights_in(model), before)
    changed = {key for key in inside if not torch.equal(inside[key], before[key])}
    described = {weight.name.removesuffix(".weight") for weight in posterior.weights}
    assert changed == {f"base_model.model.{layer}.base_layer.weight" for layer in described}
    # input moments say nothing about an embedding
    unsaid = {layer for layer in model.targeted_module_names if estimator == "gram" and "embed" in layer}
    assert described == {*model.targeted_module_names} - unsaid
    # the same deviations on top of W + s B A, without an adapter
    plain = copy.deepcopy(model).merge_and_unload()
    with torch.no_grad():
        for key in changed:
            path = key.removeprefix("base_model.model.").replace(".base_layer", "")
            plain.get_parameter(path).add_(inside[key] - before[key])
        torch.testing.assert_close(logits, plain(IDS).logits)
        assert not torch.allclose(logits, model(IDS).logits)


def test_updates_of_a_layer_have_the_covariance_that_its_factors_say(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Along the eigenvectors of the precision of one layer, of which the sidecar knows nothing but the factors."""
    asked = recipe(bases["gpt2"], adapters["gpt2"], estimator="kfac", prior={"weight_decay": 0.1})
    folder = run(asked, tmp_path / "precision").folder
    model = adapted(bases["gpt2"], adapters["gpt2"])
    posterior = attach_posterior(model, folder)
    weight = next(each for each in posterior.weights if each.name.endswith("h.0.attn.c_attn.weight"))
    assert weight.turned
    assert isinstance(weight.spread, Kronecker)
    file = load_file(folder / "precision.safetensors")
    a, g = (file[f"{weight.name}.{side}_factor"][0].double() for side in ("input", "output"))
    prior = float(weight.spread.diagonal)
    (heights, u), (values, v) = torch.linalg.eigh(g), torch.linalg.eigh(a)
    eigenvalues = heights[:, None] * values + prior
    mean = weight.parameter.detach().clone()
    squares = torch.zeros_like(eigenvalues)
    count = 300
    for sample in range(count):
        with sample_posterior(model, posterior, sample=sample):
            moved = (weight.parameter.detach() - mean).mT  # (out, in)
        squares += (u.mT @ moved @ v).square() * eigenvalues
    assert float(squares.mean()) / count == pytest.approx(1, abs=5 * (2 / (count * squares.numel())) ** 0.5)
    # where the data say most and least: the corners, averaged over a block
    for block in (squares[:8, :8], squares[-8:, -8:]):
        assert float(block.mean()) / count == pytest.approx(1, abs=5 * (2 / (count * block.numel())) ** 0.5)


def test_a_merge_of_adapters_is_sampled_with_the_terms_of_all(bases: dict[str, Path], tmp_path: Path) -> None:
    from tests.tiny_models import save_tiny_adapter

    sources = []
    for seed in (1, 2):
        adapter = save_tiny_adapter(bases["llama"], tmp_path / f"adapter{seed}", seed=seed)
        asked = recipe(bases["llama"], adapter, estimator="kfac", seed=seed, prior={"weight_decay": 0.1})
        folder = run(asked, tmp_path / f"precision{seed}").folder
        sources.append({"model": str(adapter), "precision": str(folder), "parameters": {"weight": 1.0}})
    content = {
        "merge_method": "kronecker",
        "base_model": str(bases["llama"]),
        "models": sources,
        "precision": {"prior": 5.0},
    }
    merge(content, tmp_path / "merged")
    merged = tmp_path / "merged"
    model = adapted(bases["llama"], merged)
    before = weights_in(model)
    with torch.no_grad(), sample_posterior(model, merged, sample=0, temperature=0.1) as posterior:
        logits = model(IDS).logits
    assert same(weights_in(model), before)
    assert posterior.of_updates
    assert {len(weight.spread.terms) for weight in posterior.weights if isinstance(weight.spread, Kronecker)} == {2}
    assert bool(logits.isfinite().all())
    # the diagonal that stands for them is that of the full matrix
    weight = next(weight for weight in posterior.weights if isinstance(weight.spread, Kronecker))
    spread = weight.spread
    assert isinstance(spread, Kronecker)
    diagonal = spread.diagonal.double().expand(spread.mean.shape).numpy()
    terms = [tuple(None if each is None else each.double().numpy() for each in term) for term in spread.terms]
    dense = full(diagonal, terms)
    np.testing.assert_allclose(weight.precision.double().numpy().reshape(-1), np.diag(dense), rtol=1e-6)


def test_only_the_layers_of_the_adapter_that_is_meant_are_sampled(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Of a model that holds two, on different layers."""
    from tests.tiny_models import save_tiny_adapter

    other = save_tiny_adapter(bases["llama"], tmp_path / "other", seed=2, target_modules=["k_proj"])
    folder = product_sidecar(bases["llama"], other, tmp_path / "precision")
    model = adapted(bases["llama"], adapters["llama"])
    model.load_adapter(other, adapter_name="other")
    model.set_adapter("other")
    before = weights_in(model)
    with sample_posterior(model, folder, sample=0) as posterior:
        inside = weights_in(model)
    assert posterior.adapter == "other"
    assert posterior.certain == ()
    changed = {key for key in inside if not torch.equal(inside[key], before[key])}
    assert changed == {key for key in inside if key.endswith("k_proj.base_layer.weight")}


def product_sidecar(base: Path, adapter: Path, folder: Path) -> Path:
    return run(recipe(base, adapter, estimator="fisher", space="product"), folder).folder


def test_updates_that_cannot_be_sampled_are_refused(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    folder = product_sidecar(bases["llama"], adapters["llama"], tmp_path / "precision")
    base = transformers.AutoModelForCausalLM.from_pretrained(bases["llama"])
    with pytest.raises(EvaluateError, match="has no adapter; expected the one whose updates"):
        attach_posterior(base, folder)
    model = adapted(bases["llama"], adapters["llama"])
    with pytest.raises(EvaluateError, match="of the updates of an adapter, whose entries the model does not hold"):
        prune_posterior(model, folder, 0.5)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    weight = layer.base_layer.weight
    layer.base_layer.weight = nn.Parameter(weight.to(torch.uint8), requires_grad=False)
    with pytest.raises(ShapeMismatchError, match=r"uint8: quantised .*; expected a base in floating point"):
        attach_posterior(model, folder)
    layer.base_layer.weight = model.base_model.model.model.layers[1].self_attn.q_proj.base_layer.weight
    with pytest.raises(Exception, match="its weight is that of another layer too"):
        attach_posterior(model, folder)
    other = adapted(bases["llama"], adapters["llama"])
    other.merge_adapter()
    with pytest.raises(EvaluateError, match="has it merged into its weight"):
        attach_posterior(other, folder)


def test_updates_of_other_factors_are_refused(
    bases: dict[str, Path], adapters: dict[str, Path], tmp_path: Path
) -> None:
    """Of a sidecar that lies beside the adapter it describes."""
    import shutil

    shutil.copytree(adapters["llama"], tmp_path / "adapter")
    folder = product_sidecar(bases["llama"], adapters["llama"], tmp_path / "precision")
    shutil.copy(folder / "precision.safetensors", tmp_path / "adapter")
    model = adapted(bases["llama"], tmp_path / "adapter")
    attach_posterior(model, tmp_path / "adapter")
    with torch.no_grad():
        model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(1)
    with pytest.raises(SidecarMismatchError, match=r"describes other values of .*q_proj\.lora_B\.weight"):
        attach_posterior(model, tmp_path / "adapter")
