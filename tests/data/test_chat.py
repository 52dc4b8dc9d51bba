"""Conversations: the tokens are those of the chat template, and learned is what the assistant says, with its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_bayes.errors import DataError
from tests.data import tokenizers
from tests.data.loading import load
from tests.data.tokenizers import byte_level, learned, turns, whole

TALK = turns("hello", "hi there", "how are you?", "fine \U0001f600 caf\u00e9")
SPOKEN = "hi there<|im_end|>fine \U0001f600 caf\u00e9<|im_end|>"


def row_of(tokenizer: Any, messages: object, **options: Any) -> Any:
    return load([{"messages": messages}], tokenizer, **options).train[0]


@pytest.mark.parametrize("template", [tokenizers.CHATML, tokenizers.CHATML_MARKED], ids=["unmarked", "marked"])
def test_assistant_turns_are_learned_with_the_token_that_ends_them(template: str) -> None:
    tokenizer = byte_level(template=template)
    row = row_of(tokenizer, TALK)
    assert row["input_ids"] == tokenizer.apply_chat_template(TALK, return_dict=False)
    assert learned(tokenizer, row) == SPOKEN


def test_marked_and_unmarked_templates_teach_the_same() -> None:
    """The difference of two renderings finds exactly what `{% generation %}` marks."""
    rows = [row_of(byte_level(template=template), TALK) for template in (tokenizers.CHATML, tokenizers.CHATML_MARKED)]
    assert rows[0] == rows[1]


def test_labels_are_those_of_the_mask_of_transformers() -> None:
    """TRL masks by `return_assistant_tokens_mask`."""
    tokenizer = byte_level(template=tokenizers.CHATML_MARKED)
    found = tokenizer.apply_chat_template(TALK, return_dict=True, return_assistant_tokens_mask=True)
    masked = [t if keep else -100 for t, keep in zip(found["input_ids"], found["assistant_masks"], strict=True)]
    assert row_of(tokenizer, TALK)["labels"] == masked


def test_labels_are_those_of_the_common_prefix_of_prompt_and_whole() -> None:
    """TRL masks prompts with completions by the length of the tokenised prompt with its request for an answer."""
    tokenizer = byte_level()
    rows = [{"prompt": TALK[:3], "completion": TALK[3:]}]
    (row,) = load(rows, tokenizer).train
    prompt = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    tokens = tokenizer.apply_chat_template(TALK, return_dict=False)
    assert tokens[: len(prompt)] == prompt
    # but for the line end that the template writes behind the end of the turn, which no model is asked for
    assert row["labels"] == [-100] * len(prompt) + tokens[len(prompt) : -1] + [-100]


def test_prompts_of_messages_are_not_learned_even_where_the_assistant_speaks(tokenizer: Any) -> None:
    (row,) = load([{"prompt": TALK[:2], "completion": TALK[2:]}], tokenizer).train
    assert learned(tokenizer, row) == "fine \U0001f600 caf\u00e9<|im_end|>"
    marked = byte_level(template=tokenizers.CHATML_MARKED)
    assert load([{"prompt": TALK[:2], "completion": TALK[2:]}], marked).train[0] == row


def test_a_turn_that_begins_with_a_space_is_learned() -> None:
    """Byte-level tokenizers report such a token without its space, where transformers' own mask ends up empty."""
    marked = tokenizers.INSTRUCT.replace(
        "{{ ' ' + message['content'] + eos_token }}",
        "{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}",
    )
    for template in (tokenizers.INSTRUCT, marked):
        tokenizer = byte_level(template=template)
        row = row_of(tokenizer, TALK)
        assert whole(tokenizer, row).startswith("<s>[INST] hello [/INST] hi there<|endoftext|>[INST]")
        assert learned(tokenizer, row) == " hi there<|endoftext|> fine \U0001f600 caf\u00e9<|endoftext|>"


@pytest.mark.parametrize(
    ("template", "special", "expected"),
    [
        (
            tokenizers.LLAMA3,
            ["<|eot_id|>", "<|end_header_id|>"],
            "hi there<|eot_id|>fine \U0001f600 caf\u00e9<|eot_id|>",
        ),
        (tokenizers.LLAMA3, [], "hi there<|eot_id|>fine \U0001f600 caf\u00e9<|eot_id|>"),
        (tokenizers.GEMMA, ["<end_of_turn>"], "hi there<end_of_turn>fine \U0001f600 caf\u00e9<end_of_turn>"),
        (tokenizers.PHI3, ["<|end|>"], "hi there<|end|>fine \U0001f600 caf\u00e9<|end|>\n<|endoftext|>"),
    ],
)
def test_templates_of_the_hub(template: str, special: list[str], expected: str) -> None:
    tokenizer = byte_level(template=template, special=special)
    row = row_of(tokenizer, TALK)
    assert row["input_ids"] == tokenizer.apply_chat_template(TALK, return_dict=False)
    assert learned(tokenizer, row) == expected


def test_a_template_that_always_asks_for_another_turn_is_refused() -> None:
    """Else the model would learn to go on where it should stop."""
    tokenizer = byte_level(template=tokenizers.LLAMA3_AT_FIRST, special=["<|eot_id|>", "<|end_header_id|>"])
    for talk in (TALK, TALK[:2]):
        with pytest.raises(
            DataError, match=r"row 0: the chat template ends every conversation with a request for another"
        ):
            row_of(tokenizer, talk)


def test_tokenizers_that_mark_spaces() -> None:
    tokenizer = tokenizers.metaspace()
    row = row_of(tokenizer, turns("hello", "the dog"))
    assert [tokenizer.convert_ids_to_tokens(label) for label in row["labels"] if label != -100][-1] == "</s>"
    assert learned(tokenizer, row) == "the dog</s>"


CHARACTERS = st.text(st.sampled_from("ab \n.\u00e9\U0001f600<|>"), max_size=12)


@given(st.lists(st.tuples(CHARACTERS, CHARACTERS), min_size=1, max_size=3))
def test_any_contents(tokenizer: Any, talk: list[tuple[str, str]]) -> None:
    """Marked and unmarked templates agree, and what is learned decodes to the assistant's words and their ends."""
    messages = turns(*[content for pair in talk for content in pair])
    row = row_of(tokenizer, messages)
    marked = byte_level(template=tokenizers.CHATML_MARKED)
    assert row == row_of(marked, messages)
    assert learned(tokenizer, row) == "".join(f"{answer}<|im_end|>" for _, answer in talk)


def test_everything_is_learned_where_the_recipe_says_so(tokenizer: Any) -> None:
    row = row_of(tokenizer, TALK, completion_only_loss=False)
    assert row["labels"] == [-100, *row["input_ids"][1:]]


def test_a_template_that_forgets_is_refused_with_the_reason() -> None:
    tokenizer = byte_level(template=tokenizers.FORGETFUL)
    message = (
        r"^memory0, row 0: the chat template writes the beginning of a conversation differently when it goes on "
        r"\('hi there.*' where the shorter one has '<think>.*'\): it does not show where messages\[1\] begins "
        r"and ends; expected a template with \{% generation %\} around what the assistant says"
    )
    with pytest.raises(DataError, match=message):
        row_of(tokenizer, TALK)
    # one turn shows what it is, and without a mask nothing has to be shown
    assert learned(tokenizer, row_of(tokenizer, TALK[:2])) == "<think>\n\n</think>\n\nhi there<|im_end|>"
    assert len(row_of(tokenizer, TALK, completion_only_loss=False)["input_ids"]) > 20


def test_a_template_whose_request_is_not_how_turns_begin_is_refused() -> None:
    template = tokenizers.CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>' }}")
    with pytest.raises(DataError, match=r"does not show where messages\[1\] begins"):
        row_of(byte_level(template=template), TALK)


def test_a_marked_template_that_leaves_out_the_end_of_turns_is_reported() -> None:
    tokenizer = byte_level(template=tokenizers.CHATML_UNENDED)
    data = load([{"messages": TALK}, {"messages": TALK[:2]}], tokenizer)
    assert learned(tokenizer, data.train[1]) == "hi there"
    note = "2 conversations where {% generation %} leaves out the token that ends a turn, so it is not learned"
    assert data.report.datasets[0].notes == [note]


def test_a_conversation_without_the_assistant_teaches_nothing(tokenizer: Any) -> None:
    data = load([{"messages": TALK[:1]}, {"messages": TALK}, {"messages": []}, {"messages": None}], tokenizer)
    (report,) = data.report.datasets
    assert (report.without_target, report.empty, len(data.train)) == (1, 2, 1)


def test_a_conversation_that_the_assistant_opens(tokenizer: Any) -> None:
    row = row_of(tokenizer, turns("hi there", "hello", first=("assistant", "user")))
    assert learned(tokenizer, row) == "hi there<|im_end|>"


def test_messages_in_the_other_spelling_and_with_keys_that_hold_nothing(tokenizer: Any) -> None:
    """ShareGPT's; and what a columnar file makes of messages of which only some call tools."""
    names = {"user": "human", "assistant": "gpt"}
    foreign = [{"from": names[m["role"]], "value": m["content"]} for m in TALK]
    padded = [{**message, "tool_calls": None, "name": None} for message in TALK]
    assert row_of(tokenizer, foreign) == row_of(tokenizer, padded) == row_of(tokenizer, TALK)


