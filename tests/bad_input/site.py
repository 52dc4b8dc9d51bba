"""A sound merge, and the one question every test here asks: is it refused, in words, with nothing touched?

Each test breaks one thing of the sound merge. It is then asked for twice, from Python and through the command: both
must fail with the same message, which names what is at fault, what was seen and what was expected; the command ends
with exit code 2; and every file that was there is there unchanged, and no other.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mergekit_bayes.cli.main import main

from mergekit_bayes.errors import MergekitBayesError
from mergekit_bayes.merge.run import merge
from tests.merge.builders import (
    factor_names,
    random_precisions,
    random_tensors,
    snapshot,
    write_adapter,
    write_checkpoint,
    write_precisions,
)

SHAPES: Mapping[str, tuple[int, ...]] = {
    "model.embed_tokens.weight": (6, 4),
    "model.layers.0.q_proj.weight": (4, 4),
    "model.layers.1.q_proj.weight": (4, 4),
    "lm_head.weight": (6, 4),
}
IDS = {"model.ids": torch.arange(3)}
MODULES = ("model.layers.0.q_proj", "model.layers.1.q_proj")


@dataclass
class Site:
    """Folders `base`, `one`, `two` (full models with sidecars), `lora1`, `lora2`, and a recipe.

    Attributes:
        root: where everything lies.
        recipe: merges `one` and `two`; tests change it.
        out: the output folder asked for.
    """

    root: Path
    recipe: dict[str, Any]
    out: Path

    def use_adapters(self, **extra: object) -> None:
        """Merge the adapters instead."""
        self.recipe["models"] = [
            {"model": str(self.root / name), "parameters": {"weight": 0.5}} for name in ("lora1", "lora2")
        ]
        self.recipe.update({"precision": {"prior": 0.01}, **extra})

    def ask(self) -> Path:
        """Write the recipe and return its file."""
        file = self.root / "recipe.yaml"
        file.write_text(json.dumps(self.recipe))
        return file

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """What `write_site` stored for a full model."""
        seed = ("base", "one", "two").index(name)
        return {**random_tensors(seed, SHAPES), **IDS}


Break = Callable[[Site], object]


def write_site(root: Path) -> Site:
    """Everything sound."""
    site = Site(root, {}, root / "out")
    for seed, name in enumerate(("base", "one", "two")):
        write_checkpoint(root / name, site.tensors(name))
        if seed:
            facts = {"prior_precision": 0.5, "num_examples": 100, "base_model": "base"}
            write_precisions(root / name, random_precisions(seed, SHAPES, above=1.0), base=root / "base", **facts)
    for seed, name in enumerate(("lora1", "lora2"), start=1):
        write_lora(root, name, seed)
    models = [{"model": str(root / name), "parameters": {"weight": 0.5}} for name in ("one", "two")]
    site.recipe = {"merge_method": "gradient_matching", "base_model": str(root / "base"), "models": models}
    return site


def write_lora(root: Path, name: str, seed: int, **config: Any) -> None:
    """An adapter of rank 2 on both layers, with its sidecar."""
    shapes = {
        factor: shape
        for module in MODULES
        for factor, shape in zip(factor_names(module), ((2, 4), (4, 2)), strict=True)
    }
    factors = random_tensors(seed, shapes)
    pairs = {module: tuple(factors[factor] for factor in factor_names(module)) for module in MODULES}
    write_adapter(root / name, pairs, base=root / "base", **config)  # type: ignore[arg-type]
    write_precisions(root / name, random_precisions(seed, shapes, above=2.0), base=root / "base", num_examples=10)


def assert_refused(
    site: Site,
    *fragments: str,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...] = (),
    file: Path | None = None,
) -> str:
    """Refused from Python and by the command, with a message that has all fragments; nothing touched.

    Args:
        site: with one thing broken.
        fragments: parts of the message; `{root}` stands for the site's folder.
        capsys: pytest's capture.
        options: for the command, such as `--overwrite`.
        file: the recipe, if it is not the site's own.
    """
    recipe = site.ask() if file is None else file
    before = snapshot(site.root)
    with pytest.raises(MergekitBayesError) as caught:
        merge(recipe, site.out, overwrite="--overwrite" in options)
    message = str(caught.value)
    assert snapshot(site.root) == before
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(recipe), str(site.out), *options])
    printed = capsys.readouterr()
    assert ended.value.code == 2
    assert printed.err == f"{message}\n"
    assert printed.out == ""
    assert snapshot(site.root) == before
    for fragment in fragments:
        assert fragment.format(root=site.root) in message, message
    return message


def copy_of(site: Site) -> dict[str, Any]:
    """The recipe, to change and compare."""
    return copy.deepcopy(site.recipe)
