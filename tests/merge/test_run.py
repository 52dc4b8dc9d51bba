"""Running a plan: the same bytes every time, resumed or not, by one process or two; nothing half-written is visible."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mergekit_bayes import load_recipe, merge, plan_merge
from mergekit_bayes.errors import OutputError, RecipeError
from mergekit_bayes.merge import execute
from mergekit_bayes.merge.execute import Engine
from mergekit_bayes.merge.run import MergeResult, run_merge
from tests.merge.builders import random_precisions, random_tensors, write_checkpoint, write_precisions

SHAPES = {f"model.layers.{i}.{name}.weight": (96, 48) for i in range(3) for name in ("mlp", "attn")}
SHAPES = {"embed.weight": (300, 48), **SHAPES, "norm.weight": (48,)}

Recipe = dict[str, Any]


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """Two sources with precisions, merged into four shards."""
    root = tmp_path_factory.mktemp("inputs")
    base = write_checkpoint(root / "base", random_tensors(0, SHAPES, dtype=torch.bfloat16))
    models = []
    for seed in (1, 2):
        source = write_checkpoint(root / f"source{seed}", random_tensors(seed, SHAPES, dtype=torch.bfloat16))
        write_precisions(
            source, random_precisions(seed, SHAPES, above=1.0), base=base, prior_precision=1.0, num_examples=10 * seed
        )
        models.append({"model": str(source), "parameters": {"weight": 0.6}})
    return {
        "merge_method": "gradient_matching",
        "base_model": str(base),
        "models": models,
        "output": {"max_shard_size": 20_000},
    }


def contents(folder: Path) -> Mapping[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def tensors(folder: Path, stem: str = "model") -> dict[str, torch.Tensor]:
    return {name: t for path in sorted(folder.glob(f"{stem}*.safetensors")) for name, t in load_file(path).items()}


@pytest.fixture(scope="module")
def reference(recipe: Recipe, tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, bytes]:
    """The whole output folder of an undisturbed run with one thread."""
    out = tmp_path_factory.mktemp("reference") / "out"
    merge(recipe, out, threads=1)
    return contents(out)


def test_an_output_has_everything_and_nothing_else(reference: Mapping[str, bytes]) -> None:
    shards = [f"{stem}-0000{i}-of-00004.safetensors" for stem in ("model", "precision") for i in (1, 2, 3, 4)]
    others = ["README.md", "config.json", "merge_recipe.yaml", "merge_report.json"]
    indexes = ["model.safetensors.index.json", "precision.safetensors.index.json"]
    assert sorted(reference) == sorted([*shards, *others, *indexes])


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_does_not_show(
    recipe: Recipe, reference: Mapping[str, bytes], threads: int, tmp_path: Path
) -> None:
    merge(recipe, tmp_path / "out", threads=threads)
    assert contents(tmp_path / "out") == reference


def test_the_size_of_blocks_does_not_show_in_the_tensors(
    recipe: Recipe, reference: Mapping[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "GRAIN", 97)
    plan = plan_merge(load_recipe(recipe), tmp_path / "out")
    run_merge(plan, max_memory=1)
    for name in reference:
        if name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == reference[name]


@pytest.mark.slow
@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_hash_seed_does_not_show(
    recipe: Recipe, reference: Mapping[str, bytes], hash_seed: str, tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))  # JSON is YAML
    command = [sys.executable, "-m", "mergekit_bayes", str(tmp_path / "recipe.json"), str(tmp_path / "out")]
    subprocess.run(command, check=True, env={**os.environ, "PYTHONHASHSEED": hash_seed}, capture_output=True)
    assert contents(tmp_path / "out") == reference


def test_the_size_of_shards_does_not_show_in_the_tensors(recipe: Recipe, tmp_path: Path) -> None:
    merge(recipe, tmp_path / "many")
    merge({**recipe, "output": {}}, tmp_path / "one")
    for stem in ("model", "precision"):
        many, one = tensors(tmp_path / "many", stem), tensors(tmp_path / "one", stem)
        assert list(tmp_path.glob(f"one/{stem}*")) == [tmp_path / "one" / f"{stem}.safetensors"]
        assert many.keys() == one.keys() == SHAPES.keys()
        assert all(torch.equal(many[name], one[name]) for name in one)


class Interrupted:
    """Makes the n-th shard of a run end in an exception, and counts the shards that were begun."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun: list[str] = []
        self.at: int | None = None
        self.error: BaseException = KeyboardInterrupt()
        original = Engine.run_unit

        def run_unit(engine: Engine, unit: Any, folder: Path) -> Any:
            self.begun.append(unit.layout.filename)
            if self.at is not None and len(self.begun) > self.at:
                (folder / unit.layout.filename).write_bytes(b"half a shard")
                raise self.error
            return original(engine, unit, folder)

        monkeypatch.setattr(Engine, "run_unit", run_unit)


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Interrupted:
    return Interrupted(monkeypatch)


