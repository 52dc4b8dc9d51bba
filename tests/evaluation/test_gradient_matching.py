"""The study of gradient matching trains, merges and scores, and its page shows its results."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from evaluation.gradient_matching import study
from evaluation.gradient_matching.domains import DOMAINS, LABELS, parse, split_domains
from evaluation.gradient_matching.merges import DELTA, Model, merge
from evaluation.gradient_matching.report import curves, tables
from evaluation.gradient_matching.runs import CURVES
from evaluation.gradient_matching.train import Ivon, Schedule
from evaluation.merging.packages import Packages, Row
from tests.conftest import TinyCheckpoints
from tests.model.builders import with_tokenizer

PAGE = Path(study.__file__).parent
QUICK = Schedule(steps=3, rate=0.01, head_rate=0.01)
SETTINGS = study.Settings(QUICK, QUICK, QUICK, QUICK, Ivon(ess=1e5, noise=0.003), fisher_rows=4)


@pytest.fixture
def family(tiny_checkpoint: TinyCheckpoints, tmp_path: Path) -> Packages:
    stream = random.Random(1)

    def text() -> str:
        return " ".join(f"w{stream.randrange(45)}" for _ in range(6))

    rows = {
        domain: {
            part: [Row(f"{domain}{part}{each}", LABELS[each % 2], text()) for each in range(count)]
            for part, count in (("train", 8), ("tuning", 2), ("test", 6))
        }
        for domain in ("first", "second", "third")
    }
    return Packages(
        rows, folder=with_tokenizer(tiny_checkpoint("bert_masked_lm"), tmp_path / "base", pad=True), batch=4
    )


@pytest.mark.slow
def test_the_study_runs_from_training_to_tables(
    family: Packages, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = study.study(family, tmp_path / "runs", (0, 1), settings=SETTINGS)
    study.write(tmp_path / "out", results)
    kept = json.loads((tmp_path / "out" / "results.json").read_text())
    assert tables(kept) in capsys.readouterr().out
    assert (tmp_path / "out" / "accuracy.png").stat().st_size > 10_000
    for run in kept["runs"]:
        found = curves(run)
        assert {name: tuple(map(float, scores)) for name, scores in found.items()} == {
            name: curve.scales for name, curve in CURVES.items()
        }
        assert found["task arithmetic"]["0"] == found["gradient matching, squared gradients"]["0"]
        assert found["task arithmetic"]["0"] != found["task arithmetic, IVON's models"]["0"]
        assert found["task arithmetic"]["1"] != found["gradient matching, squared gradients"]["1"]
        assert list(run["ivon"]["at_home"]) == list(run["ivon"]["diagnoses"]) == ["first", "second", "third"]
        assert all(seconds > 0 for optimizer in run.values() for seconds in optimizer["seconds"].values())
    first, second = kept["runs"]
    assert first["adamw"]["curves"] != second["adamw"]["curves"]
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()}
    study.study(family, tmp_path / "runs", (0, 1), settings=SETTINGS)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs").iterdir()} == times
    assert str(tmp_path) not in (tmp_path / "out" / "results.json").read_text()


def test_merges_are_those_of_the_paper() -> None:
    stream = np.random.default_rng(0)

    def model(rows: int) -> Model:
        tensor, curvature = stream.normal(size=(3, 2)), stream.gamma(0.5, size=(3, 2))
        return Model({"w": torch.tensor(tensor)}, {"w": torch.tensor(curvature)}, rows)

    base, experts = model(30), [model(10), model(20)]
    start, prior = base.means["w"].numpy(), base.summed("w").numpy() + DELTA
    curved = [expert.summed("w").numpy() for expert in experts]
    moves = [expert.means["w"].numpy() - start for expert in experts]
    for scale in (0.25, 1.0, 1.5):
        total = prior + scale * sum(curved)
        expected = start + scale * sum((prior + h) / total * move for h, move in zip(curved, moves, strict=True))
        np.testing.assert_allclose(merge("gradient_matching", scale, base, experts)["w"], expected, rtol=1e-9)
        plain = merge("task_arithmetic", scale, base, experts)["w"]
        np.testing.assert_allclose(plain, start + scale * sum(moves), rtol=1e-9)
        average = start + sum(h * move for h, move in zip(curved, moves, strict=True)) / sum(curved)
        np.testing.assert_allclose(merge("hessian_weighted", scale, base, experts)["w"], average, rtol=1e-6)
    alone = merge("gradient_matching", 1.0, base, [replace(experts[0], rows=10**12)])["w"]
    np.testing.assert_allclose(alone, experts[0].means["w"], rtol=1e-6)


def test_labels_are_roles_of_packages_with_one() -> None:
    printed = "\n\n".join(
        (
            "Package: a\nSection: x11\nDescription: draws\nTag: uitoolkit::gtk,\n role::program, x11::application",
            "Package: b\nSection: contrib/doc\nSource: book (1.0)\nDescription: explains\nTag: role::documentation",
            "Package: c\nSection: x11\nDescription: two of them\nTag: role::program, role::plugin",
            "Package: d\nSection: x11\nDescription: none\nTag: uitoolkit::gtk",
            "Package: e\nSection: x11\nDescription: Draws\nTag: role::program",
        )
    )
    found = {(section, row.section, row.source) for section, row in parse(printed)}
    assert len(found) == 2
    assert ("doc", "other", "book") in found
    assert found & {("x11", "program", "a"), ("x11", "program", "e")}


def test_parts_are_balanced_and_share_no_source_package() -> None:
    sections = [section for group in DOMAINS.values() for section in group]
    assert len(sections) == len(set(sections))
    stream = random.Random(0)
    rows = [
        (stream.choice(sections), Row(f"source{stream.randrange(2000)}", stream.choice(LABELS), f"text {each}"))
        for each in range(6000)
    ]
    found = split_domains(rows)
    seen: set[str] = set()
    for parts in found.values():
        for part in parts.values():
            assert [sum(row.section == label for row in part) for label in LABELS] == [len(part) // 2] * 2
            sources = {row.source for row in part}
            assert not sources & seen
            seen |= sources
    assert len(seen) > 1000


@pytest.mark.skipif(not (PAGE / "results.json").exists(), reason="no results are committed yet")
def test_the_page_shows_the_committed_results() -> None:
    results = json.loads((PAGE / "results.json").read_text())
    page = (PAGE / "README.md").read_text()
    assert [table for table in tables(results).split("\n\n") if table not in page] == []
