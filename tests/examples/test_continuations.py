"""Questions from held-out text: what is right follows, what is wrong follows something else."""

from __future__ import annotations

import json

import pytest


@pytest.mark.parametrize("domain", ["code", "docs", "headers"])
def test_the_right_passage_follows(example, domain):
    from continuations import questions
    from corpus import SEPARATOR

    text = (example / "held_out" / f"{domain}.txt").read_text(encoding="utf-8")
    found = questions(text)
    assert len(found) > 200
    place = 0
    for row in found:
        right = row["choices"][row["answer"]]
        start = text.index(f"{row['question']}\n{right}", place)
        place = start + len(row["question"]) + len(right)  # behind the last: no line is in two questions
        assert len(set(row["choices"])) == 4
        assert SEPARATOR not in row["question"] + "".join(row["choices"])
        assert min(len(row["question"]), *map(len, row["choices"])) >= 80
    follows = {(row["question"], row["choices"][row["answer"]]) for row in found}
    endings = {after for _, after in follows}
    assert all(choice in endings for row in found for choice in row["choices"]), "a choice gives itself away"
    counts = [sum(row["answer"] == place for row in found) for place in range(4)]
    assert min(counts) > len(found) / 8
    assert questions(text) == found


def test_files(example, tmp_path):
    from continuations import questions, write_questions

    write_questions(tmp_path / "questions")
    text = (example / "held_out" / "docs.txt").read_text(encoding="utf-8")
    lines = (tmp_path / "questions" / "docs.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line) for line in lines] == questions(text)
