"""A PEFT LoRA adapter folder: factors, ranks and scalings of its modules, from JSON and headers alone.

For a linear layer A is (rank, in_features), B is (out_features, rank) and

    dW = s B A                  (Hu et al. 2022, arXiv 2106.09685, section 4.1)

with s = alpha / rank, or alpha / sqrt(rank) (Kalajdzievski 2023, arXiv 2312.03732). A layer that stores its
weight transposed (GPT-2's Conv1D, `fan_in_fan_out`) and an embedding (A over the vocabulary) are changed by
the transpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from mergekit_bayes.checkpoint.adapter_config import LoraRule, check_config, lora_rule
from mergekit_bayes.checkpoint.files import contained, read_json, shown
from mergekit_bayes.checkpoint.header import TensorInfo, read_header
from mergekit_bayes.checkpoint.shards import check_folder, raise_together
from mergekit_bayes.errors import CheckpointError, MissingTensorError, ShapeMismatchError

_CONFIG_FILE = "adapter_config.json"
_WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BASE_COPY = ".base_layer."
_FACTORS: Mapping[str, tuple[Literal["linear", "embedding"], Literal["a", "b"]]] = {
    ".lora_A.weight": ("linear", "a"),
    ".lora_B.weight": ("linear", "b"),
    ".lora_embedding_A": ("embedding", "a"),
    ".lora_embedding_B": ("embedding", "b"),
}


@dataclass(frozen=True)
class LoraModule:
    """The update of one module.

    Attributes:
        name: path of the module in the base model, such as `model.layers.0.self_attn.q_proj`.
        a: the factor A, (rank, in_features), or (rank, vocabulary) for an embedding.
        b: the factor B, (out_features, rank), or (dimension, rank) for an embedding.
        rank: inner dimension of B A.
        scaling: s in dW = s B A.
        kind: `linear` or `embedding`; the weight of an embedding changes by (s B A)^T, (vocabulary,
            dimension).
        transposed: for a linear layer, whether its weight is stored as (in_features, out_features).
    """

    name: str
    a: TensorInfo
    b: TensorInfo
    rank: int
    scaling: float
    kind: Literal["linear", "embedding"]
    transposed: bool

    @property
    def weight_shape(self) -> tuple[int, int]:
        """Shape of the weight that is changed, as it is stored."""
        out_features, in_features = self.b.shape[0], self.a.shape[1]
        flipped = self.transposed or self.kind == "embedding"
        return (in_features, out_features) if flipped else (out_features, in_features)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter on disk, known by its headers.

    Attributes:
        reference: what the user called it.
        folder: where it lies.
        config: the parsed `adapter_config.json`.
        modules: its low-rank updates, sorted by module.
        saved: tensors stored whole (`modules_to_save`, resized embeddings) by the name of the base tensor
            they replace, sorted.
        base_copies: copies of base tensors that PEFT stores beside an adapted embedding or head, by the
            name of the base tensor, sorted. They are no update: the weight is the copy plus dW, and unless
            the vocabulary was resized the copy is the base's own tensor.
        tensors: what was trained, that is factors and saved tensors, by the name in the file, sorted; a
            sidecar describes these.
        revision: the commit it was downloaded at; None for a local folder.
        metadata: the strings in the header of its file.
    """

    reference: str
    folder: Path
    config: Mapping[str, object]
    modules: Mapping[str, LoraModule]
    saved: Mapping[str, TensorInfo]
    base_copies: Mapping[str, TensorInfo]
    tensors: Mapping[str, TensorInfo]
    revision: str | None
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def scalings(self) -> dict[str, float]:
        """Of every module, by name: its configuration decides them, and no tensor shows them."""
        return {name: module.scaling for name, module in self.modules.items()}

    @staticmethod
    def base_tensor(module: str) -> str:
        """Returns the name of the base tensor that a module's update changes."""
        return f"{module}.weight"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / _CONFIG_FILE).exists()


def open_adapter(folder: Path, *, reference: str | None = None, revision: str | None = None) -> Adapter:
    """Opens an adapter folder: reads `adapter_config.json` and one header, and no tensor.

    Args:
        folder: holds `adapter_config.json` and `adapter_model.safetensors`.
        reference: how messages and reports call the adapter; the folder's path if not given.
        revision: the commit the folder was downloaded at, if any.

    Raises:
        CheckpointError: the folder cannot be read or trusted, or the adapter is not plain LoRA, for one
            reason.
        PlanError: the same, for several reasons, all of them listed.
    """
    check_folder(folder)
    config_path = contained(folder, _CONFIG_FILE)
    config = read_json(config_path)
    raise_together(check_config(config_path, config))
    header = read_header(_weights_file(folder))
    parts = _Parts({}, {}, {}, [])
    for info in header.tensors.values():
        parts.add(info)
    modules = {name: _module(name, factors, config, parts.problems) for name, factors in parts.factors.items()}
    if not header.tensors:
        parts.problems.append(CheckpointError(f"{shown(header.path)}: holds no tensors; expected LoRA factors"))
    raise_together(parts.problems)
    copies = {info.name for info in parts.base_copies.values()}
    return Adapter(
        reference=str(folder) if reference is None else reference,
        folder=folder,
        config=MappingProxyType(config),
        modules=MappingProxyType({name: module for name, module in sorted(modules.items()) if module}),
        saved=MappingProxyType(dict(sorted(parts.saved.items()))),
        base_copies=MappingProxyType(dict(sorted(parts.base_copies.items()))),
        tensors=MappingProxyType({k: header.tensors[k] for k in sorted(header.tensors) if k not in copies}),
        revision=revision,
        metadata=header.metadata,
    )


