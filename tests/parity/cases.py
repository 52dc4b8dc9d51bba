"""Recipes in mergekit's grammar, each with the tiny models it merges.

In every case the recipe is read with its models in the current folder: `base`, `one`, `two` and `three` (the
base, moved by seeds 1 to 3) and `adapter` (a LoRA adapter of the base). The outputs of mergekit 0.1.5 are
committed in `golden/`; `regenerate.py` makes them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden"


@dataclass(frozen=True)
class Case:
    """One merge that both programs can do.

    Args:
        name: names the golden file.
        recipe: YAML text.
        architecture: key of `tests.tiny_models.TINY_MODELS`.
        dtype: dtype of every input checkpoint.
        max_shard_size: of every input checkpoint.
        dropped: substrings of the names of tensors that mergekit leaves out of its output without a word.
        cuts: sources and their densities, where differences of 16-bit weights repeat: which of the entries as large
            as the smallest one kept are kept is up to an unstable sort in mergekit, and no two processors need agree.
    """

    name: str
    recipe: str
    architecture: str = "llama"
    dtype: str = "bfloat16"
    max_shard_size: str = "5GB"
    dropped: tuple[str, ...] = ()
    cuts: tuple[tuple[str, float], ...] = ()

    @property
    def golden(self) -> Path:
        """The committed output of mergekit."""
        return GOLDEN / f"{self.name}.safetensors"


LINEAR_TWO = """
merge_method: linear
models:
  - model: one
    parameters: {weight: 0.6}
  - model: two
    parameters: {weight: 0.4}
"""

TASK_ARITHMETIC_TWO = """
merge_method: task_arithmetic
base_model: base
models:
  - model: one
    parameters: {weight: 0.7}
  - model: two
    parameters: {weight: 0.5}
"""

LINEAR_THREE = """
merge_method: linear
models:
  - model: one
    parameters: {weight: 1}
  - model: two
    parameters: {weight: 2.0}
  - model: three
    parameters: {weight: 0.5}
"""

# weights that vary with the layer, numbers between the points of the list
LINEAR_GRADIENT = """
merge_method: linear
models:
  - model: one
    parameters: {weight: [0.0, 0.5, 1.0]}
  - model: two
    parameters: {weight: [1.0, 0.25]}
"""

LINEAR_FILTERS = """
merge_method: linear
models:
  - model: one
    parameters:
      weight:
        - {filter: self_attn, value: 0.75}
        - {filter: mlp, value: [0.25, 1.0]}
        - value: 0.5
  - model: two
    parameters: {weight: 0.5}
dtype: float32
"""

TASK_ARITHMETIC_THREE = """
merge_method: task_arithmetic
base_model: base
models:
  - model: one
    parameters: {weight: 0.3}
  - model: two
    parameters: {weight: 0.9}
  - model: three
    parameters: {weight: 0.4}
"""

TASK_ARITHMETIC_GRADIENT = """
merge_method: task_arithmetic
base_model: base
models:
  - model: one
    parameters: {weight: [0.2, 1.0, 0.4, 0.0]}
  - model: two
    parameters: {weight: [1.0, 0.0]}
"""

TASK_ARITHMETIC_FILTERS = """
merge_method: task_arithmetic
base_model: base
models:
  - model: one
    parameters:
      weight:
        - {filter: q_proj, value: [0.0, 1.0]}
        - {filter: layers.1., value: 0.5}
        - {filter: "*", value: 0.25}
  - model: two
    parameters:
      weight:
        - {filter: embed_tokens, value: 0.0}
        - value: [0.1, 0.9]
dtype: float32
"""

# a source that sets nothing takes the recipe's own parameters; the base among the models is not a source
TASK_ARITHMETIC_BASE_LISTED = """
merge_method: task_arithmetic
base_model: base
models:
  - model: base
  - model: one
  - model: two
    parameters: {weight: 0.25}
