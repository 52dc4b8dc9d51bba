"""What is trained here: the tokenizer and the base, their text and schedule."""

from __future__ import annotations

import torch
from corpus import DOMAINS, SEPARATOR, join, read_other_code, split_domain, without_paragraphs_of
from optimisation import Schedule
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
WINDOW = 256

# The base has seen Python, but not the library itself, and hardly any of the rest: the smaller texts are so small
# that a base which sees more of them learns them by heart, and leaves an adapter nothing to gain on new documents.
BASE_MIX = {"other_code": 0.94, "docs": 0.03, "headers": 0.03}
BASE_SCHEDULE = Schedule(steps=500, batch=16, learning_rate=4e-3, weight_decay=0.1, warmup=60, seed=1)


def training_texts() -> dict[str, str]:
    """The training text of every domain and of `other_code`, none of it containing a held-out paragraph."""
    splits = {domain: split_domain(domain) for domain in DOMAINS}
    held_out = [text for split in splits.values() for text in split.held_out.values()]
    texts = {domain: join(split.train) for domain, split in splits.items()}
    return texts | {"other_code": join(without_paragraphs_of(held_out, read_other_code()))}


def train_tokenizer(texts: dict[str, str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer that gives each domain a comparable say in the vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[SEPARATOR],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    sample = [text[:1_500_000] for text in texts.values()]
    tokenizer.train_from_iterator((line for text in sample for line in text.splitlines(keepends=True)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=SEPARATOR,
        bos_token=SEPARATOR,
        pad_token=SEPARATOR,
        model_max_length=512,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> torch.Tensor:
    """Token ids of a text, shape (tokens,); separators become the end-of-text token."""
    return torch.tensor(tokenizer.backend_tokenizer.encode(text).ids)


def new_model() -> LlamaForCausalLM:
    """A Llama of 1.8 million parameters with random weights."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)
