"""safetensors files that are damaged, hostile or no safetensors files at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import save_file

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.plan import plan_merge
from mergekit_bayes.merge.run import run_merge
from tests.bad_input.conftest import Refused
from tests.bad_input.site import Site
from tests.checkpoint.raw_files import field, raw_bytes

HUGE = 2**60
TWO = bytes(16)


def header(**tensors: object) -> dict[str, object]:
    return {"model.embed_tokens.weight": field("F32", [2], 0, 8), **tensors}


def text(source: str) -> bytes:
    return raw_bytes(source.encode())


FILES: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("has 0 bytes; a safetensors file has at least 8",)),
    "header of 2^63 bytes": (raw_bytes({}, length=2**63), ("claims a header of 9223372036854775808 bytes",)),
    "header of 100 MB + 1": (
        raw_bytes({}, length=100_000_001),
        ("claims a header of 100000001 bytes", "at most 100000000"),
    ),
    "header of 99 MB": (raw_bytes({}, length=99_000_000), ("claims a header of 99000000 bytes but has only 10 bytes",)),
    "trailing bytes": (raw_bytes(header(), bytes(9)), ("the last 1 belong to no tensor",)),
    "truncated": (raw_bytes(header(), bytes(7)), ("tensor model.embed_tokens.weight: ends at byte", "it is truncated")),
    "overlap": (
        raw_bytes(header(x=field("F32", [2], 4, 12)), bytes(12)),
        ("tensor x:", "overlaps the tensor before it"),
    ),
    "hole": (raw_bytes(header(x=field("F32", [1], 12, 16)), TWO), ("tensor x:", "leaves a hole before it")),
    "shape against offsets": (raw_bytes(header(x=field("F32", [3], 8, 16)), TWO), ("span 8 bytes; expected 12",)),
    "unknown dtype": (
        raw_bytes(header(x=field("F37", [2], 8, 16)), TWO),
        ("tensor x: its dtype is", "F37", "expected one of"),
    ),
    "packed dtype": (raw_bytes(header(x=field("F4", [2], 8, 9)), bytes(9)), ("dtype F4 packs several values",)),
    "shape overflow": (raw_bytes(header(x=field("F32", [HUGE, HUGE], 8, 16)), TWO), ("tensor x:", "64 bits")),
    "empty with a huge shape": (
        raw_bytes(header(x=field("F32", [HUGE, HUGE, 0], 8, 8)), bytes(8)),
        ("tensor x:", "64 bits"),
    ),
    "negative size": (raw_bytes(header(x=field("F32", [-2], 8, 16)), TWO), ("tensor x: its shape is [-2]",)),
    "metadata of numbers": (raw_bytes(header(__metadata__={"a": 1}), bytes(8)), ("__metadata__ holds 1 under a",)),
    "not UTF-8": (raw_bytes(b'{"\xff": 1}'), ("UTF-8",)),
    "not JSON": (text("{"), ("JSON",)),
    "200,000 deep": (text('{"a":' * 200_000 + "1" + "}" * 200_000), ("nested",)),
    "a tensor twice": (
        text(
            '{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
        )
        + bytes(4),
        ("twice", "x"),
    ),
    "metadata twice": (text('{"__metadata__":{},"__metadata__":{}}'), ("twice", "__metadata__")),
    "pickle": (b"PK\x03\x04" + bytes(40), ("looks like a pickle, which can run code when loaded",)),
    "Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\n", ("Git LFS pointer", "git lfs pull")),
    "web page": (b"<!DOCTYPE html><html>not found</html>", ("claims a header of",)),
}


@pytest.mark.parametrize(("content", "fragments"), FILES.values(), ids=FILES)
def test_a_damaged_checkpoint_is_refused(
    site: Site, refused: Refused, content: bytes, fragments: tuple[str, ...]
) -> None:
    (site.root / "one" / "model.safetensors").write_bytes(content)
    refused("{root}/recipe.yaml:1:", "{root}/one/model.safetensors", *fragments)


KINDS = {
    "sidecar": "one/precision.safetensors",
    "base": "base/model.safetensors",
    "adapter": "lora1/adapter_model.safetensors",
}


@pytest.mark.parametrize("file", KINDS.values(), ids=KINDS)
def test_a_truncated_file_of_any_kind_is_refused(site: Site, refused: Refused, file: str) -> None:
    if "lora" in file:
        site.use_adapters()
    path = site.root / file
    path.write_bytes(path.read_bytes()[:-1])
    refused(f"{{root}}/{file}", "it is truncated")


def test_a_folder_in_place_of_a_file_is_refused(site: Site, refused: Refused) -> None:
    (site.root / "one" / "model.safetensors").unlink()
    (site.root / "one" / "model.safetensors").mkdir()
    refused("{root}/one/model.safetensors")


def test_a_checkpoint_without_tensors_is_refused(site: Site, refused: Refused) -> None:
    save_file({}, site.root / "one" / "model.safetensors")
    refused("{root}/one: holds no tensors in model.safetensors")


def test_a_file_without_permission_to_read_is_refused(
    site: Site, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may read everything, so that the refusal of the system is played."""
    import os

    opened = os.open

    def deny(path: str, *arguments: int, **options: int) -> int:
        if str(path).endswith("one/model.safetensors"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", deny)
    refused("{root}/one/model.safetensors", "Permission denied")


CHANGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda file: file.write_bytes(file.read_bytes()[:-8]),
    "gone": lambda file: file.unlink(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("file", ["one/model.safetensors", "two/precision.safetensors"])
def test_a_file_that_changes_between_plan_and_merge_is_an_error_not_a_crash(
    site: Site, change: Callable[[Path], object], file: str
) -> None:
    """Where files are mapped into memory, this ends the process with SIGBUS."""
    plan = plan_merge(load_recipe(site.ask()), site.out)
    assert plan.job
    change(site.root / file)
    with pytest.raises(MergekitBayesError, match=file):
        run_merge(plan)
    assert not site.out.exists()


def test_a_header_says_nothing_about_paths_on_disk(site: Site) -> None:
    """Tensor names are never file names."""
    name = "../../outside\n"
    for model in ("base", "one", "two"):
        save_file({name: site.tensors(model)["lm_head.weight"]}, site.root / model / "model.safetensors")
        (site.root / model / "precision.safetensors").unlink(missing_ok=True)
    site.recipe["merge_method"] = "task_arithmetic"
    run_merge(plan_merge(load_recipe(site.ask()), site.out))
    files = {path.name for path in site.root.rglob("*")}
    assert not any("outside" in file for file in files)
    assert json.loads((site.out / "merge_report.json").read_text())["tensors"]["merged"] == 1