def test_an_interrupted_merge_leaves_no_output_and_continues_from_finished_shards(
    recipe: Recipe, reference: Mapping[str, bytes], interrupted: Interrupted, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    interrupted.at = 2
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out)
    assert not out.exists()
    interrupted.at, interrupted.begun = None, []
    merge(recipe, out)
    assert interrupted.begun == ["model-00003-of-00004.safetensors", "model-00004-of-00004.safetensors"]
    assert contents(out) == reference
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


KILLED = """
import os, signal, sys
from mergekit_bayes import merge
from mergekit_bayes.checkpoint.writer import ShardWriter

write, left = ShardWriter.write, int(sys.argv[3])

def counted(*arguments):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)

ShardWriter.write = counted
merge(sys.argv[1], sys.argv[2])
"""


@pytest.mark.slow
@pytest.mark.parametrize("writes", [0, 5, 15])
def test_a_killed_merge_leaves_no_output_and_is_continued(
    recipe: Recipe, reference: Mapping[str, bytes], writes: int, tmp_path: Path
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    out = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(tmp_path / "recipe.json"), str(out), str(writes)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    merge(recipe, out)
    assert contents(out) == reference
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "recipe.json"]


@pytest.mark.parametrize("change", ["weight", "input"])
def test_an_interrupted_merge_starts_over_when_anything_changed(
    recipe: Recipe, interrupted: Interrupted, change: str, tmp_path: Path
) -> None:
    interrupted.at = 2
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, tmp_path / "out")
    interrupted.at, interrupted.begun = None, []
    if change == "weight":
        first = {**recipe["models"][0], "parameters": {"weight": 0.5}}
        merge({**recipe, "models": [first, *recipe["models"][1:]]}, tmp_path / "out")
    else:
        weights = Path(recipe["base_model"]) / "model.safetensors"
        stamp = weights.stat()
        os.utime(weights, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
        merge(recipe, tmp_path / "out")
    assert len(interrupted.begun) == 4


def test_an_existing_output_is_refused_and_untouched(recipe: Recipe, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious.txt").write_text("mine")
    with pytest.raises(OutputError, match="overwrite"):
        merge(recipe, out)
    assert contents(out) == {"precious.txt": b"mine"}


def test_overwrite_replaces_everything_once_the_new_output_is_complete(
    recipe: Recipe, reference: Mapping[str, bytes], interrupted: Interrupted, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    merge({**recipe, "output": {"max_shard_size": 9_000}}, out)
    before = contents(out)
    interrupted.at, interrupted.begun = 1, []
    with pytest.raises(KeyboardInterrupt):
        merge(recipe, out, overwrite=True)
    assert contents(out) == before
    interrupted.at = None
    merge(recipe, out, overwrite=True)
    assert contents(out) == reference


def test_a_full_disk_is_seen_before_any_work(
    recipe: Recipe, interrupted: Interrupted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_bayes.checkpoint.disk.free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"needed, 1,000 bytes .* free"):
        merge(recipe, tmp_path / "out")
    assert interrupted.begun == []
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_midway_costs_only_the_unfinished_shard(
    recipe: Recipe, reference: Mapping[str, bytes], interrupted: Interrupted, tmp_path: Path
) -> None:
    interrupted.at, interrupted.error = 3, OutputError("no space left on device")
    with pytest.raises(OutputError):
        merge(recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    interrupted.at, interrupted.begun = None, []
    merge(recipe, tmp_path / "out")
    assert interrupted.begun == ["model-00004-of-00004.safetensors"]
    assert contents(tmp_path / "out") == reference


def test_files_have_the_mode_that_the_umask_gives(recipe: Recipe, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        merge(recipe, tmp_path / "out")
    finally:
        os.umask(before)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert modes == {0o640}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o750


def test_a_merge_without_an_output_folder_says_where_to_name_one(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"output\.path"):
        merge(recipe)


def test_the_output_folder_may_stand_in_the_recipe(recipe: Recipe, tmp_path: Path) -> None:
    result = merge({**recipe, "output": {"path": str(tmp_path / "named")}})
    assert result.folder == tmp_path / "named"
    assert (tmp_path / "named" / "config.json").exists()


def test_a_device_that_is_not_there_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="--device cuda:77"):
        merge(recipe, tmp_path / "out", device="cuda:77")
    assert list(tmp_path.iterdir()) == []


def test_the_report_says_what_went_in_and_what_it_costs(recipe: Recipe, tmp_path: Path) -> None:
    result = merge(recipe, tmp_path / "out")
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert result.report == report
    assert [entry["role"] for entry in report["inputs"]] == ["base", "source", "source"]
    assert all(entry["fingerprint"].startswith("blake2b-16:") for entry in report["inputs"])
    assert report["seed"] == 0
    assert report["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]  # not every build tells itself
    for index, source in enumerate(recipe["models"]):
        gap = report["mismatch"][source["model"]]
        assert gap["total"] == pytest.approx(sum(gap["by_layer"].values()))
        assert gap["per_unit"] == pytest.approx(gap["total"] / (10 * (index + 1)))
    gap = report["mismatch"][recipe["models"][0]["model"]]
    worst, cost = max(gap["by_layer"].items(), key=lambda item: item[1])
    assert (
        f"predicted loss increase of {recipe['models'][0]['model']}: {gap['total']:.4g} "
        f"({gap['per_unit']:.3g} per training unit), most in {worst} ({cost / gap['total']:.0%})"
    ) in result.summary()


def test_a_process_that_does_not_lead_has_nothing_to_say() -> None:
    assert MergeResult(Path("out"), {}).summary() == ""


def test_progress_adds_up_to_the_bytes_of_the_plan(recipe: Recipe, tmp_path: Path) -> None:
    plan = plan_merge(load_recipe(recipe), tmp_path / "out")
    seen: list[int] = []
    engine = Engine(plan, execute.Options(), progress=seen.append)
    for unit in plan.units:
        engine.run_unit(unit, tmp_path)
    engine.close()
    headers = sum(len(x.header) for unit in plan.units for x in (unit.layout, unit.precision_layout) if x)
    assert sum(seen) == plan.bytes_read + plan.bytes_written - headers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch.compile
def test_a_compiled_merge_gives_the_same_tensors(
    recipe: Recipe, reference: Mapping[str, bytes], tmp_path: Path
) -> None:
    plan = plan_merge(load_recipe(recipe), tmp_path / "out")
    run_merge(plan, compile=True)
    for name in reference:
        if name.endswith(".safetensors"):
            assert (tmp_path / "out" / name).read_bytes() == reference[name]


def test_a_compiler_that_does_not_work_is_refused_when_asked_for(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> object:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", broken)
    plan = plan_merge(load_recipe(recipe), tmp_path / "out")
    with pytest.raises(OutputError, match="--no-compile"):
        run_merge(plan, compile=True)
    monkeypatch.setattr("mergekit_bayes.merge.run.COMPILE_FROM_BYTES", 0)
    run_merge(plan)
    assert json.loads((tmp_path / "out" / "merge_report.json").read_text())["options"]["compile"] is False


@pytest.mark.slow
def test_two_processes_give_the_bytes_of_one(
    recipe: Recipe, reference: Mapping[str, bytes], tmp_path: Path, launch: Callable[..., Any]
) -> None:
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    done = launch(2, "recipe.json", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "out") == reference


@pytest.mark.slow
def test_a_failure_in_one_of_two_processes_ends_both(
    recipe: Recipe, tmp_path: Path, launch: Callable[..., Any]
) -> None:
    """The last shard holds a precision that is not positive; its process says so, the other one stops too."""
    bad = json.loads(json.dumps(recipe))
    bad["precision"] = {"prior": 1.0}
    bad["models"][0]["parameters"]["weight"] = -50.0
    (tmp_path / "recipe.json").write_text(json.dumps(bad))
    done = launch(2, "recipe.json", "out", cwd=tmp_path)
    assert done.returncode != 0
    assert "zero or negative" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.fixture
def launch() -> Callable[..., Any]:
    def run(processes: int, *arguments: str, cwd: Path) -> Any:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        command += ["-m", "mergekit_bayes", *arguments]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)

    return run