parameters: {weight: 0.5}
"""

TASK_ARITHMETIC_SCIENTIFIC = """
merge_method: task_arithmetic
base_model: base
models:
  - model: one
    parameters: {weight: 5e-1}
  - model: two
    parameters: {weight: 1.0e-1}
parameters: {density: 1.0, rescale: false, int8_mask: true}
dtype: float32
"""

TIES_THREE = """
merge_method: ties
base_model: base
models:
  - model: one
    parameters: {weight: 0.5, density: 0.5}
  - model: two
    parameters: {weight: 0.3, density: 0.3}
  - model: three
    parameters: {weight: 1.0, density: 0.75}
"""

# a source without a density takes the recipe's; densities vary with layer and name
TIES_GRADIENT = """
merge_method: ties
base_model: base
models:
  - model: one
    parameters: {weight: [0.2, 1.0], density: [0.1, 0.9, 0.3]}
  - model: two
    parameters:
      weight: 1.0
      density:
        - {filter: mlp, value: 0.25}
        - {filter: norm, value: 1.0}
  - model: three
    parameters: {weight: 0.75}
parameters: {density: [0.8, 0.4]}
"""

TIES_ADAPTER = """
merge_method: ties
base_model: base
models:
  - model: base+adapter
    parameters: {weight: 0.8, density: 0.6}
  - model: one
    parameters: {weight: 0.4, density: 0.2}
"""

LINEAR_ADAPTER = """
merge_method: linear
models:
  - model: base+adapter
    parameters: {weight: 0.5}
  - model: one
    parameters: {weight: 0.5}
"""

TASK_ARITHMETIC_ADAPTER = """
merge_method: task_arithmetic
base_model: base
models:
  - model: base+adapter
    parameters: {weight: 0.8}
  - model: one
    parameters: {weight: 0.4}
