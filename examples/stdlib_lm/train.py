"""Make every artefact of the example: the base, three adapters, their precisions and the held-out text.

    OMP_NUM_THREADS=1 python examples/stdlib_lm/train.py [--stages tokenizer base adapters precisions cards]

About an hour on one core. Seeds are fixed; the numbers depend on the Python version (whose text this is) and,
in the last digits, on the machine.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import cache

import torch
from adapter_precision import make_precision
from corpus import DOMAINS, join, split_domain
from evaluate import ARTEFACTS, HELD_OUT, evaluate, held_out_tokens, load_model
from language_model import (
    BASE_MIX,
    BASE_SCHEDULE,
    WINDOW,
    adapter_schedule,
    encode,
    new_adapter,
    new_model,
    train_tokenizer,
    training_texts,
)
from optimisation import train
from publishing import publish
from transformers import AutoTokenizer


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
    """Fine-tune one LoRA adapter per domain from the base as saved."""
    streams = training_streams()
    for seed, domain in enumerate(DOMAINS, start=11):
        model = new_adapter(ARTEFACTS / "base", seed=seed)
        train(model, streams, {domain: 1.0}, adapter_schedule(domain, seed=seed), name=domain)
        model.save_pretrained(ARTEFACTS / domain, save_embedding_layers=False)


def make_precisions() -> None:
    """Estimate the precision of every adapter."""
    streams = training_streams()
    for domain in DOMAINS:
        make_precision(domain, streams[domain])


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
    "precisions": make_precisions,
    "cards": make_cards,
}


def main() -> None:
    """Run the chosen stages in order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    chosen = parser.parse_args().stages
    for name, stage in STAGES.items():
        if name in chosen:
            stage()


if __name__ == "__main__":
    main()
