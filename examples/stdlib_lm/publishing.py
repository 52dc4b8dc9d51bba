"""What makes a folder of weights fit to be shared: a stable config, a model card, ordinary file modes."""

from __future__ import annotations

import json
from pathlib import Path

from corpus import DOMAINS

DESCRIPTIONS = {
    "base": "pretrained on Python outside the library proper, and a little of the reference and the headers",
    "code": "fine-tuned on the source of the Python standard library",
    "docs": "fine-tuned on the Python language reference (the topics of `pydoc_data`)",
    "headers": "fine-tuned on the C headers of CPython",
}

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "precision.safetensors", "finetune_recipe.yaml")
"""What is kept of a fine-tuning run: the posterior and how it was made."""

CARD = """---
license: apache-2.0
library_name: {library}
---
# stdlib_lm: {name}

{kind}, {description}.

Made by `examples/stdlib_lm/train.py` for the example beside it, from text of the Python distribution. It is far too
small and too briefly trained to be useful for anything but trying out merges on a CPU.

Held-out loss in nats per token ({window}-token windows, text in `held_out/`):

| {headings} |
| {rule} |
| {losses} |
"""


def publish(folder: Path, losses: dict[str, float], *, window: int) -> None:
    """Write the model card, sort the adapter's config and open the file modes of one artefact."""
    config = folder / "adapter_config.json"
    is_adapter = config.exists()
    if is_adapter:
        settings = json.loads(config.read_text(encoding="utf-8"))
        settings["base_model_name_or_path"] = "base"  # the folder beside its own
        config.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    card = CARD.format(
        library="peft" if is_adapter else "transformers",
        name=folder.name,
        kind="A LoRA adapter (rank 8) for `base`" if is_adapter else "A Llama of 1.8 million parameters in bfloat16",
        description=DESCRIPTIONS[folder.name],
        window=window,
        headings=" | ".join(DOMAINS),
        rule=" | ".join("---:" for _ in DOMAINS),
        losses=" | ".join(f"{losses[domain]:.3f}" for domain in DOMAINS),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")
    for path in sorted(folder.iterdir()):
        path.chmod(0o644)
