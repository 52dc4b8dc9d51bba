"""Mixes that share a forward pass against models that are merged one at a time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mergekit_bayes import merge
from mergekit_bayes.errors import EvaluateError
from mergekit_bayes.preview.plans import MethodPlan, merge_recipe, plan_methods
from mergekit_bayes.preview.run import _loaded
from mergekit_bayes.preview.stacked import StackedAdapters, can_stack
from mergekit_bayes.recipe.preview import PreviewRecipe
from tests.preview.conftest import Recipes

MIXES = [(0.2, 0.3, 0.5), (1.0, 0.0, 0.0), (1.5, 0.5, 1.0), (0.0, 0.0, 0.0)]


def planned(recipe: Recipes, **changes: object) -> tuple[PreviewRecipe, MethodPlan]:
    loaded = _loaded(recipe(sources=3, **changes))
    return loaded, plan_methods(loaded)[0]


def test_rows_of_several_mixes_give_the_logits_of_merged_models(recipe: Recipes, llama: Path, tmp_path: Path) -> None:
    import peft
    import transformers

    loaded, method = planned(recipe)
    base = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    before = {name: (id(p), p.clone()) for name, p in base.named_parameters()}
    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    stacked = StackedAdapters(base, method, dtype=torch.float32)
    with torch.no_grad(), stacked.attached():
        stacked.choose(MIXES, rows=2)
        together = base(input_ids=ids.repeat(len(MIXES), 1)).logits.view(len(MIXES), 2, 9, -1)
    after = {name: (id(p), p) for name, p in base.named_parameters()}
    assert after.keys() == before.keys()
    assert all(after[name][0] == before[name][0] and after[name][1].equal(before[name][1]) for name in before)
    for mix, logits in zip(MIXES, together, strict=True):
        target = tmp_path / f"merged{mix}"
        merge(merge_recipe(loaded, method.spec, mix).resolved() if any(mix) else {}, target) if any(mix) else None
        model = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        if any(mix):
            model = peft.PeftModel.from_pretrained(model, target)
        with torch.no_grad():
            assert torch.allclose(logits, model.eval()(input_ids=ids).logits, atol=1e-5)


def test_what_is_the_same_for_every_mix_is_computed_once(recipe: Recipes, llama: Path) -> None:
    """The layers behind the embedding and its norm, and no others; also where the first batch was of one mix."""
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    stacked = StackedAdapters(base, planned(recipe)[1], dtype=torch.float32)
    seen: dict[str, list[int]] = {}
    for name, layer in stacked._layers.items():
        layer.base.register_forward_hook(
            lambda _module, inputs, _output, name=name: seen.setdefault(name, []).append(len(inputs[0]))
        )
    ids = torch.randint(0, 48, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), stacked.attached():
        for mixes in (MIXES[:1], MIXES, MIXES[:2]):
            stacked.choose(mixes, rows=2)
            base(input_ids=ids.repeat(len(mixes), 1))
        stacked.choose(MIXES, rows=2)
        other = torch.randint(0, 48, (8, 9), generator=torch.Generator().manual_seed(1))
        base(input_ids=other)  # rows that only look like those of several mixes
    first = {name: counts for name, counts in seen.items() if "layers.0.self_attn" in name and "o_proj" not in name}
    assert first
    assert all(counts == [2, 2, 2, 8] for counts in first.values())
    assert all(counts == [2, 8, 4, 8] for name, counts in seen.items() if name not in first)


def test_what_can_be_stacked(recipe: Recipes, llama: Path) -> None:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(llama)
    assert can_stack(planned(recipe)[1], base)
    assert can_stack(planned(recipe, methods=["linear"])[1], base)
    for method in ("posterior", "ties", {"merge_method": "task_arithmetic", "space": "full"}):
        assert not can_stack(planned(recipe, methods=[method])[1], base)
    assert not can_stack(planned(recipe, output={"rank": 2})[1], base)


def test_inputs_that_have_lost_their_rows_are_refused(recipe: Recipes, llama: Path) -> None:
    import transformers

    base = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    stacked = StackedAdapters(base, planned(recipe)[1], dtype=torch.float32)
    with torch.no_grad(), stacked.attached():
        stacked.choose(MIXES, rows=2)
        with pytest.raises(EvaluateError, match="mixes can only share a forward pass"):
            base(input_ids=torch.zeros(3, 4, dtype=torch.long))