"""

# mergekit's table of the Llama architecture has no attention biases; what is not in the table is not written
_BIASES = ("q_proj.bias", "k_proj.bias", "v_proj.bias", "o_proj.bias")
# mergekit has no table for ViT: it takes the names from the model inside transformers 5, where the layers of
# a checkpoint in the hub's format have other names, and leaves out what it does not find
_VIT_LAYERS = ("vit.encoder.layer.",)


def _options(recipe: str, **options: str) -> str:
    return recipe + "".join(f"{key}: {value}\n" for key, value in options.items())


_DEEP = "llama_deep"
_GRAMMAR = (
    Case("linear-three", LINEAR_THREE),
    Case("linear-three-not-normalized", _options(LINEAR_THREE, parameters="{normalize: false}")),
    Case("linear-gradient", LINEAR_GRADIENT, _DEEP),
    Case("linear-filters", LINEAR_FILTERS, _DEEP),
    Case("linear-float32-to-float16", _options(LINEAR_TWO, dtype="float32", out_dtype="float16")),
    Case("linear-float16", _options(LINEAR_TWO, dtype="float16")),
    Case("linear-float16-inputs", LINEAR_TWO, dtype="float16"),
    Case("linear-float64", _options(LINEAR_TWO, dtype="float64"), dtype="float32"),
    Case("linear-adapter", LINEAR_ADAPTER, dtype="float32"),
    Case("task-arithmetic-three", TASK_ARITHMETIC_THREE),
    Case("task-arithmetic-lambda", _options(TASK_ARITHMETIC_THREE, parameters="{lambda: 0.5}")),
    Case("task-arithmetic-normalized", _options(TASK_ARITHMETIC_THREE, parameters="{normalize: true}")),
    Case(
        "task-arithmetic-lambda-gradient",
        _options(TASK_ARITHMETIC_TWO, parameters="{lambda: [0.0, 1.0], normalize: true}"),
        _DEEP,
    ),
    Case("task-arithmetic-negative", TASK_ARITHMETIC_TWO.replace("0.5", "-0.5")),
    Case("task-arithmetic-gradient", TASK_ARITHMETIC_GRADIENT, _DEEP),
    Case("task-arithmetic-filters", TASK_ARITHMETIC_FILTERS, _DEEP),
    Case("task-arithmetic-base-listed", TASK_ARITHMETIC_BASE_LISTED),
    Case("task-arithmetic-scientific", TASK_ARITHMETIC_SCIENTIFIC),
    Case(
        "task-arithmetic-float32-to-bfloat16",
        _options(TASK_ARITHMETIC_THREE, dtype="float32", out_dtype="bfloat16"),
    ),
    Case("task-arithmetic-float16", _options(TASK_ARITHMETIC_TWO, dtype="float16")),
    Case("task-arithmetic-float64", _options(TASK_ARITHMETIC_TWO, dtype="float64"), dtype="float32"),
    Case("task-arithmetic-float32-inputs", TASK_ARITHMETIC_TWO, dtype="float32"),
    Case("task-arithmetic-adapter", TASK_ARITHMETIC_ADAPTER, dtype="float32"),
)

# elections and trims jump where rounding decides them, so both programs must round alike: everything in float32
_TIES = (
    Case("ties-three", TIES_THREE, dtype="float32"),
    Case("ties-three-not-normalized", _options(TIES_THREE, parameters="{normalize: false}"), dtype="float32"),
    Case(
        "ties-three-lambda",
        _options(TIES_THREE, parameters="{lambda: 0.4, int8_mask: true, rescale: true}"),
        dtype="float32",
    ),
    Case("ties-negative", TIES_THREE.replace("0.3, density: 0.3", "-0.3, density: 0.9"), dtype="float32"),
    Case("ties-nothing-kept", TIES_THREE.replace("density: 0.5", "density: 0.0"), dtype="float32"),
    Case("ties-whole", re.sub(", density: [0-9.]+", "", TIES_THREE), dtype="float32"),
    Case("ties-gradient", TIES_GRADIENT, _DEEP, dtype="float32"),
    Case("ties-adapter", TIES_ADAPTER, dtype="float32"),
    Case("ties-float32-to-bfloat16", _options(TIES_THREE, dtype="float32", out_dtype="bfloat16"), dtype="float32"),
    Case(
        "ties-bfloat16-inputs",
        _options(TIES_THREE, dtype="float32"),
        cuts=(("one", 0.5), ("two", 0.3), ("three", 0.75)),
    ),
    Case("ties-on-gpt2", TIES_THREE, "gpt2", dtype="float32", max_shard_size="8KB"),
)

# mergekit does task arithmetic in the dtype of the inputs unless told otherwise
_TASK_ARITHMETIC_FLOAT32 = _options(TASK_ARITHMETIC_TWO, dtype="float32", out_dtype="bfloat16")
_ARCHITECTURES = (
    ("llama", "5GB", ()),
    ("llama_tied", "8KB", ()),
    ("llama_bias", "5GB", _BIASES),
    ("qwen2", "8KB", ()),
    ("qwen2_tied", "5GB", ()),
    ("mistral", "8KB", ()),
    ("gemma2", "8KB", ()),
    ("gpt2", "8KB", ()),
    ("bert", "5GB", ()),
    ("vit", "8KB", _VIT_LAYERS),
    ("vit_renamed", "8KB", ()),
    ("mixtral", "8KB", ()),
    ("mixtral_fused", "8KB", ()),
)

_ON_ARCHITECTURES = tuple(
    Case(f"{method}-on-{architecture}", recipe, architecture, max_shard_size=size, dropped=dropped)
    for architecture, size, dropped in _ARCHITECTURES
    for method, recipe in (("linear", LINEAR_TWO), ("task-arithmetic", _TASK_ARITHMETIC_FLOAT32))
)

CASES: tuple[Case, ...] = (*_GRAMMAR, *_TIES, *_ON_ARCHITECTURES)
