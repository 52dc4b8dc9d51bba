"""Every kind of recipe on a GPU does what it does on the processor. `pytest -m gpu` runs these."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_bayes import merge
from tests.conftest import TinyCheckpoints
from tests.estimate import runs as estimate_runs
from tests.evaluate import runs as evaluate_runs
from tests.finetune import runs as finetune_runs
from tests.finetune.test_run_resume import stopped
from tests.merge.builders import random_precisions, random_tensors, write_checkpoint, write_precisions
from tests.preview.conftest import TABLES as PREVIEWED

DEVICE = "cuda"
PLACES = {"processor": "cpu", "gpu": DEVICE}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@contextmanager
def on(device: str) -> Iterator[None]:
    """Accelerate puts everything there."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", str(device == "cpu").lower())
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: TinyCheckpoints) -> Path:
    from tests.model.builders import with_tokenizer

    return with_tokenizer(tiny_checkpoint("llama"), tmp_path_factory.mktemp("gpu") / "llama", pad=True)


@pytest.fixture(scope="module")
def adapters(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    from tests.tiny_models import save_tiny_adapter

    root = tmp_path_factory.mktemp("gpu_adapters")
    return [save_tiny_adapter(llama, root / f"a{seed}", seed=seed) for seed in range(2)]


def close(found: dict[str, Tensor], expected: dict[str, Tensor], *, rtol: float) -> None:
    """To rounding, which sums of many terms make larger."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        size = float(tensor.double().abs().max()) if tensor.numel() else 1.0
        torch.testing.assert_close(found[name], tensor, rtol=rtol, atol=rtol * size, msg=name)


# Merges


@pytest.mark.parametrize(
    "method", ["linear", "task_arithmetic", "hessian_weighted", "gradient_matching", "posterior", "ties", "tsv_m"]
)
def test_a_merge(method: str, tmp_path: Path) -> None:
    shapes = {"embed.weight": (300, 48), "layers.0.weight": (96, 48), "norm.weight": (48,)}
    base = write_checkpoint(tmp_path / "base", random_tensors(0, shapes))
    models = []
    for seed in (1, 2):
        source = write_checkpoint(tmp_path / f"source{seed}", random_tensors(seed, shapes))
        precisions = random_precisions(seed, shapes, above=1.0)
        write_precisions(source, precisions, base=base, prior_precision=1.0, num_examples=10 * seed)
        models.append({"model": str(source), "parameters": {"weight": 0.6}})
    recipe = {"merge_method": method, "base_model": str(base), "models": models}
    for place, device in PLACES.items():
        merge(recipe, tmp_path / place, device=device)
    for path in sorted((tmp_path / "processor").glob("*.safetensors")):
        # half a unit in the last place of its input moves this output of tsv_m by 1e-5
        close(load_file(tmp_path / "gpu" / path.name), load_file(path), rtol=1e-4 if method == "tsv_m" else 1e-5)


# Training


@pytest.mark.slow
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"training": {"bf16": True}},
        {"training": {"fp16": True}},
        {"adapter": None, "optimizer": {"lr": 1.0}},
        {"model": {"load_in_4bit": True}, "training": {"bf16": True}},
        {"model": {"load_in_8bit": True}},
        {"optimizer": {"mc_samples": 2, "antithetic": True}},
        {"training": {"gradient_checkpointing": True}},
    ],
    ids=str,
)
def test_a_run_learns_and_continues_where_it_was_stopped(llama: Path, tmp_path: Path, sections: dict[str, Any]) -> None:
    training = {"max_steps": 16, "save_steps": 4, "logging_steps": 1, **sections.get("training", {})}
    content = finetune_runs.recipe(llama, **{**sections, "training": training})
    with on(DEVICE):
        whole = finetune_runs.run(content, tmp_path / "whole")
        stopped(content, tmp_path / "out", after=6)
        again = finetune_runs.run(content, tmp_path / "out")
    assert whole.report["peak_memory"]["accelerator"] > 0
    losses = [row["loss"] for row in finetune_runs.log_of(whole.folder) if "loss" in row]
    assert sum(losses[-4:]) < sum(losses[:4])
    names = [path.name for path in whole.folder.glob("*.safetensors")]
    assert "precision.safetensors" in names
    for name in names:
        close(load_file(again.folder / name), load_file(whole.folder / name), rtol=1e-2)


# Precisions


@pytest.mark.slow
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"estimator": "empirical_fisher"},
        {"estimator": "ggn"},
        {"estimator": "gram"},
        {"estimator": "kfac"},
        {"estimator": {"name": "kfac", "eigenvalues": True}},
    ],
    ids=str,
)
def test_a_precision_pass(llama: Path, adapters: list[Path], tmp_path: Path, keys: dict[str, Any]) -> None:
    for place, device in PLACES.items():
        with on(device):
            estimate_runs.run(estimate_runs.recipe(llama, adapters[0], **keys), tmp_path / place)
    seen, expected = (estimate_runs.sidecar_of(tmp_path / place) for place in ("gpu", "processor"))
    if "eigenvalues" not in str(keys):
        close(seen, expected, rtol=1e-3)
    else:  # the signs of eigenvectors are anyone's
        assert seen.keys() == expected.keys()
        assert all(bool(torch.isfinite(tensor).all()) for tensor in seen.values())


# Evaluations and previews


@pytest.mark.slow
def test_an_evaluation(llama: Path, tmp_path: Path) -> None:
    with on(DEVICE):
        trained = finetune_runs.run(finetune_runs.recipe(llama), tmp_path / "trained").folder
    found = []
    for device in PLACES.values():
        with on(device):
            result = evaluate_runs.run(evaluate_runs.recipe([trained], samples={"count": 3, "temperature": 0.5}))
        found.append([result.value(name, "texts", "loss") for name in (str(trained), f"{trained} (3 samples)")])
    (mean, samples), (gpu_mean, gpu_samples) = found
    assert gpu_mean == pytest.approx(mean, rel=1e-4)
    # other noise of the same distribution
    assert gpu_samples == pytest.approx(samples, rel=0.1)
    assert gpu_samples != pytest.approx(gpu_mean, rel=1e-6)


def test_a_preview(llama: Path, adapters: list[Path], tmp_path: Path) -> None:
    from mergekit_bayes.preview.run import preview

    fronts = []
    for place, device in PLACES.items():
        content = {
            "kind": "preview",
            "base_model": str(llama),
            "models": [{"model": str(each), "precision": 2.0} for each in adapters],
            "methods": ["task_arithmetic", {"merge_method": "posterior", "space": "full"}],
            "tasks": [{"name": f"t{step}", "data": f"task {step}"} for step in (1, 3)],
            "design": {"partitions": 4},
            "precision": {"prior": 0.5},
            "fidelity": "evaluated",
            "evaluation": {"batch_size": 4, "mixes_per_batch": 3, "device": device},
        }
        fronts.append(preview(content, tmp_path / place, tables=PREVIEWED).front)
    points = [[point["evaluated"]["scores"] for point in front["points"]] for front in fronts]
    assert len(points[0]) == len(points[1]) == 10
    for seen, expected in zip(points[1], points[0], strict=True):
        assert seen == pytest.approx(expected, rel=1e-4)


# Samples


def test_samples_leave_the_mean_as_it_was(llama: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    from mergekit_bayes.predict import attach_posterior, sample_posterior

    with on(DEVICE):
        trained = finetune_runs.run(finetune_runs.recipe(llama), tmp_path / "trained").folder
    base = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).to(DEVICE)
    model = peft.PeftModel.from_pretrained(base, trained).eval()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    posterior = attach_posterior(model, trained)
    ids = torch.arange(6, device=DEVICE)[None]
    with torch.no_grad():
        mean = model(input_ids=ids).logits
        with sample_posterior(model, posterior, sample=1):
            assert not torch.equal(model(input_ids=ids).logits, mean)
        assert torch.equal(model(input_ids=ids).logits, mean)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
