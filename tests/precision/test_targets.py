"""What estimators are told to look at."""

from __future__ import annotations

import pytest
from torch import nn

from mergekit_bayes.errors import ModelError
from mergekit_bayes.precision.targets import Layer, Targets, Weight, count, factored_only, find_targets
from tests.precision.small_models import Softmax, adapted, whole

BOTH = ("input", "output")


def names(targets: Targets) -> tuple[set[str], set[str]]:
    return {weight.name for weight in targets.weights}, {layer.name for layer in targets.layers}


def test_a_full_model_is_described_by_the_first_names_of_its_parameters() -> None:
    model = whole("llama_tied")
    assert names(find_targets(model, space="full")) == ({name for name, _ in model.named_parameters()}, set())
    model.model.norm.weight.requires_grad_(False)
    assert "model.norm.weight" not in names(find_targets(model, space="full"))[0]
    assert names(find_targets(model, space="full", names=["model.norm.weight"])) == ({"model.norm.weight"}, set())


@pytest.mark.parametrize(("name", "head"), [("llama", True), ("llama_tied", False)])
def test_linear_layers_have_factors_unless_they_share_their_weight(name: str, head: bool) -> None:
    targets = find_targets(whole(name), space="full", factors=BOTH)
    weights, layers = names(targets)
    assert ("lm_head.weight" in layers) == head
    assert "model.embed_tokens.weight" in weights
    assert "model.layers.0.mlp.down_proj.weight" in layers
    assert all(layer.factored for layer in targets.layers)
    (down,) = (layer for layer in targets.layers if layer.name == "model.layers.0.mlp.down_proj.weight")
    assert down == Layer("model.layers.0.mlp.down_proj.weight", "model.layers.0.mlp.down_proj", 16, 24, factored=True)


def test_layers_that_are_too_wide_fall_to_the_diagonal() -> None:
    both = find_targets(whole("llama"), space="full", factors=BOTH, max_dimension=24)
    assert "lm_head.weight" in names(both)[0]  # 48 outputs
    inputs = find_targets(whole("llama"), space="full", factors=("input",), max_dimension=24)
    assert "lm_head.weight" in names(inputs)[1]  # its 16 inputs are few enough
    product = find_targets(adapted("llama", ["q_proj", "down_proj"]), space="product", factors=BOTH, max_dimension=16)
    assert {layer.name: layer.factored for layer in product.layers if ".0." in layer.name} == {
        "model.layers.0.self_attn.q_proj.weight": True,
        "model.layers.0.mlp.down_proj.weight": False,
    }
    assert {layer.name for layer in factored_only(product).layers} == {
        f"model.layers.{n}.self_attn.q_proj.weight" for n in (0, 1)
    }


def test_layers_stored_transposed_are_described_as_out_by_in() -> None:
    targets = find_targets(whole("gpt2"), space="full", factors=BOTH)
    (layer,) = (each for each in targets.layers if each.name == "transformer.h.0.attn.c_attn.weight")
    assert layer.shape == (48, 16)


def test_products_have_the_names_of_the_base() -> None:
    model = adapted("bert", ["query"], modules_to_save=["classifier"])
    weights, layers = names(find_targets(model, space="product"))
    base = {name for name, _ in whole("bert").named_parameters()}
    assert weights == {"classifier.weight", "classifier.bias"} <= base
    assert layers == {f"bert.encoder.layer.{n}.attention.self.query.weight" for n in (0, 1)} <= base
    assert find_targets(model, space="product", factors=BOTH).layers[0].factored
    factor = find_targets(model, space="factor")
    assert len(factor.weights) == 6
    assert not factor.layers


def test_an_adapted_embedding_has_no_factors() -> None:
    targets = find_targets(adapted("llama", ["embed_tokens", "q_proj"]), space="product", factors=BOTH)
    (embedding,) = (layer for layer in targets.layers if layer.embedding)
    assert embedding == Layer("model.embed_tokens.weight", "base_model.model.model.embed_tokens", 48, 16, True, False)


def test_what_is_refused() -> None:
    with pytest.raises(ModelError, match="product or full"):
        find_targets(adapted("llama", ["q_proj"]), space="factor", factors=BOTH)
    with pytest.raises(ModelError, match="expected an adapted layer"):
        find_targets(whole("llama"), space="product")
    with pytest.raises(ModelError, match="no linear layer to describe; expected one whose factors have no side longer"):
        find_targets(Softmax(), space="full", factors=BOTH, max_dimension=2)
    with pytest.raises(ModelError, match="a parameter that requires gradients"):
        find_targets(nn.Identity(), space="full")


def test_groups_keep_the_order_and_the_bound() -> None:
    targets = find_targets(whole("llama"), space="full", factors=BOTH)
    groups = list(targets.groups(1000, count))
    assert len(groups) > 2
    assert all(sum(count(each) for each in (*group.layers, *group.weights)) <= 1000 for group in groups)
    assert sum((group.layers for group in groups), ()) == targets.layers
    assert sum((group.weights for group in groups), ()) == targets.weights
    assert {group.space for group in groups} == {"full"}
    alone = list(targets.groups(1, count))
    assert all(len(group.layers) + len(group.weights) == 1 for group in alone)
    assert list(Targets("full", (Weight("a", "a", (2,)),)).groups(100, count)) == [
        Targets("full", (Weight("a", "a", (2,)),))
    ]