@dataclass
class _Parts:
    """The tensors of an adapter file, sorted by their part in it."""

    factors: dict[str, dict[str, tuple[str, TensorInfo]]]
    saved: dict[str, TensorInfo]
    base_copies: dict[str, TensorInfo]
    problems: list[CheckpointError]

    def add(self, info: TensorInfo) -> None:
        where = f"{shown(info.path)}: tensor {shown(info.name)}"
        if not info.floating:
            self.problems.append(CheckpointError(f"{where}: its dtype is {info.dtype}; expected a float type"))
        if not info.name.startswith(_PREFIX):
            self.problems.append(CheckpointError(f"{where}: expected a name that starts with {_PREFIX}"))
            return
        name = info.name.removeprefix(_PREFIX)
        for suffix, (kind, side) in _FACTORS.items():
            if name.endswith(suffix):
                self._add_factor(name.removesuffix(suffix), side, kind, info)
                return
        if "lora_" in name:
            expected = f"expected one of {', '.join(f'*{suffix}' for suffix in _FACTORS)}"
            self.problems.append(CheckpointError(f"{where}: belongs to an unsupported LoRA variant; {expected}"))
        elif _BASE_COPY in name:
            self.base_copies[name.replace(_BASE_COPY, ".")] = info
        else:
            self.saved[name] = info

    def _add_factor(self, module: str, side: str, kind: str, info: TensorInfo) -> None:
        sides = self.factors.setdefault(module, {})
        if side in sides:
            seen = f"{shown(info.path)}: module {shown(module)}: has both {shown(sides[side][1].name)}"
            problem = f"{seen} and {shown(info.name)}; expected one factor {side.upper()}"
            self.problems.append(CheckpointError(problem))
        sides[side] = (kind, info)


def _weights_file(folder: Path) -> Path:
    path = contained(folder, _WEIGHTS_FILE)
    if not path.exists():
        if (folder / "adapter_model.bin").exists():
            seen = f"{shown(folder)}: holds only a pickle (adapter_model.bin), which can run code when loaded"
            raise CheckpointError(f"{seen}; expected {_WEIGHTS_FILE}; load it where you trust it and save it again")
        raise CheckpointError(f"{shown(path)}: is missing; expected the weights of the adapter")
    if any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json")):
        raise CheckpointError(f"{shown(folder)}: holds an adapter and a full model; expected one of them")
    return path


def _module(
    name: str,
    factors: Mapping[str, tuple[str, TensorInfo]],
    config: Mapping[str, object],
    problems: list[CheckpointError],
) -> LoraModule | None:
    (kind, some), *_ = factors.values()
    where = f"{shown(some.path)}: module {shown(name)}"
    if len(factors) < 2 or factors["a"][0] != factors["b"][0]:
        seen = " and ".join(shown(info.name) for _, info in factors.values())
        problems.append(MissingTensorError(f"{where}: has only {seen}; expected a factor A and a factor B"))
        return None
    a, b = factors["a"][1], factors["b"][1]
    rule = lora_rule(config, name)
    if faults := list(_shape_faults(a, b, rule)):
        problems.extend(ShapeMismatchError(f"{where}: {fault}") for fault in faults)
        return None
    embedding = kind == "embedding"
    transposed = bool(config.get("fan_in_fan_out", False)) and not embedding
    return LoraModule(name, a, b, rule.rank, rule.scaling, "embedding" if embedding else "linear", transposed)


def _shape_faults(a: TensorInfo, b: TensorInfo, rule: LoraRule) -> Iterator[str]:
    for side, info in (("A", a), ("B", b)):
        if len(info.shape) < 2 or 0 in info.shape:
            advice = "was it saved from sharded training without gathering?"
            yield f"factor {side} has shape {info.shape}; expected two sizes > 0; {advice}"
            return
        if len(info.shape) > 2:
            yield f"factor {side} has shape {info.shape}; expected two sizes: no LoRA of convolutions"
            return
    if a.shape[0] != b.shape[1]:
        yield f"A is {a.shape} and B is {b.shape}; expected (rank, in_features) and (out_features, rank)"
    elif a.shape[0] != rule.rank:
        yield f"its rank is {a.shape[0]}; expected {rule.rank}, by r and rank_pattern of the configuration"
