"""Adapters that are not plain LoRA, or do not belong to the base they are merged on."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.bad_input.conftest import Refused
from tests.bad_input.site import SHAPES, Site
from tests.merge.builders import PREFIX, random_tensors, read_json, write_adapter, write_checkpoint

CONFIG = "lora1/adapter_config.json"
WEIGHTS = "lora1/adapter_model.safetensors"
Q0 = "model.layers.0.q_proj"


def configure(folder: str = "lora1", **changes: Any) -> Callable[[Site], object]:
    def change(site: Site) -> None:
        path = site.root / folder / "adapter_config.json"
        path.write_text(json.dumps({**read_json(path), **changes}))

    return change


def rewrite(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Site], object]:
    def edit(site: Site) -> None:
        tensors = load_file(site.root / WEIGHTS)
        change(tensors)
        save_file(tensors, site.root / WEIGHTS)

    return edit


def another_base(site: Site) -> None:
    write_checkpoint(site.root / "base", {**site.tensors("base"), **random_tensors(9, SHAPES)})


def fewer_layers(site: Site) -> None:
    tensors = {name: value for name, value in site.tensors("base").items() if "layers.1" not in name}
    write_checkpoint(site.root / "base", tensors)
    for name in ("lora1", "lora2"):
        (site.root / name / "precision.safetensors").unlink()
    site.recipe["merge_method"] = "task_arithmetic"


def another_width(site: Site) -> None:
    write_adapter(site.root / "lora1", {Q0: (torch.ones(2, 5), torch.ones(4, 2))})
    (site.root / "lora1" / "precision.safetensors").unlink()
    site.recipe["merge_method"] = "task_arithmetic"


def no_numbers(site: Site) -> None:
    rewrite(lambda tensors: tensors[A].fill_(float("nan")))(site)
    (site.root / "lora1" / "precision.safetensors").unlink()
    site.recipe["merge_method"] = "task_arithmetic"


def as_pickle(site: Site) -> None:
    (site.root / WEIGHTS).rename(site.root / "lora1" / "adapter_model.bin")


def different_ranks(site: Site) -> None:
    write_adapter(site.root / "lora1", {Q0: (torch.ones(1, 4), torch.ones(4, 1))})
    (site.root / "lora1" / "precision.safetensors").unlink()
    site.recipe.update(merge_method="linear", space="factor")


A = f"{PREFIX}{Q0}.lora_A.weight"
CASES: Mapping[str, tuple[Callable[[Site], object], tuple[str, ...]]] = {
    "DoRA": (configure(use_dora=True), (f"{{root}}/{CONFIG}: use_dora is True, which is not supported: DoRA",)),
    "lora_bias": (configure(lora_bias=True), (f"{{root}}/{CONFIG}: lora_bias is True",)),
    "bias": (configure(bias="all"), (f"{{root}}/{CONFIG}: bias is 'all'; expected none",)),
    "another method": (configure(peft_type="IA3"), (f"{{root}}/{CONFIG}: peft_type is 'IA3'; expected LORA",)),
    "target_parameters": (configure(target_parameters=["w"]), (f"{{root}}/{CONFIG}: target_parameters is",)),
    "token rows": (configure(trainable_token_indices=[1]), (f"{{root}}/{CONFIG}: trainable_token_indices is",)),
    "replicated layers": (configure(layer_replication=[[0, 1]]), (f"{{root}}/{CONFIG}: layer_replication is",)),
    "PiSSA": (configure(init_lora_weights="pissa"), (f"{{root}}/{CONFIG}: init_lora_weights is 'pissa'",)),
    "a variant of later": (
        configure(use_newlora=True),
        (f"{{root}}/{CONFIG}: use_newlora is True; expected a plain LoRA",),
    ),
    "rank": (configure(r=3), (f"{{root}}/{WEIGHTS}: module {Q0}: its rank is 2; expected 3",)),
    "no JSON": (lambda site: (site.root / CONFIG).write_text("{"), (f"{{root}}/{CONFIG}", "JSON")),
    "half a pair": (
        rewrite(lambda t: t.pop(A)),
        (f"{{root}}/{WEIGHTS}: module {Q0}: has only", "expected a factor A and a factor B"),
    ),
    "shapes": (rewrite(lambda t: t.update({A: torch.ones(3, 4)})), (f"module {Q0}: A is (3, 4) and B is (4, 2)",)),
    "convolution": (rewrite(lambda t: t.update({A: torch.ones(2, 4, 1, 1)})), ("no LoRA of convolutions",)),
    "integers": (
        rewrite(lambda t: t.update({A: torch.ones(2, 4, dtype=torch.int8)})),
        (f"tensor {A}: its dtype is I8; expected a float",),
    ),
    "foreign names": (
        rewrite(lambda t: t.update(other=torch.ones(2))),
        ("tensor other: expected a name that starts with base_model.model.",),
    ),
    "unknown factors": (
        rewrite(lambda t: t.update({f"{PREFIX}{Q0}.lora_magnitude_vector": torch.ones(2)})),
        ("belongs to an unsupported LoRA variant",),
    ),
    "pickle": (as_pickle, ("{root}/lora1: holds only a pickle (adapter_model.bin), which can run code when loaded",)),
    "no weights": (lambda site: (site.root / WEIGHTS).unlink(), (f"{{root}}/{WEIGHTS}: is missing",)),
    "another base": (another_base, ("{root}/lora1", "fingerprint blake2b-16:", "expected blake2b-16:")),
    "fewer layers": (fewer_layers, ("{root}/lora1: adapts model.layers.1.q_proj", "has no such")),
    "another width": (another_width, (f"{{root}}/lora1: {Q0} updates a weight of shape (4, 5)", "(4, 4)")),
    "NaN": (no_numbers, (Q0, "NaN or infinite")),
    "different ranks in factor space": (
        different_ranks,
        (f"{Q0}: rank 2 in {{root}}/lora2, 1 in {{root}}/lora1", "use space: product"),
    ),
    "product without a prior": (
        lambda site: site.recipe.pop("precision"),
        ("precision.prior", "those belong to the LoRA factors", "expected a number"),
    ),
    "product of full models": (
        lambda site: site.recipe.update(
            space="product", models=[{**m, "model": str(site.root / "two")} for m in site.recipe["models"][:1]]
        ),
        ("space", "product merges adapters, but {root}/two is a full model"),
    ),
    "an adapter on an adapter": (
        lambda site: site.recipe["models"][0].update(model=f"{site.root}/lora1+{site.root}/lora2"),
        ("lora1 is itself an adapter; expected a full model before the `+`",),
    ),
}


@pytest.mark.parametrize(("change", "fragments"), CASES.values(), ids=CASES)
def test_an_adapter_that_is_not_plain_or_not_ours_is_refused(
    site: Site, refused: Refused, change: Callable[[Site], object], fragments: tuple[str, ...]
) -> None:
    site.use_adapters()
    change(site)
    refused(*fragments)


@pytest.mark.parametrize("space", ["product", "factor", "full"])
def test_another_base_is_refused_in_every_space(site: Site, refused: Refused, space: str) -> None:
    site.use_adapters(space=space)
    another_base(site)
    refused("{root}/lora1", "fingerprint blake2b-16:", "expected blake2b-16:")


def test_an_adapter_keeps_its_own_faults_to_itself(site: Site, refused: Refused) -> None:
    """All faults of both adapters in one message."""
    site.use_adapters()
    configure(use_dora=True)(site)
    configure("lora2", use_dora=True, bias="all")(site)
    message = refused("lora1/adapter_config.json: use_dora", "lora2/adapter_config.json: use_dora", "bias is 'all'")
    assert len(message.splitlines()) == 3
