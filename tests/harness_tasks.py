"""Task files of lm-eval-harness over a handful of rows: nothing is asked of a network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

WORDS = [f"w{number}" for number in range(40)]

_PICK = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}, train: {data}}}}}
output_type: multiple_choice
test_split: test
fewshot_split: train
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: label
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_READ = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - {{metric: byte_perplexity}}
  - {{metric: bits_per_byte}}
metadata: {{version: 1.0}}
"""
_CONTINUE = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["."], max_gen_toks: 3, do_sample: false}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
metadata: {{version: 1.0}}
"""
_GROUP = """\
group: both
task: [pick, read]
metadata: {version: 1.0}
"""


def questions(count: int) -> list[dict[str, object]]:
    """Questions of three words, with three answers each of which continues one of them."""
    found: list[dict[str, object]] = []
    for number in range(count):
        asked = " ".join(WORDS[(7 * number + offset) % 40] for offset in range(3))
        choices = [WORDS[(number + step) % 40] for step in (3, 11, 19)]
        found.append({"question": asked, "choices": choices, "label": number % 3})
    return found


def sentences(count: int) -> list[dict[str, object]]:
    return [{"text": " ".join(WORDS[(5 * number + step * step) % 40] for step in range(6))} for number in range(count)]


def write_tasks(folder: Path, *, count: int = 10) -> Path:
    """Writes the tasks `pick` (multiple choice), `read` (likelihood), `continue` (text) and the group `both`."""
    folder.mkdir(parents=True, exist_ok=True)
    rows(folder / "questions.jsonl", questions(count))
    rows(folder / "sentences.jsonl", sentences(count))
    for name, text, data in (
        ("pick", _PICK, "questions"),
        ("read", _READ, "sentences"),
        ("continue", _CONTINUE, "questions"),
    ):
        filled = text.format(name=name, data=folder.resolve() / f"{data}.jsonl")
        (folder / f"{name}.yaml").write_text(filled)
    (folder / "both.yaml").write_text(_GROUP)
    return folder


def rows(path: Path, content: Sequence[object]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))
