"""Small tokenizers that split text as real ones do, and chat templates as they are found on the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import tokenizers
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

# as Qwen2 has it: a line end between turns, outside of them
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# the same text, with the assistant's part marked as TRL's training templates mark it
CHATML_MARKED = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ '<|im_start|>assistant\\n' }}"
    "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
# as CHATML_MARKED, but the end of the turn is left out of it
CHATML_UNENDED = CHATML_MARKED.replace(
    " + '<|im_end|>' }}{% endgeneration %}{{ '\\n'", " }}{% endgeneration %}{{ '<|im_end|>\\n'"
)
# as Llama 2 and Mistral: no request for a turn, a space before the answer, roles must alternate
INSTRUCT = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
# as Qwen3: earlier turns lose what the last one has, so the beginning of a conversation changes when it goes on
FORGETFUL = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' and loop.last %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# as Llama 3 has it today
LLAMA3 = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' %}{{ bos_token if loop.first }}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
# as it came out, and as many derivatives still have it: every conversation ends with a request for another turn
LLAMA3_AT_FIRST = LLAMA3.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
# as Phi 3: a conversation that is over has one token more
PHI3 = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# as Gemma: another name for the assistant, and no system role
GEMMA = (
    "{{ bos_token }}"
    "{% for message in messages %}{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}"
    "{{ '<start_of_turn>' + role + '\\n' + message['content'] | trim + '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)

_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "a question: what is the answer? the answer is forty two",
    "user assistant system hello world, how are you today",
    "positive negative good bad film film film",
] * 3


def byte_level(*, template: str | None = CHATML, bos: bool = False, special: Sequence[str] = ()) -> Any:
    """Byte-level BPE as GPT-2, Llama 3 and Qwen have it; it can write every text, and trims spaces off offsets.

    `special` are more special tokens, those of a template.
    """
    core = tokenizers.Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True)
    core.decoder = decoders.ByteLevel()
    first = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=first, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator(_CORPUS, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    known = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokenizer = _wrapped(core, template=template, **known)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return tokenizer


def word_pieces() -> Any:
    """Word pieces as BERT has them: special tokens on both sides, token types, lower case."""
    words = sorted({word.strip(",:?") for line in _CORPUS for word in line.split()})
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    core = tokenizers.Tokenizer(models.WordPiece({word: i for i, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return _wrapped(
        core,
        template=None,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=16,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


def metaspace() -> Any:
    """BPE over words with a mark for spaces, and one in front of every text, as Llama 2 has it."""
    core = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    first = ["<unk>", "<s>", "</s>"]
    core.train_from_iterator(_CORPUS, trainers.BpeTrainer(vocab_size=200, special_tokens=first, show_progress=False))
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(core, template=INSTRUCT, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def learned(tokenizer: Any, row: Any) -> str:
    """The text that a row teaches."""
    return str(tokenizer.decode([label for label in row["labels"] if label != -100]))


def whole(tokenizer: Any, row: Any) -> str:
    """The text that a row holds."""
    return str(tokenizer.decode(row["input_ids"]))


def _wrapped(core: tokenizers.Tokenizer, *, template: str | None, **options: Any) -> Any:
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, **options)
    tokenizer.chat_template = template
    return tokenizer


def turns(*contents: str, first: Sequence[str] = ("user", "assistant")) -> list[dict[str, str]]:
    """A conversation in which two speakers alternate."""
    return [{"role": first[index % 2], "content": content} for index, content in enumerate(contents)]
