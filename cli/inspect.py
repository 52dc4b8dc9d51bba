"""`bayes-merge inspect PATH`: what a folder or file of weights is."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .failure import exit_codes

if TYPE_CHECKING:
    from mergekit_bayes.checkpoint.adapter import LoraModule
    from mergekit_bayes.checkpoint.header import TensorInfo
    from mergekit_bayes.checkpoint.sidecar import Sidecar


@dataclasses.dataclass(frozen=True)
class _Part:
    """One thing found: its title, what is known about it, its tensors."""

    title: str
    facts: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]


def inspect(
    path: Annotated[Path, typer.Argument(help="Checkpoint, adapter, sidecar or safetensors file.", show_default=False)],
    *,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
) -> None:
    """Show what a checkpoint, an adapter or a sidecar holds."""
    with exit_codes():
        for part in _file(path) if path.is_file() else _folder(path):
            print("\n".join(_lines(part, listing=tensors)))


def _folder(path: Path) -> Iterator[_Part]:
    from mergekit_bayes.checkpoint.adapter import is_adapter, open_adapter
    from mergekit_bayes.checkpoint.index import open_checkpoint
    from mergekit_bayes.checkpoint.sidecar import find_sidecar

    sidecar = find_sidecar(path)
    if is_adapter(path):
        adapter = open_adapter(path)
        base = adapter.config.get("base_model_name_or_path")
        modules = _modules(adapter.modules.values())
        facts = {"base": base, "modules": modules, "saved whole": ", ".join(adapter.saved) or None}
        yield _Part(f"{path}: LoRA adapter", facts, adapter.tensors)
    elif sidecar is None or (path / "config.json").exists():
        checkpoint = open_checkpoint(path)
        facts = {"model_type": checkpoint.config.get("model_type"), "files": len(checkpoint.files)}
        yield _Part(f"{path}: checkpoint", facts, checkpoint.tensors)
    if sidecar is not None:
        yield _sidecar(sidecar)


def _file(path: Path) -> Iterator[_Part]:
    from mergekit_bayes.checkpoint.header import read_header
    from mergekit_bayes.checkpoint.sidecar_metadata import METADATA_KEY

    if path.suffix == ".json":
        yield _sidecar(path)
        return
    header = read_header(path)
    if METADATA_KEY in header.metadata:
        yield _sidecar(path)
    else:
        yield _Part(f"{path}: safetensors file", header.metadata, header.tensors)


def _sidecar(path: Path) -> _Part:
    from mergekit_bayes.checkpoint.sidecar import open_sidecar

    sidecar = open_sidecar(path)
    facts = dataclasses.asdict(sidecar.metadata)
    if sidecar.metadata.family == "kronecker":
        facts = {"factors": _factors(sidecar), **facts}
    return _Part(f"{path}: precision sidecar", facts, sidecar.tensors)


def _factors(sidecar: Sidecar) -> str:
    """How many layers have which factors, and how many tensors none."""
    from mergekit_bayes.checkpoint.kronecker_tensors import PARTS, factored_weights, kronecker_tensors

    kinds: Counter[str] = Counter()
    terms = 0
    layers = factored_weights(sidecar.tensors)
    for weight in layers:
        found = kronecker_tensors(sidecar, weight)
        assert found is not None  # the weight has factors
        held = [part.replace("_", " ") for part, info in zip(PARTS, found, strict=True) if info is not None]
        kinds[" and ".join(held)] += 1
        terms = max(terms, found.terms)
    rest = len(sidecar.tensors) - sum(len(parts) for parts in layers.values())
    told = [f"{count} layers with {kind}" for kind, count in sorted(kinds.items())]
    told += [f"up to {terms} terms"] if terms > 1 else []
    return ", ".join([*told, f"{rest} diagonals"])


def _modules(modules: Iterable[LoraModule]) -> str:
    counts = Counter((module.rank, module.scaling) for module in modules)
    return ", ".join(f"{count} of rank {rank}, scaling {s:g}" for (rank, s), count in sorted(counts.items()))


def _lines(part: _Part, *, listing: bool) -> Iterator[str]:
    from mergekit_bayes.checkpoint.disk import format_bytes
    from mergekit_bayes.checkpoint.fingerprint import fingerprint

    infos = part.tensors.values()
    dtypes = Counter(info.dtype for info in infos)
    facts = {
        "tensors": f"{len(infos)}: {', '.join(f'{count} {dtype}' for dtype, count in sorted(dtypes.items()))}",
        "parameters": f"{sum(info.numel for info in infos):,}",
        "size": format_bytes(sum(info.nbytes for info in infos)),
        "fingerprint": fingerprint(part.tensors),
    }
    yield part.title
    for name, fact in {**facts, **part.facts}.items():
        if fact is not None:
            yield f"  {name:<18}{fact}"
    for info in infos if listing else ():
        yield f"    {info.dtype:<6}{'x'.join(map(str, info.shape)) or 'scalar':<16}{info.name}"
