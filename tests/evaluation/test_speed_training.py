"""The benchmarks of optimizer and estimators run, compare equal work, and their pages show the results beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from evaluation.speed import adapters, fisher, lora_step, optimizer
from evaluation.speed.alternate import allocated, alternate, ratio

PAGES = Path(__file__).parent.parent.parent / "evaluation" / "speed"


def test_steps_alternate_and_ratios_are_of_neighbours() -> None:
    order: list[str] = []
    steps = {name: lambda name=name: order.append(name) for name in ("one", "other")}
    runs = alternate(steps, repeats=3, warmup=1, device="cpu")
    assert order == ["one", "other"] * 4
    assert {name: (len(each.wall), len(each.cpu)) for name, each in runs.items()} == {"one": (3, 3), "other": (3, 3)}
    assert ratio([2.0, 8.0, 30.0], [1.0, 2.0, 10.0]) == 3.0


def test_allocations_are_counted_at_their_peak_and_at_the_end() -> None:
    def work() -> torch.Tensor:
        first = torch.ones(1000)
        kept = first + 1
        del first
        return kept

    peak, kept = allocated(work)
    assert 8000 <= peak < 9000
    assert 4000 <= kept < 5000


@pytest.mark.slow
def test_the_benchmark_of_a_step_runs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizer, "LAYER", [(200, 100), (100,)])
    shape = ["--layers", "2", "--tensors", "4", "--entries", "80000"]
    optimizer.main([*shape, "--repeats", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "optimizer.json").read_text())
    page = (tmp_path / "optimizer.md").read_text()
    assert page in capsys.readouterr().out
    assert page == optimizer.page(results)
    assert {name: (case["entries"], case["tensors"]) for name, case in results["cases"].items()} == {
        "layers of a Llama": (40_200, 4),
        "equal tensors": (80_000, 4),
    }
    for case in results["cases"].values():
        assert {"IVON", "IVON, not compiled", "AdamW, fused", "AdamW, foreach", "copy"} <= set(case["runs"])
        assert case["memory"]["IVON"]["kept"] == pytest.approx(8, abs=0.1)
        assert case["memory"]["AdamW, fused"]["kept"] == pytest.approx(8, abs=0.1)


def test_the_sets_of_weights_are_as_large_as_was_asked_for() -> None:
    assert all(optimizer.count(of) >= 8_000_000 for of in optimizer.sets(3, 64, 8_000_000).values())


def test_what_is_compared_with_ivon_opt_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    runs = {name: {"wall": [1.0, 2.0], "cpu": [1.0, 1.0]} for name in [*optimizer.BYTES, "copy", "normal numbers"]}
    runs["ivon-opt"] = {"wall": [4.0, 9.0], "cpu": [3.0, 3.0]}
    lines = optimizer.table("name", {"entries": 100, "tensors": 1, "runs": runs, "memory": {}})
    assert "4.25 times as fast as ivon-opt 0.1.3 (3.00 times by processor time)" in " ".join(lines)
    optimizer.variants()
    assert capsys.readouterr().err in ("", "ivon-opt is not importable: left out\n")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of PEFT and transformers
def test_the_benchmark_of_an_adapter_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--size", "tiny", "--batch", "2", "--tokens", "8", "--repeats", "2"]
    lora_step.main([*shape, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "lora_step.json").read_text())
    page = (tmp_path / "lora_step.md").read_text()
    assert page in capsys.readouterr().out
    assert page == lora_step.page(results)
    assert results["summary"]["time"] > 0
    assert results["memory"]["IVON"] > results["memory"]["AdamW"]


@pytest.mark.slow
def test_the_benchmark_of_estimators_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--size", "tiny", "--rows", "3", "--tokens", "8", "--chunk", "2", "--repeats", "2"]
    names = ["forward and backward", "fisher"]
    fisher.main([*shape, "--names", *names, "--out", str(tmp_path)])
    results = json.loads((tmp_path / "fisher.json").read_text())
    page = (tmp_path / "fisher.md").read_text()
    assert page in capsys.readouterr().out
    assert page == fisher.page(results)
    assert results["summary"]["time"]["forward and backward"] == 1
    assert results["memory"]["fisher"]["allocated"] > 4 * results["size"]["parameters"]


@pytest.mark.slow
def test_the_benchmark_of_adapters_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapters.main(["--size", "tiny", "--rank", "2", "--repeats", "2", "--out", str(tmp_path)])
    results = json.loads((tmp_path / "adapters.json").read_text())
    page = (tmp_path / "adapters.md").read_text()
    assert page in capsys.readouterr().out
    assert page == adapters.page(results)
    errors = results["errors"]
    assert errors["ours, exact"] < 1e-6
    assert errors["PEFT, cat"] < 1e-6
    assert errors["ours, rank of one"] == pytest.approx(errors["PEFT, svd"], rel=1e-4)  # both are the best of that rank
    assert 0.1 < errors["ours, rank of one"] < 1


def test_both_steps_of_an_adapter_begin_with_the_same_model() -> None:
    pytest.importorskip("peft")
    models = [lora_step.adapted("tiny", "cpu", torch.float32, four_bit=False) for _ in range(2)]
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    assert 0 < sum(p.numel() for p in lora_step.trained(models[0])) < sum(p.numel() for p in models[0].parameters())


@pytest.mark.parametrize(
    ("module", "name"),
    [
        (optimizer, "optimizer"),
        (optimizer, "gpu/optimizer"),
        (lora_step, "lora_step"),
        (lora_step, "gpu/lora_step"),
        (lora_step, "gpu/lora_step_nf4"),
        (fisher, "fisher"),
        (adapters, "adapters"),
    ],
)
def test_the_pages_show_the_committed_results(module: Any, name: str) -> None:
    if not (PAGES / f"{name}.json").exists():
        pytest.skip("no results are committed yet")
    results = json.loads((PAGES / f"{name}.json").read_text())
    cases = results.get("cases")
    found = {key: module.summary(case) for key, case in cases.items()} if cases else module.summary(results)
    assert results["summary"] == found
    assert (PAGES / f"{name}.md").read_text() == module.page(results)
