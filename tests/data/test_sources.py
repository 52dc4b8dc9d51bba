"""Folders, folders saved by `datasets`, the hub, and rows in memory."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_bayes.data import collate
from mergekit_bayes.errors import DataError
from tests.data.loading import labelled, load, texts
from tests.data.tokenizers import whole


def fill(folder: Path, **files: str) -> Path:
    """A folder of files, one row each; `data__train_0="jsonl"` is data/train_0.jsonl with the text data__train_0."""
    for name, kind in files.items():
        path = folder / f"{name.replace('__', '/')}.{kind}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text({"jsonl": json.dumps({"text": name}), "csv": f"text\n{name}\n", "txt": name}[kind])
    return folder


def found(tokenizer: Any, folder: Path, **entry: Any) -> list[str]:
    data = load({"path": str(folder), **entry}, tokenizer)
    return [whole(tokenizer, row).removesuffix("<|endoftext|>") for row in data.train]


def test_a_folder_is_read_as_a_whole_in_the_order_of_names(tmp_path: Path, tokenizer: Any) -> None:
    fill(tmp_path, b="jsonl", a="jsonl", deep__c="jsonl")
    assert found(tokenizer, tmp_path) == ["a", "b", "deep__c"]


def test_what_lies_beside_data_is_not_learned_but_named(tmp_path: Path, tokenizer: Any) -> None:
    fill(tmp_path, a="txt", b="txt", LICENSE="txt", requirements="txt", **{".hidden__c": "txt"})
    (tmp_path / "README.md").write_text("about")
    (tmp_path / "NOTICE").write_text("about")
    assert found(tokenizer, tmp_path) == ["a", "b"]
    (report,) = load(tmp_path, tokenizer).report.datasets
    assert report.notes == ["not read: LICENSE.txt, NOTICE, README.md, requirements.txt"]


@pytest.mark.parametrize(
    "files", [("train-0", "train-1", "validation", "test"), ("train/a", "train/b", "dev/a", "eval/a")]
)
def test_files_named_after_splits(tmp_path: Path, tokenizer: Any, files: tuple[str, ...]) -> None:
    names = [name.replace("/", "__") for name in files]
    fill(tmp_path, **dict.fromkeys(names, "jsonl"))
    assert found(tokenizer, tmp_path) == names[:2]
    assert found(tokenizer, tmp_path, split="validation") == names[2:3]
    assert found(tokenizer, tmp_path, split="test") == names[3:]
    with pytest.raises(DataError, match=r"has no split unsupervised; expected one of test, train, validation"):
        found(tokenizer, tmp_path, split="unsupervised")


def test_documents_may_have_any_name(tmp_path: Path, tokenizer: Any) -> None:
    """`test.txt` among documents is a document about tests."""
    fill(tmp_path, asyncio="txt", test="txt")
    assert found(tokenizer, tmp_path) == ["asyncio", "test"]
    with pytest.raises(DataError, match=r"its files name no splits; expected no `split`"):
        found(tokenizer, tmp_path, split="test")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no data: it is empty; expected \.jsonl"),
        ({"LICENSE": "txt"}, r"holds no data: it holds LICENSE\.txt"),
        ({"a": "jsonl", "b": "csv"}, r"holds files of the kinds csv, jsonl; expected one kind, or name a file"),
        ({"train": "jsonl", "more": "jsonl"}, r"train\.jsonl is named after a split and more\.jsonl is not"),
    ],
)
def test_folders_that_could_mean_anything(tmp_path: Path, tokenizer: Any, files: dict[str, str], message: str) -> None:
    fill(tmp_path, **files)
    with pytest.raises(DataError, match=message):
        found(tokenizer, tmp_path)


def test_folders_saved_by_datasets(tmp_path: Path, tokenizer: Any) -> None:
    import datasets

    splits = {name: datasets.Dataset.from_list(texts(name)) for name in ("train", "test")}
    splits["train"].save_to_disk(tmp_path / "one")
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "several")
    assert found(tokenizer, tmp_path / "one") == ["train"]
    assert found(tokenizer, tmp_path / "several") == ["train"]
    assert found(tokenizer, tmp_path / "several", split="test") == ["test"]
    with pytest.raises(DataError, match=r"has no split dev; it has test, train"):
        found(tokenizer, tmp_path / "several", split="dev")


@pytest.mark.parametrize("name", ["nobody/nothing", "imdb", f"nobody/nothing@{'a' * 40}"])
def test_the_hub_without_a_network(tokenizer: Any, name: str) -> None:
    message = (
        rf"^{name}: is no local file or folder, and cannot be had from the hub, or its cache while HF_HUB_OFFLINE is"
    )
    with pytest.raises(DataError, match=message) as caught:
        load(name, tokenizer)
    assert "\n" not in str(caught.value)


def cached(tmp_path: Path, commit: str, rows: list[dict[str, object]]) -> Path:
    """A cache of the hub that holds org/name at a commit, as `datasets` writes it."""
    import datasets

    cache = tmp_path / "cache"
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), cache_dir=str(cache))
    (written,) = (cache / "json").glob("*/*/*/dataset_info.json")
    folder = cache / "org___name" / "default" / "0.0.0" / commit
    folder.parent.mkdir(parents=True)
    written.parent.rename(folder)
    (folder / "json-train.arrow").rename(folder / "name-train.arrow")
    info = json.loads((folder / "dataset_info.json").read_text())
    (folder / "dataset_info.json").write_text(json.dumps({**info, "builder_name": "parquet", "dataset_name": "name"}))
    return cache


def test_a_data_set_in_the_cache_of_the_hub(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, it is used and its commit named; another commit than the one that is asked for is not."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cached(tmp_path, "a" * 40, texts("the dog", "the fox")))
    data = load("org/name", tokenizer)
    assert [whole(tokenizer, row) for row in data.train] == ["the dog<|endoftext|>", "the fox<|endoftext|>"]
    assert data.report.datasets[0].notes == [f"commit {'a' * 40}"]
    assert len(load(f"org/name@{'a' * 40}", tokenizer).train) == 2
    with pytest.raises(DataError, match=rf"the cache gave commit {'a' * 40}; expected {'b' * 40}"):
        load(f"org/name@{'b' * 40}", tokenizer)
    with pytest.raises(DataError, match=r"org/name@main: HF_HUB_OFFLINE is set, so nobody can say which commit"):
        load("org/name@main", tokenizer)


class Hub:
    """A hub on which every revision is commit c...c of one data set."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.asked: list[object] = []

    def dataset_info(self, name: str, **options: object) -> SimpleNamespace:
        self.asked.append((name, options["revision"]))
        return SimpleNamespace(sha="c" * 40)

    def load_dataset(self, *args: object, **options: object) -> Any:
        self.asked.append((*args, options))
        return self.dataset


