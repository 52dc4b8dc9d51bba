"""Reading a recipe is light: it imports neither the tensor libraries nor the code that opens checkpoints."""

from __future__ import annotations

import subprocess
import sys

FORBIDDEN = (
    "torch",
    "transformers",
    "peft",
    "numpy",
    "safetensors",
    "huggingface_hub",
    "mergekit_bayes.checkpoint",
    "mergekit_bayes.merge",
)


def test_a_recipe_is_read_without_heavy_imports() -> None:
    program = (
        "import sys\n"
        "from mergekit_bayes.recipe import MethodSchema, dump_yaml, load_recipe\n"
        "data = {'merge_method': 'linear', 'models': [{'model': 'a', 'parameters': {'weight': 1}}]}\n"
        "dump_yaml(load_recipe(data, methods=[MethodSchema('linear', base='unused')]).resolved())\n"
        f"print([name for name in {FORBIDDEN!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
