"""Make every artefact of the example: the base, three adapters, their precisions and the held-out text.

    OMP_NUM_THREADS=1 python examples/stdlib_lm/train.py [--stages tokenizer base adapters cards]

About an hour on one core that multiplies in bfloat16, several where the processor has to emulate that. Adapters and
precisions are made by the recipes in `recipes/finetune/stdlib_lm`. Seeds are fixed; the numbers depend on the Python
version (whose text this is) and, in the last digits, on the machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from corpus import DOMAINS, join, split_domain, write_training_text
from evaluate import ARTEFACTS, HELD_OUT, evaluate, held_out_tokens, load_model
from language_model import BASE_MIX, BASE_SCHEDULE, WINDOW, encode, new_model, train_tokenizer, training_texts
from optimisation import train
from publishing import ADAPTER_FILES, publish
from transformers import AutoTokenizer

from mergekit_bayes import finetune, load_recipe
from mergekit_bayes.recipe.finetune import FinetuneRecipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "finetune" / "stdlib_lm"


def make_tokenizer() -> None:
    """Write the tokenizer and the held-out text."""
    train_tokenizer(training_texts()).save_pretrained(ARTEFACTS / "base")
    HELD_OUT.mkdir(exist_ok=True)
    for domain in DOMAINS:
        (HELD_OUT / f"{domain}.txt").write_text(join(split_domain(domain).held_out), encoding="utf-8")


def make_base() -> None:
    """Pretrain the base and save it in bfloat16."""
    torch.manual_seed(BASE_SCHEDULE.seed)
    model = new_model()
    train(model, training_streams(), BASE_MIX, BASE_SCHEDULE, name="base")
    model.to(torch.bfloat16).save_pretrained(ARTEFACTS / "base")


def make_adapters() -> None:
    """Fine-tune one adapter per domain from the base as saved, with IVON-LoRA, by its recipe."""
    write_training_text()
    for domain in DOMAINS:
        recipe = load_recipe(RECIPES / f"{domain}.yaml", expect=FinetuneRecipe)
        with tempfile.TemporaryDirectory() as folder:
            result = finetune(recipe, Path(folder) / domain, progress=True)
            for name in ADAPTER_FILES:
                shutil.copyfile(result.folder / name, ARTEFACTS / domain / name)


def make_cards() -> None:
    """Measure every artefact on the held-out text and write its model card."""
    tokens = held_out_tokens()
    for name in ("base", *DOMAINS):
        losses = evaluate(load_model(ARTEFACTS / name), tokens)
        print(name, losses, flush=True)
        publish(ARTEFACTS / name, losses, window=WINDOW)


@cache
def training_streams() -> dict[str, torch.Tensor]:
    """Training tokens by domain."""
    tokenizer = AutoTokenizer.from_pretrained(ARTEFACTS / "base")
    return {name: encode(tokenizer, text) for name, text in training_texts().items()}


STAGES: dict[str, Callable[[], None]] = {
    "tokenizer": make_tokenizer,
    "base": make_base,
    "adapters": make_adapters,
    "cards": make_cards,
}


def main() -> None:
    """Run the chosen stages in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    chosen = parser.parse_args().stages
    os.chdir(ROOT)  # the recipes name their inputs relative to it
    for name, stage in STAGES.items():
        if name in chosen:
            stage()


if __name__ == "__main__":
    main()
