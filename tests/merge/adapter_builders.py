"""Adapters made, read and run by PEFT: what a merge of adapters is measured against.

Here dW comes from PEFT's own layers and the merge is plain float64 arithmetic on dense weights; nothing of the library
takes part. Adapters are uniform noise of a size that moves every logit.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.tiny_models import VOCABULARY, uniform

TOKENS = torch.arange(12).mul(7).remainder(VOCABULARY).reshape(2, 6)

AUTO = {"bert": "AutoModelForSequenceClassification"}


@contextmanager
def quiet() -> Iterator[None]:
    """PEFT warns about things that are meant here: saved embeddings, tied heads, `fan_in_fan_out`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class Lora:
    """One adapter of a case: the weight it is merged with, and arguments of `peft.LoraConfig`."""

    weight: float = 1.0
    config: Mapping[str, Any] = field(default_factory=dict)


def load_base(base: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The transformers model in a folder, with the head that its architecture has."""
    import transformers

    auto = AUTO.get(base.name.split("-")[0], "AutoModelForCausalLM")
    return getattr(transformers, auto).from_pretrained(base, dtype=dtype).eval()


def save_adapter(base: Path, folder: Path, *, seed: int, dtype: torch.dtype = torch.float32, **lora: Any) -> Path:
    """Write an adapter of the model in `base` with PEFT; factors and modules stored whole are drawn for `seed`."""
    import peft

    with quiet():
        config = peft.LoraConfig(**{"r": 4, "lora_alpha": 8, **lora})
        adapted = peft.get_peft_model(load_base(base), config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    drawn = uniform(name, tuple(parameter.shape), seed=seed, half_width=1.0)
                    parameter.copy_(drawn if "lora_" in name else parameter + drawn)
        adapted.to(dtype).save_pretrained(folder)
    return folder


def load_adapted(base: Path, adapter: Path, *, dtype: torch.dtype = torch.float32) -> Any:
    """The base with an adapter, as users load it; a warning while loading fails the test."""
    import peft

    return peft.PeftModel.from_pretrained(load_base(base, dtype=dtype), adapter).eval()


def logits(model: Any) -> Tensor:
    """Logits of a fixed batch of token ids."""
    with torch.no_grad():
        return model(input_ids=TOKENS).logits  # type: ignore[no-any-return]


def updates(base: Path, adapter: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What PEFT adds to which weight, and what it replaces, by dense name, in float64.

    Returns:
        dW as PEFT's own layers compute it, and the tensors stored whole.
    """
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    with quiet():
        model = load_adapted(base, adapter).base_model.model.double()
    added, replaced = {}, {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            added[f"{name}.weight"] = module.get_delta_weight("default").detach()
        if isinstance(module, ModulesToSaveWrapper):
            saved = module.modules_to_save["default"].state_dict()
            replaced |= {f"{name}.{key}": tensor for key, tensor in saved.items()}
    return added, replaced


def dense_merge(base: Path, adapters: Sequence[Path], weights: Sequence[float]) -> Any:
    """The base plus the weighted sum of all task vectors, in float64 and rounded once; heads are untied first."""
    model = load_base(base)
    head = model.get_output_embeddings()
    if head is not None and head.weight is model.get_input_embeddings().weight:
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    parameters = dict(model.named_parameters())
    total = {name: parameter.detach().double() for name, parameter in parameters.items()}
    start = dict(total)
    for adapter, weight in zip(adapters, weights, strict=True):
        added, replaced = updates(base, adapter)
        for name, update in added.items():
            total[name] = total[name] + weight * update
        for name, tensor in replaced.items():
            total[name] = total[name] + weight * (tensor - start[name])
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(total[name])
    return model
