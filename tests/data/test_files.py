"""Local files of every kind: what was written is what is read, and what cannot be read is named with its line."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from mergekit_bayes.errors import DataError
from tests.data.loading import load
from tests.data.tokenizers import turns, whole

ROWS = [{"text": "the quick fox"}, {"text": 'a "quoted", dog\nover two lines'}, {"text": "NA"}, {"text": "2020-01-01"}]
END = "<|endoftext|>"


def written(tokenizer: Any, path: object, **options: Any) -> list[str]:
    """The texts that are read, in order."""
    data = load(path, tokenizer, **options)
    return [whole(tokenizer, row).removesuffix(END) for row in data.train]


def as_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


CSV = 'text\nthe quick fox\n"a ""quoted"", dog\nover two lines"\nNA\n2020-01-01\n'


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("rows.jsonl", jsonl(ROWS)),
        ("rows.jsonl", "\n" + jsonl(ROWS).replace("\n", "\r\n\n")),
        ("rows.jsonl", "\ufeff" + jsonl(ROWS)),
        ("rows.json", json.dumps(ROWS, indent=1)),
        ("rows.json", json.dumps({"version": 1, "data": ROWS})),
        ("rows.json", jsonl(ROWS)),
        ("ROWS.CSV", CSV),
        ("rows.csv", "\ufeff" + CSV),
        ("rows.tsv", CSV.replace(",", "\t").replace("\t dog", ", dog")),
    ],
)
def test_text_files_are_read_as_they_were_written(tmp_path: Path, tokenizer: Any, name: str, content: str) -> None:
    """Also where a reader that guesses types would see dates and missing values."""
    (tmp_path / name).write_bytes(content.encode())
    assert written(tokenizer, tmp_path / name) == [row["text"] for row in ROWS]


def test_parquet(tmp_path: Path, tokenizer: Any) -> None:
    as_parquet(tmp_path / "rows.parquet", ROWS)
    assert written(tokenizer, tmp_path / "rows.parquet") == [row["text"] for row in ROWS]


@pytest.mark.parametrize("name", ["rows.jsonl.gz", "rows.csv.gz", "rows.json.gz"])
def test_compressed_files(tmp_path: Path, tokenizer: Any, name: str) -> None:
    content = {"jsonl": jsonl(ROWS), "csv": CSV, "json": json.dumps(ROWS)}[name.split(".")[1]]
    (tmp_path / name).write_bytes(gzip.compress(content.encode()))
    assert written(tokenizer, tmp_path / name) == [row["text"] for row in ROWS]


@pytest.mark.parametrize("content", ['{"text": "the dog"}', '{"text": "the dog", "tags": ["a"], "data": []}'])
def test_an_object_without_a_list_of_rows_is_a_row(tmp_path: Path, tokenizer: Any, content: str) -> None:
    (tmp_path / "row.json").write_text(content)
    assert written(tokenizer, tmp_path / "row.json") == ["the dog"]


def test_a_conversation_is_a_row_and_not_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "chat.json").write_text(json.dumps({"messages": turns("hello", "hi there")}))
    (report,) = load(tmp_path / "chat.json", tokenizer).report.datasets
    assert (report.format, report.rows) == ("messages", 1)


def test_blank_lines_of_a_csv_file_are_no_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.csv").write_text("text\n\nthe dog\n\n\nthe fox\n\n")
    assert written(tokenizer, tmp_path / "rows.csv") == ["the dog", "the fox"]


def test_a_text_file_is_one_document(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "story.txt").write_text("the dog\n\nthe fox\n")
    assert written(tokenizer, tmp_path / "story.txt") == ["the dog\n\nthe fox\n"]


@pytest.mark.parametrize(
    "name", ["a b.jsonl", "a[1].jsonl", "a*.jsonl", "q?.jsonl", "{x}.jsonl", "é#%20.jsonl", ".h.jsonl"]
)
def test_file_names_are_names_and_not_patterns(tmp_path: Path, tokenizer: Any, name: str) -> None:
    for other in ("a1.jsonl", "ab.jsonl", "q1.jsonl"):
        (tmp_path / other).write_text(jsonl([{"text": "another file"}]))
    (tmp_path / name).write_text(jsonl(ROWS[:1]))
    assert written(tokenizer, tmp_path / name) == ["the quick fox"]


def test_a_changed_file_is_read_anew(tmp_path: Path, tokenizer: Any) -> None:
    """Same name, same length, same time stamp: nothing that a cache could go by."""
    for kind in ("jsonl", "csv", "txt", "parquet"):
        path = tmp_path / f"rows.{kind}"
        for text in ("fox", "dog"):
            if kind == "parquet":
                as_parquet(path, [{"text": text}])
            else:
                path.write_text({"jsonl": jsonl([{"text": text}]), "csv": f"text\n{text}\n", "txt": text}[kind])
            os.utime(path, (1_700_000_000, 1_700_000_000))
            assert written(tokenizer, path) == [text]


def test_nothing_is_left_behind(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    scratch, cache = tmp_path / "scratch", tmp_path / "cache"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    as_parquet(tmp_path / "rows.parquet", ROWS)
    for name in ("rows.jsonl", "rows.parquet"):
        written(tokenizer, tmp_path / name)
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(DataError):
        written(tokenizer, tmp_path / "bad.jsonl")
    assert list(scratch.iterdir()) == []
    assert not cache.exists()


def test_loading_leaves_the_settings_of_datasets_alone(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    before = datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    written(tokenizer, tmp_path / "rows.jsonl")
    assert (datasets.logging.get_verbosity(), datasets.are_progress_bars_disabled()) == before


def test_paths_start_here_or_at_the_recipe(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here, recipe = tmp_path / "here", tmp_path / "recipe"
    for folder, text in ((here, "the dog"), (recipe, "the fox")):
        folder.mkdir()
        (folder / "both.jsonl").write_text(jsonl([{"text": text}]))
    (recipe / "one.jsonl").write_text(jsonl([{"text": "lazy"}]))
    monkeypatch.chdir(here)
    assert written(tokenizer, "both.jsonl", recipe_dir=recipe) == ["the dog"]
    assert written(tokenizer, "one.jsonl", recipe_dir=recipe) == ["lazy"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", r"a\.jsonl: holds no rows"),
        ("a.jsonl", b"\n \n", r"holds no rows"),
        ("a.json", b"[]", r"holds no rows"),
        ("a.json", b"", r"line 1, column 1: is no JSON: Expecting value"),
        ("a.csv", b"", r"holds no rows"),
        ("a.csv", b"text,label\n", r"holds no rows"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', r"a\.jsonl, line 3, column 9: is no JSON: Expecting value"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', r"line 2: found \['b'\]; expected an object such as"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "\xff"}\n', r"line 2: byte 0xff is not UTF-8; expected UTF-8"),
        ("a.jsonl", '{"text": "a"}\n'.encode("utf-16"), r"line 1: the file is UTF-16; expected UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"line 1: holds half of a surrogate pair"),
        ("a.jsonl", b"[" * 100_000, r"line 1: is no JSON that can be read: it is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"line 1: is no JSON that can be read"),
        ("a.json", b"[" * 100_000, r"line 1: is no JSON that can be read: it is nested too deeply"),
        ("a.json", b'{"a": 1', r"line 1, column 8: is no JSON"),
        ("a.json", b'[{"text": "a"}, 3]', r"entry 1: found 3; expected an object"),
        ("a.json", b"3", r"found 3; expected a list of objects"),
        ("a.csv", b"text\n\xe9\n", r"line 2: byte 0xe9 is not UTF-8"),
        ("a.csv", b"text,label\na,1\nb, c,2\n", r"line 3: has 3 fields where the header has 2 \(text, label\)"),
        ("a.csv", b"text,label\na\n", r"line 2: has 1 fields where the header has 2"),
        ("a.csv", b'text\n"a\nb\nc', r"line 2: is no CSV: unexpected end of data"),
        ("a.csv", b"text,text\na,b\n", r"line 1: the header names a column twice: text, text"),
        ("a.parquet", b"PAR1 and no more", r"a\.parquet: cannot be read"),
        ("a.jsonl.gz", b"no gzip", r"a\.jsonl\.gz: (cannot be read|.* is no JSON)"),
        ("a.txt", b"", r"none of its 1 rows can be learned from: 1 empty"),
        ("a.txt", b"fine\n\xff", r"line 2: byte 0xff is not UTF-8"),
        ("a.docx", b"text", r"a\.docx: is no kind of file that is read here; expected \.jsonl, \.json, \.csv"),
        ("a::b.jsonl", b'{"text": "a"}', r"`::` in a path means something else"),
    ],
)
def test_unusable_files_are_named_with_line_and_reason(
    tmp_path: Path, tokenizer: Any, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        load(tmp_path / name, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path, tokenizer: Any) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(jsonl(ROWS))
    path.chmod(0)
    with pytest.raises(DataError, match=r"rows\.jsonl: cannot be read: .*[Pp]ermission"):
        load(path, tokenizer)


@pytest.mark.parametrize(
    "path", ["missing.jsonl", "data/missing.jsonl", "/nowhere/rows.csv", "a b", "x" * 5000, "~nobody/x"]
)
def test_a_file_that_is_not_there(tokenizer: Any, path: str, tmp_path: Path) -> None:
    """A name with the end of a file is no hub id, even if it could be one."""
    with pytest.raises(DataError, match=r"there is no such file \(looked for .*expected a \.jsonl"):
        load({"path": path}, tokenizer, recipe_dir=tmp_path)


def test_all_that_is_wrong_with_the_files_comes_at_once(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "columns.jsonl").write_text('{"body": "a"}')
    with pytest.raises(DataError) as caught:
        load(("gone.jsonl", tmp_path / "columns.jsonl"), tokenizer, eval="away.csv")
    assert [line.split(":")[0].rsplit("/", 1)[-1] for line in str(caught.value).splitlines()] == [
        "gone.jsonl",
        "columns.jsonl",
        "away.csv",
    ]


def test_a_file_has_neither_splits_nor_configurations(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS))
    with pytest.raises(DataError, match=r"is one file, which has no split test; expected no `split`"):
        load({"path": str(tmp_path / "rows.jsonl"), "split": "test"}, tokenizer)
    with pytest.raises(DataError, match=r"is local and has no configurations; expected no `name`"):
        load({"path": str(tmp_path / "rows.jsonl"), "name": "english"}, tokenizer)


def test_only_the_first_rows(tmp_path: Path, tokenizer: Any) -> None:
    (tmp_path / "rows.jsonl").write_text(jsonl(ROWS) + "{")
    assert written(tokenizer, {"path": str(tmp_path / "rows.jsonl"), "max_rows": 2, "format": "text"}) == [
        row["text"] for row in ROWS[:2]
    ]
