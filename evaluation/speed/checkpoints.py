"""Llama-shaped checkpoints of random bfloat16 weights, written fast: made for reading, not for answering.

The base is noise of standard deviation 0.02, every source is the base moved by a tenth of that, and a
precision is the prior plus log-normal curvature. Noise is one pool of numbers read from different places.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from mergekit_bayes.checkpoint.fingerprint import fingerprint
from mergekit_bayes.checkpoint.header import read_header
from mergekit_bayes.checkpoint.sidecar import SidecarMetadata

PRIOR_PRECISION = 1e3
_POOL = 1 << 22


@dataclass(frozen=True)
class Size:
    """Shape of a Llama."""

    vocabulary: int
    hidden: int
    intermediate: int
    layers: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, sorted as transformers writes them."""
        hidden = self.hidden
        yield "lm_head.weight", (self.vocabulary, hidden)
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            yield f"{prefix}.input_layernorm.weight", (hidden,)
            yield f"{prefix}.mlp.down_proj.weight", (hidden, self.intermediate)
            yield f"{prefix}.mlp.gate_proj.weight", (self.intermediate, hidden)
            yield f"{prefix}.mlp.up_proj.weight", (self.intermediate, hidden)
            yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
            for name in ("k_proj", "o_proj", "q_proj", "v_proj"):
                yield f"{prefix}.self_attn.{name}.weight", (hidden, hidden)
        yield "model.norm.weight", (hidden,)

    @property
    def nbytes(self) -> int:
        """Bytes of all weights in bfloat16."""
        return 2 * sum(torch.Size(shape).numel() for _, shape in self.tensors())


SIZES = {
    "tiny": Size(vocabulary=512, hidden=64, intermediate=176, layers=2),
    "half_gigabyte": Size(vocabulary=32000, hidden=1024, intermediate=2816, layers=16),
    "two_gigabytes": Size(vocabulary=32000, hidden=2048, intermediate=5632, layers=18),
}


def write_inputs(folder: Path, size: Size, *, sources: int, precisions: bool) -> None:
    """Write `base` and `source1`, `source2`, ... below a folder; what is there already is kept.

    Args:
        folder: created if need be.
        size: shape of every checkpoint.
        sources: how many.
        precisions: whether each source has a bfloat16 sidecar beside it.
    """
    pool = torch.randn(_POOL, generator=torch.Generator().manual_seed(0))
    for index in range(sources + 1):
        target = folder / (f"source{index}" if index else "base")
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(_config(size), indent=2))
        weights, precision = target / "model.safetensors", target / "precision.safetensors"
        if not weights.exists():
            _write(weights, size, partial(_weights, pool, index), {"format": "pt"})
        if index and precisions and not precision.exists():
            _write(precision, size, partial(_curvature, pool, index), _metadata(folder / "base", target))


def _weights(pool: torch.Tensor, index: int, offset: int) -> torch.Tensor:
    base = _rolled(pool, offset) * 0.02
    return base if index == 0 else base + _rolled(pool, offset + 7919 * index) * 0.002


def _curvature(pool: torch.Tensor, index: int, offset: int) -> torch.Tensor:
    return PRIOR_PRECISION * (1 + torch.exp(_rolled(pool, offset + 104729 * index)))


def _rolled(pool: torch.Tensor, offset: int) -> torch.Tensor:
    return torch.roll(pool, -(offset % len(pool)))


def _write(path: Path, size: Size, values: Callable[[int], torch.Tensor], metadata: dict[str, str]) -> None:
    """One safetensors file; `values(offset)` gives the next pool of numbers from element `offset` on."""
    header: dict[str, object] = {"__metadata__": metadata}
    end = 0
    for name, shape in size.tensors():
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for offset in range(0, end // 2, _POOL):
            block = values(offset)[: end // 2 - offset].to(torch.bfloat16)
            file.write(block.view(torch.uint8).numpy().data)
    partial.rename(path)


def _metadata(base: Path, source: Path) -> dict[str, str]:
    """Strings for the header of a source's sidecar."""
    metadata = SidecarMetadata(
        family="diagonal",
        estimator="fisher",
        space="full",
        mean_fingerprint=_fingerprint(source),
        base_fingerprint=_fingerprint(base),
        prior_precision=PRIOR_PRECISION,
        loss_unit="token",
        num_examples=1000,
    )
    return metadata.to_metadata()


def _fingerprint(folder: Path) -> str:
    return fingerprint(read_header(folder / "model.safetensors").tensors)


def _config(size: Size) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "vocab_size": size.vocabulary,
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.hidden // 64,
        "num_key_value_heads": size.hidden // 64,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
