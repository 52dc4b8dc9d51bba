"""The merging study trains, estimates, merges and scores both kinds of families, and its page shows its results."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.merging import methods, study, summary
from evaluation.merging.experts import Place
from evaluation.merging.family import Family
from evaluation.merging.language import Language, Texts, read_characters
from evaluation.merging.methods import METHODS, Method, Source
from evaluation.merging.packages import Packages, Row, split_rows
from evaluation.merging.precisions import per_unit
from evaluation.merging.report import tables
from evaluation.merging.train import JOINT, Schedule, train
from tests.conftest import TinyCheckpoints
from tests.model.builders import with_tokenizer

PAGE = Path(study.__file__).parent
QUICK = Schedule(steps=2, rate=0.01, head_rate=0.01)


def words(stream: random.Random, count: int) -> str:
    return " ".join(f"w{stream.randrange(45)}" for _ in range(count))


def tiny_language(folder: Path) -> Language:
    stream = random.Random(0)
    texts = {task: Texts(*(words(stream, count) for count in (200, 40, 60))) for task in ("first", "second")}
    return Language(texts, folder=folder, window=8, rows=2)


def tiny_packages(folder: Path) -> Packages:
    stream = random.Random(1)
    rows = {
        task: {
            part: [Row(f"{task}{part}{each}", labels[each % 2], words(stream, 6)) for each in range(count)]
            for part, count in (("train", 8), ("tuning", 4), ("test", 6))
        }
        for task, labels in (("first", ("a", "b")), ("second", ("c", "d")))
    }
    return Packages(rows, folder=folder, batch=4)


@pytest.fixture(params=["language", "packages"])
def family(request: pytest.FixtureRequest, tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> Family:
    made = {"language": (tiny_language, "llama_tied"), "packages": (tiny_packages, "bert_masked_lm")}
    build, architecture = made[request.param]
    return build(with_tokenizer(tiny_checkpoint(architecture), tmp_path / "base", pad=True))


@pytest.mark.slow
def test_the_study_runs_from_training_to_tables(
    family: Family, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    few = {name: Method(**{**vars(method), "tries": method.tries[:2]}) for name, method in METHODS.items()}
    monkeypatch.setattr(methods, "METHODS", few)
    mode = {"language": "lora", "packages": "full"}[family.name]
    for seed in (0, 1):
        for task in (*family.tasks, JOINT):
            folder = Place(tmp_path, family.name, mode, seed).folder(task)
            train(family, mode, task, seed=seed, schedule=QUICK, folder=folder)
    study.write(tmp_path / "out", family, tmp_path, modes=(mode,), seeds=(0, 1))
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tables(results) in capsys.readouterr().out
    assert (tmp_path / "out" / f"{family.name}.png").stat().st_size > 10_000
    rows = results[family.name][mode]["rows"]
    assert list(rows) == ["base", *methods.methods_of(family.name, mode), "joint training", "experts"]
    if family.name == "packages":  # whose tiny encoder learns nothing in two steps, and has no normalised scores
        assert all(0 <= share <= 1 for row in rows.values() for share in row["raw"].values())
    else:
        assert rows["base"]["average"] == 0
        assert rows["experts"]["average"] == pytest.approx(1)
        assert rows["linear"]["way_to_joint"] == 0
        assert rows["joint training"]["way_to_joint"] == pytest.approx(1)
    scores = Place(tmp_path, family.name, mode, 0).folder("scores")
    kept = {path: path.stat().st_mtime_ns for path in scores.iterdir()}
    study.write(tmp_path / "out", family, tmp_path, modes=(mode,), seeds=(0, 1))
    assert {path: path.stat().st_mtime_ns for path in scores.iterdir()} == kept
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_kernels_get_the_posteriors_that_their_method_names() -> None:
    generator = torch.Generator().manual_seed(0)
    base = {"layer": torch.randn(3, 2, generator=generator), "bias": torch.randn(3, generator=generator)}
    tasks = []
    for _ in range(2):
        means = {name: value + torch.randn(value.shape, generator=generator) for name, value in base.items()}
        inputs, outputs = (torch.randn(6, size, generator=generator) for size in (2, 3))
        factors = {"layer.input_factor": (inputs.T @ inputs)[None], "layer.output_factor": (outputs.T @ outputs)[None]}
        tasks.append([Source(means, {**factors, "bias": torch.rand(3, generator=generator)})])
    whole = Method(**{**vars(METHODS["kronecker, 1.0"]), "options": {"shrinkage": 0.0}})
    merged = methods.merge(whole, 0.1, base, tasks)
    prior = 0.1 * methods.mean_curvature(base, tasks)
    left, right = prior * np.eye(6), np.zeros(6)
    for [source] in tasks:
        assert source.curvature is not None
        a, g = (source.curvature[f"layer.{side}_factor"][0].double().numpy() for side in ("input", "output"))
        left += np.kron(g, a)
        step = (source.means["layer"] - base["layer"]).double().numpy().ravel()
        right += (np.kron(g, a) + prior * np.eye(6)) @ step
    dense = base["layer"].double().numpy() + np.linalg.solve(left, right).reshape(3, 2)
    np.testing.assert_allclose(merged["layer"].numpy(), dense, rtol=1e-3, atol=1e-4)
    diagonal = torch.stack([source.curvature["bias"] for [source] in tasks if source.curvature])
    steps = torch.stack([source.means["bias"] - base["bias"] for [source] in tasks])
    expected = base["bias"] + ((diagonal + prior) * steps).sum(0) / (diagonal.sum(0) + prior)
    torch.testing.assert_close(merged["bias"], expected)


def test_units_are_divided_out_once() -> None:
    two = torch.full((1, 2, 2), 2.0)
    plain = per_unit({"a.input_factor": two, "a.output_factor": two, "bias": two}, 2)
    assert [float(each.mean()) for each in plain.values()] == [2, 1, 1]
    corrected = per_unit({"a.input_factor": two, "a.output_factor": two, "a.eigenvalues": two}, 2)
    assert [float(each.mean()) for each in corrected.values()] == [2, 2, 1]
    assert float(per_unit({"a.input_factor": two}, 2)["a.input_factor"].mean()) == 1


def test_scores_are_normalised_by_seed_and_task() -> None:
    def seeds(*values: float) -> list[dict[str, list[float]]]:
        return [{"x": [value - 1, value + 1], "y": [10 * value] * 3} for value in values]

    runs = {"base": seeds(1, 2), "experts": seeds(3, 4), "linear": seeds(2, 2), "joint training": seeds(3, 3)}
    found = summary.summary({**runs, "other": seeds(2.5, 2.5)})
    assert found["other"]["normalised"] == {"x": 0.5, "y": 0.5}
    assert found["other"]["seeds"] == [0.75, 0.25]
    assert found["linear"]["seeds"] == [0.5, 0]
    assert found["other"]["way_to_joint"] == 0.5
    # gains of 1.5 and 15 of 2 and 20 with one seed, 0.5 and 5 with the other
    assert found["other"]["pooled"] == 0.5
    short = summary.summary({**runs, "joint training": seeds(2.1, 2.1)})
    assert short["linear"]["way_to_joint"] is None
    half = 12.706 * 0.25  # the standard error of two values 0.5 apart is 0.25
    assert found["other"]["over_seeds"] == pytest.approx([0.5 - half, 0.5 + half], abs=1e-3)
    [difference] = summary.differences(found, [("linear", "other"), ("linear", "missing")])
    assert difference["difference"] == 0.25


def test_no_source_package_is_in_two_parts() -> None:
    rows = [Row(f"source{each // 2}", "web", f"text {each}") for each in range(400)]
    parts = split_rows(rows, ["web"])
    seen = [{row.source for row in part} for part in parts.values()]
    assert sum(map(len, seen)) == len(set.union(*seen))
    assert [len(part) for part in parts.values()] == [60, 20, 100]


def test_characters_are_cut_into_documents() -> None:
    documents = read_characters()
    assert "0041;LATIN CAPITAL LETTER A;Lu\n" in documents["00000"]
    assert all(";CJK UNIFIED IDEOGRAPH-" not in text for text in documents.values())


@pytest.mark.skipif(not (PAGE / "results.json").exists(), reason="no results are committed yet")
def test_the_page_shows_the_committed_results() -> None:
    results = json.loads((PAGE / "results.json").read_text())
    page = (PAGE / "README.md").read_text()
    assert [table for table in tables(results).split("\n\n") if table not in page] == []
