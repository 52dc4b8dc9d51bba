"""Words of mergekit's recipes that mean something there and cannot be followed here: each with what to do."""

from __future__ import annotations

_VOCABULARY = (
    "vocabularies are not rearranged; remove it: the output takes the base's tokenizer and all sources must "
    "share its vocabulary"
)

TOP_LEVEL_KEYS = {
    "slices": "stacking layers of different models is not supported; list whole models under `models`",
    "modules": "separate recipes per module are not supported; use filters under `parameters`, such as "
    "`weight: [{filter: vision_tower, value: 0}, {value: 0.5}]`",
    "tokenizer_source": _VOCABULARY,
    "tokenizer": _VOCABULARY,
    "chat_template": "the output takes the base's chat template; remove it and set another on the result",
    "name": "recipes of several stages are not supported; write one file per stage",
    "gate_mode": "recipes for mixtures of experts are not supported",
    "experts": "recipes for mixtures of experts are not supported",
}
"""Keys at the top of a mergekit recipe, and why they are refused."""

# fmt: off
METHODS = frozenset({
    "arcee_fusion", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "della_linear",
    "karcher", "model_stock", "multislerp", "nearswap", "nuslerp", "passthrough", "ram", "ramplus_tl", "sce",
    "slerp",
})
# fmt: on
"""mergekit's merge methods that are not implemented here."""

TRUE_WORDS = frozenset({"yes", "on", "y"})
"""Booleans of YAML 1.1, which mergekit's reader takes for true and YAML 1.2 for text."""

FALSE_WORDS = frozenset({"no", "off", "n"})
"""Booleans of YAML 1.1, which mergekit's reader takes for false and YAML 1.2 for text."""

DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "f16": "float16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "fp64": "float64",
    "f64": "float64",
    "double": "float64",
}
"""Short names of dtypes, which mergekit's recipes do not take either."""
