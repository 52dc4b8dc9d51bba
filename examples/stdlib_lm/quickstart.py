"""Merge the three adapters with every method and show what each merge does to each skill.

    python examples/stdlib_lm/quickstart.py [--full] [--keep FOLDER]

Nothing is trained or downloaded. Held-out text was seen neither by the base nor by an adapter.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
RECIPES = (
    "linear",
    "task_arithmetic",
    "hessian_weighted",
    "gradient_matching",
    "posterior",
)
MODELS = ("base", "code", "docs", "headers")


def main() -> None:
    """Evaluate what is there, merge, evaluate the merges, print one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="evaluate on all held-out text instead of its first part")
    parser.add_argument("--keep", type=Path, help="write the merges into this folder instead of a temporary one")
    options = parser.parse_args()
    os.chdir(ROOT)  # recipes name their inputs relative to the repository
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.keep or Path(temporary)
        compare(folder, characters=None if options.full else 50_000)


def compare(folder: Path, *, characters: int | None) -> None:
    """Merge by every recipe into `folder` and print the losses of all models."""
    import transformers
    from evaluate import ARTEFACTS, evaluate, held_out_tokens, load_model, loss_table
    from rich.console import Console

    from mergekit_bayes import merge

    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)  # PEFT's affair
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console()
    start = time.monotonic()
    tokens = held_out_tokens(characters=characters)
    losses = {name: evaluate(load_model(ARTEFACTS / name), tokens) for name in MODELS}
    for name in RECIPES:
        console.print(f"bayes-merge recipes/merge/{name}.yaml", highlight=False)
        merge(ROOT / "recipes" / "merge" / f"{name}.yaml", folder / name)
        losses[f"= {name}"] = evaluate(load_model(folder / name), tokens)
    console.print(loss_table(losses))
    console.print(f"{time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
