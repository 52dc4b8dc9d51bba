"""New heads whose start is missing, damaged, of something else, or not the same in all sources."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_bayes.checkpoint.initial import FRESH_NAME
from tests.bad_input.conftest import Refused
from tests.bad_input.site import MODULES, SHAPES, Site
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_tensors,
    tensor_infos,
    write_adapter,
    write_checkpoint,
    write_initial,
    write_precisions,
)

HEAD = {"score.weight": (3, 4), "score.bias": (3,)}
TOLD = {"architecture": "ToyForSequenceClassification", "labels": ["a", "b", "c"]}
NAMES = ("lora1", "lora2")


def use_heads(site: Site, **told: object) -> None:
    """Give the adapters of a site a head that its base has not; `told` goes into the header of the second."""
    site.use_adapters()
    for seed, name in enumerate(NAMES):
        drawn = [random_tensors(seed + 7 * index, {"a": (2, 4), "b": (4, 2)}) for index in range(len(MODULES))]
        factors = {module: (pair["a"], pair["b"]) for module, pair in zip(MODULES, drawn, strict=True)}
        header = {**TOLD, **(told if name == "lora2" else {})}
        write_adapter(site.root / name, factors, saved=random_tensors(seed, HEAD), base=site.root / "base", told=header)
        shapes = {tensor: info.shape for tensor, info in tensor_infos(site.root / name).items()}
        write_precisions(site.root / name, random_precisions(seed, shapes, above=2.0), base=site.root / "base")
        write_initial(site.root / name, random_tensors(9, HEAD), base=site.root / "base")


def initial(site: Site, name: str = "lora1") -> Path:
    return site.root / name / FRESH_NAME


def rewrite(change: Callable[[dict[str, torch.Tensor]], object], name: str = "lora1") -> Callable[[Site], object]:
    def edit(site: Site) -> None:
        tensors = load_file(initial(site, name))
        change(tensors)
        save_file(tensors, initial(site, name))

    return edit


def cut(site: Site) -> None:
    initial(site).write_bytes(initial(site).read_bytes()[:-4])


def link_away(site: Site) -> None:
    initial(site).rename(site.root / "elsewhere.safetensors")
    initial(site).symlink_to(site.root / "elsewhere.safetensors")


def another_base(site: Site) -> None:
    other = write_checkpoint(site.root / "other", random_tensors(8, SHAPES))
    write_initial(site.root / "lora1", random_tensors(9, HEAD), base=other)


def base_with_a_head(site: Site) -> None:
    """A base whose adapters do not know it by its fingerprint."""
    write_checkpoint(site.root / "base", {**read_tensors(site.root / "base"), **random_tensors(4, HEAD)})
    for name in NAMES:
        (site.root / name / "precision.safetensors").unlink()
        write_initial(site.root / name, random_tensors(9, HEAD))
    site.recipe["merge_method"] = "task_arithmetic"


CASES: Mapping[str, tuple[Callable[[Site], object], tuple[str, ...]]] = {
    "none": (
        lambda site: [initial(site, name).unlink() for name in NAMES],
        ("score.bias, score.weight: stored whole by {root}/lora1, {root}/lora2", f"expected {FRESH_NAME} beside them"),
    ),
    "none of one": (
        lambda site: initial(site).unlink(),
        ("score.bias, score.weight: stored whole by {root}/lora1, and {root}/base has nothing of that name",),
    ),
    "of one tensor only": (
        rewrite(lambda tensors: tensors.pop("score.bias")),
        ("score.bias: stored whole by {root}/lora1",),
    ),
    "another seed": (
        rewrite(lambda tensors: tensors.update(random_tensors(8, HEAD))),
        ("the heads started from different values ({root}/lora1; {root}/lora2); train with one training.seed",),
    ),
    "one value": (
        rewrite(lambda tensors: tensors["score.weight"][2, 3].add_(1)),
        ("score.weight: the heads started from different values",),
    ),
    "another dtype": (
        rewrite(lambda tensors: tensors.update({"score.weight": tensors["score.weight"].bfloat16()})),
        ("score.weight: the heads started from different values",),
    ),
    "another shape": (
        rewrite(lambda tensors: tensors.update({"score.bias": torch.zeros(2)})),
        (f"{{root}}/lora1/{FRESH_NAME}: score.bias has shape (2,); expected (3,), as trained",),
    ),
    "integers": (
        rewrite(lambda tensors: tensors.update({"score.bias": torch.zeros(3, dtype=torch.int8)})),
        (f"{{root}}/lora1/{FRESH_NAME}: tensor score.bias: its dtype is I8; expected a float type",),
    ),
    "cut off": (cut, (f"{{root}}/lora1/{FRESH_NAME}", "truncated")),
    "no safetensors": (
        lambda site: initial(site).write_bytes(b"PK\x03\x04" + b"\0" * 60),
        (f"{{root}}/lora1/{FRESH_NAME}: looks like a pickle",),
    ),
    "a link that leaves the folder": (link_away, (f"{{root}}/lora1/{FRESH_NAME}: is a link that leaves its folder",)),
    "of another base": (another_base, ("{root}/lora1: belongs to a base with fingerprint", "that of {root}/base")),
    "of what the base has": (
        base_with_a_head,
        ("{root}/lora1: its score.bias, score.weight started from values of its own", "{root}/base has such tensors"),
    ),
}


@pytest.mark.parametrize(("change", "fragments"), CASES.values(), ids=CASES)
def test_a_start_that_is_not_one_is_refused(
    site: Site, refused: Refused, change: Callable[[Site], object], fragments: tuple[str, ...]
) -> None:
    use_heads(site)
    change(site)
    refused(*fragments)


@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_a_start_of_another_seed_is_refused_in_every_space_in_one_line(
    site: Site, refused: Refused, space: str
) -> None:
    use_heads(site)
    rewrite(lambda tensors: tensors.update(random_tensors(8, HEAD)))(site)
    site.recipe["space"] = space
    assert len(refused("train with one training.seed").splitlines()) == 1


@pytest.mark.parametrize("method", ["gradient_matching", "linear"])
def test_values_that_are_no_numbers_are_refused(site: Site, refused: Refused, method: str) -> None:
    """Also where the method does not look at them: they would be passed on."""
    use_heads(site)
    for name in NAMES:
        rewrite(lambda tensors: tensors["score.weight"].fill_(float("nan")), name)(site)
    site.recipe["merge_method"] = method
    if method == "linear":
        del site.recipe["precision"]
    refused("score.weight: 12 of 12 values in", "NaN or infinite")


@pytest.mark.parametrize("labels", [["b", "a", "c"], ["a", "b"]])
@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_labels_that_differ_are_refused_with_both(site: Site, refused: Refused, space: str, labels: list[str]) -> None:
    use_heads(site, labels=labels)
    site.recipe["space"] = space
    seen = f"({{root}}/lora1: a, b, c; {{root}}/lora2: {', '.join(labels)})"
    assert len(refused(f"the labels of the sources differ {seen}").splitlines()) == 1


@pytest.mark.parametrize("told", [{"labels": "abc"}, {"labels": [1, 2]}, {"architecture": 3, "pad_token_id": "x"}])
def test_a_header_that_tells_nonsense_tells_nothing(site: Site, told: dict[str, object]) -> None:
    from mergekit_bayes.merge.run import merge

    use_heads(site, **told)
    report = merge(site.ask(), site.out).report
    assert report["tensors"]["started"] == sorted(HEAD)
    assert json.loads((site.out / "adapter_config.json").read_text())["modules_to_save"] == ["score"]


@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_the_sound_merge_succeeds(site: Site, space: str) -> None:
    from mergekit_bayes.merge.run import merge

    use_heads(site)
    site.recipe["space"] = space
    merge(site.ask(), site.out)
    assert load_file(site.out / FRESH_NAME).keys() == HEAD.keys()