def test_a_template_of_the_recipe_replaces_the_tokenizers(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "chat.jinja").write_text(tokenizers.INSTRUCT)
    data = load([{"messages": TALK}], tokenizer, chat_template="chat.jinja", recipe_dir=tmp_path)
    assert whole(tokenizer, data.train[0]).startswith("<s>[INST] hello [/INST] hi there")
    assert data.chat_template == tokenizers.INSTRUCT
    assert tokenizer.chat_template == tokenizers.CHATML
    assert load([{"messages": TALK}], tokenizer).chat_template is None


def test_a_tokenizer_with_several_templates_uses_its_default() -> None:
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": tokenizers.CHATML, "tool_use": tokenizers.INSTRUCT}
    assert learned(tokenizer, row_of(tokenizer, TALK)) == SPOKEN


def test_no_template(tokenizer: Any) -> None:
    message = (
        r"the tokenizer has no chat template, which conversations need; expected one, for example `data.chat_template"
    )
    for rows in ([{"messages": TALK}], [{"prompt": TALK[:1], "completion": TALK[1:2]}]):
        with pytest.raises(DataError, match=message):
            load(rows, byte_level(template=None))
    assert len(load([{"text": "the dog"}], byte_level(template=None)).train) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"chat\.jinja: there is no such file; expected a chat template"),
        (b"", r"chat\.jinja: is empty; expected a chat template"),
        (b"\xff", r"chat\.jinja: cannot be read as a chat template"),
        (b"{% for m in messages %}\n{{ m.content }", r"row 0: the chat template refuses this at its line 2: "),
        (b"{{ messages[9].content.x.y }}", r"row 0: the chat template refuses this: .*has no element 9"),
        (b"{{ raise_exception('no') }}", r"row 0: the chat template refuses this: 'no'"),
        (b"{{ 1 // 0 }}", r"row 0: the chat template fails on this: ZeroDivisionError"),
        (b"{{ messages[0]['content'] + 1 }}", r"row 0: the chat template fails on this: TypeError"),
    ],
)
def test_templates_that_cannot_be_used(tmp_path: Path, tokenizer: Any, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / "chat.jinja").write_bytes(content)
    with pytest.raises(DataError, match=message):
        load([{"messages": TALK}], tokenizer, chat_template="chat.jinja", recipe_dir=tmp_path)


def test_a_template_that_nothing_uses(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "chat.jinja").write_text(tokenizers.CHATML)
    with pytest.raises(DataError, match=r"`data.chat_template` has no effect, no data set holds conversations"):
        load([{"text": "the dog"}], tokenizer, chat_template="chat.jinja", recipe_dir=tmp_path)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"row 1: `messages` is 'hello' \(str\); expected a list of messages \{role, content\}"),
        ({"role": "user"}, r"row 1: `messages` is \{'role': 'user'\} \(dict\); expected a list"),
        (["hello"], r"row 1: `messages\[0\]` is 'hello'; expected a message \{role, content\}"),
        (
            [{"speaker": "user", "content": "a"}],
            r"`messages\[0\]` has the keys \['content', 'speaker'\]; expected `role`",
        ),
        ([{"role": 3, "content": "a"}], r"`messages\[0\]` has the keys \['content', 'role'\]; expected `role`"),
        ([TALK[0], {"role": "assistant"}], r"the content of `messages\[1\]` is None; expected text"),
        ([{"role": "user", "content": 5}], r"the content of `messages\[0\]` is 5; expected text"),
    ],
)
def test_values_that_are_no_conversation(tokenizer: Any, messages: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load([{"messages": TALK}, {"messages": messages}], tokenizer)


def test_a_prompt_of_text_with_a_completion_of_messages(tokenizer: Any) -> None:
    message = r"row 0: one of `prompt` and `completion` is text, the other a list of messages"
    with pytest.raises(DataError, match=message):
        load([{"prompt": "hello", "completion": TALK[1:2]}], tokenizer)
    data = load([{"prompt": [], "completion": TALK[1:2]}, {"prompt": TALK[:1], "completion": TALK[1:2]}], tokenizer)
    assert (data.report.datasets[0].empty, len(data.train)) == (1, 1)


def test_roles_that_the_template_refuses(tokenizer: Any) -> None:
    tokenizer = byte_level(template=tokenizers.INSTRUCT)
    with pytest.raises(DataError, match=r"row 1: the chat template refuses this: 'Conversation roles must alternate"):
        load([{"messages": TALK}, {"messages": [TALK[0], TALK[0]]}], tokenizer)


def test_a_tokenizer_that_cannot_say_where_its_tokens_lie(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = byte_level()
    monkeypatch.setattr(type(slow), "is_fast", False)
    with pytest.raises(DataError, match=r"does not say where its tokens lie; conversations need a fast one"):
        load([{"messages": TALK}], slow)