def test_a_data_set_of_the_hub(classifier_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The newest commit is looked up first, and read; integers get the names that the data set has for them."""
    import datasets
    import huggingface_hub

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos"])})
    rows = labelled(("good film", 1), ("bad film", 0))
    hub = Hub(datasets.Dataset.from_list(rows, features=features))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", hub.load_dataset)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", hub.dataset_info)
    entry = {"path": "org/reviews@v2", "name": "films", "split": "train[:50%]"}
    data = load(entry, classifier_tokenizer, task="sequence_classification")
    assert hub.asked == [
        ("org/reviews", "v2"),
        ("org/reviews", "films", {"split": "train[:50%]", "revision": "c" * 40}),
    ]
    assert data.labels == ("neg", "pos")
    assert [row["labels"] for row in data.train] == [1, 0]


def test_rows_in_memory(tokenizer: Any) -> None:
    """Lists of mappings, tuples of them, and data sets of `datasets`."""
    import datasets

    rows = texts("the dog", "the fox")
    for given in (rows, tuple(rows), datasets.Dataset.from_list(rows)):
        data = load({"rows": given}, tokenizer)
        assert [whole(tokenizer, row) for row in data.train] == ["the dog<|endoftext|>", "the fox<|endoftext|>"]


def test_a_data_set_of_datasets_without_rows(tokenizer: Any) -> None:
    import datasets

    with pytest.raises(DataError, match=r"memory0: holds no rows"):
        load({"rows": datasets.Dataset.from_list(texts("the dog")).select([])}, tokenizer)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], r"memory0: holds no rows"),
        ([{}], r"memory0: holds no rows"),
        (["the dog"], r"memory0, row 0: found 'the dog'; expected an object"),
        ([*texts(*["the dog"] * 1500), "fox"], r"memory0, row 1500: found 'fox'; expected an object"),
    ],
)
def test_rows_in_memory_that_are_none(tokenizer: Any, rows: list[object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load({"rows": rows}, tokenizer)


def test_what_is_loaded_goes_straight_into_a_batch(tokenizer: Any) -> None:
    data = load(texts("the dog", "the quick brown fox"), tokenizer)
    batch = collate(list(data.train), pad_token_id=tokenizer.pad_token_id, task="causal_lm")
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape
