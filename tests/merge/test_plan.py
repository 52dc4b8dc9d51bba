"""Plans: what they hold, what they promise, how they read, and that headers are all they need."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_bayes.checkpoint.reader import BlockReader
from mergekit_bayes.errors import PlanError
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.memory import LIBRARY_BYTES, peak_memory
from mergekit_bayes.merge.plan import MergePlan, plan_merge
from mergekit_bayes.merge.plan_text import plan_text
from mergekit_bayes.merge.run import run_merge
from mergekit_bayes.merge.steps import CopyStep, MergeStep, ModuleStep
from tests.golden.compare import GOLDEN, check_golden
from tests.merge.builders import (
    factor_names,
    random_precisions,
    random_tensors,
    snapshot,
    write_adapter,
    write_checkpoint,
    write_precisions,
)

SHAPES = {
    "model.embed_tokens.weight": (40, 16),
    "model.layers.0.mlp.weight": (48, 16),
    "model.layers.0.norm.weight": (16,),
    "model.layers.1.mlp.weight": (48, 16),
    "model.layers.1.norm.weight": (16,),
}
MLP = ("model.layers.0.mlp", "model.layers.1.mlp")


def write_models(root: Path, *, sidecars: bool = True, shards: int = 1, dtype: torch.dtype = torch.bfloat16) -> None:
    for seed, name in enumerate(("base", "code", "prose")):
        ids = {"model.position_ids": torch.arange(8)}
        write_checkpoint(root / name, {**random_tensors(seed, SHAPES, dtype=dtype), **ids}, shards=shards)
        if sidecars and name != "base":
            facts = {"loss_unit": "token", "num_examples": 1000 * seed, "prior_precision": 0.5}
            precisions = random_precisions(seed, SHAPES, above=1.0)
            write_precisions(root / name, precisions, base=root / "base", shards=shards, **facts)


def write_adapters(root: Path) -> None:
    write_models(root, sidecars=False)
    for seed, (name, rank) in enumerate((("lora_code", 2), ("lora_prose", 2)), start=1):
        shapes = {
            factor: shape
            for module in MLP
            for factor, shape in zip(factor_names(module), ((rank, 16), (48, rank)), strict=True)
        }
        factors = random_tensors(seed, shapes)
        pairs = {module: tuple(factors[factor] for factor in factor_names(module)) for module in MLP}
        write_adapter(root / name, pairs, alpha=4.0)  # type: ignore[arg-type]
        write_precisions(root / name, random_precisions(seed, shapes, above=5.0), num_examples=100 * seed)


def recipe(
    root: Path, method: str = "gradient_matching", names: tuple[str, ...] = ("code", "prose"), **extra: Any
) -> Any:
    models = [{"model": str(root / name), "parameters": {"weight": 0.5 * i}} for i, name in enumerate(names, start=1)]
    return load_recipe({"merge_method": method, "base_model": str(root / "base"), "models": models, **extra})


LORA = ("lora_code", "lora_prose")


def dense(root: Path) -> MergePlan:
    write_models(root)
    return plan_merge(recipe(root))


def sharded(root: Path) -> MergePlan:
    write_models(root, shards=2)
    filters = [{"filter": "norm", "value": 1.0}, {"value": [0.25, 0.75]}]
    return plan_merge(
        load_recipe(
            {
                "merge_method": "posterior",
                "base_model": str(root / "base"),
                "models": [
                    {"model": str(root / "code"), "parameters": {"weight": filters}},
                    {"model": str(root / "prose"), "parameters": {"weight": -0.1}, "precision": False},
                ],
                "out_dtype": "float32",
                "output": {"max_shard_size": 4000, "precision": "bfloat16"},
            }
        )
    )


def product(root: Path) -> MergePlan:
    write_adapters(root)
    return plan_merge(recipe(root, "posterior", LORA, space="product", precision={"prior": 0.01}))


def stack(root: Path) -> MergePlan:
    write_adapters(root)
    return plan_merge(recipe(root, "task_arithmetic", LORA, space="product"))


def factor(root: Path) -> MergePlan:
    write_adapters(root)
    return plan_merge(recipe(root, "gradient_matching", LORA, space="factor", precision={"prior": 0.01}))


def full(root: Path) -> MergePlan:
    write_adapters(root)
    return plan_merge(recipe(root, "gradient_matching", LORA, space="full", precision={"prior": 0.01}))


def kronecker(root: Path) -> MergePlan:
    """One source has factors for the layers, the other diagonals."""
    write_models(root)
    own = random_precisions(1, {name: shape for name, shape in SHAPES.items() if "mlp" not in name}, above=1.0)
    for seed, module in enumerate(MLP):
        roots = random_tensors(seed, {"input_factor": (1, 16, 20), "output_factor": (1, 48, 60)})
        own |= {f"{module}.weight.{part}": each @ each.mT for part, each in roots.items()}
    facts = {"loss_unit": "token", "num_examples": 1000, "prior_precision": 0.5, "estimator": "kfac"}
    write_precisions(root / "code", own, base=root / "base", family="kronecker", **facts)
    return plan_merge(recipe(root, "kronecker", parameters={"shrinkage": [{"filter": "mlp", "value": [0, 0.5]}]}))


PLANS: dict[str, Callable[[Path], MergePlan]] = {
    each.__name__: each for each in (dense, sharded, product, stack, factor, full, kronecker)
}

every_plan = pytest.mark.parametrize("make", PLANS.values(), ids=PLANS)


@every_plan
def test_plans_read_as_they_did(make: Callable[[Path], MergePlan], tmp_path: Path) -> None:
    text = plan_text(make(tmp_path))
    # the estimate counts worker threads, one per core of this machine
    text = re.sub(r"memory     about .* at its peak", "memory     about SIZE at its peak", text)
    # a sidecar records the name of the base, which is a path of this machine
    text = re.sub(r"(precision\S*: \d+ tensors?, |write      ).*", r"\1SIZE", text)
    check_golden(GOLDEN / "plans" / f"{make.__name__}.txt", text.replace(str(tmp_path), "models") + "\n")


def test_a_plan_says_how_much_room_there_is_where_it_will_write(tmp_path: Path) -> None:
    write_models(tmp_path)
    text = plan_text(plan_merge(recipe(tmp_path), tmp_path / "out"), steps=False)
    assert re.search(rf"^disk       [^\n]+ free at {tmp_path}/out$", text, re.MULTILINE)
    assert "model.layers" not in text


@every_plan
def test_planning_leaves_everything_as_it_is_and_reads_no_weights(
    make: Callable[[Path], MergePlan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a plan needs no weights")

    monkeypatch.setattr(BlockReader, "read_block", refuse)
    monkeypatch.setattr(BlockReader, "read_tensor", refuse)
    plan = make(tmp_path)
    before = snapshot(tmp_path)
    plan_text(plan)
    again = plan_merge(plan.recipe)
    assert snapshot(tmp_path) == before
    assert again.steps == plan.steps
    assert again.job == plan.job


@every_plan
def test_a_plan_knows_the_bytes_it_will_write(make: Callable[[Path], MergePlan], tmp_path: Path) -> None:
    plan = make(tmp_path)
    out = tmp_path / "out"
    run_merge(plan_merge(plan.recipe, out), threads=1)
    sizes = {file.name: file.stat().st_size for file in out.glob("*.safetensors")}
    planned = {
        layout.filename: layout.nbytes
        for unit in plan.units
        for layout in (unit.layout, unit.precision_layout)
        if layout is not None
    }
    assert sizes == planned
    assert plan.bytes_written == sum(sizes.values())


def test_every_byte_of_the_inputs_that_matters_is_read(tmp_path: Path) -> None:
    plan = dense(tmp_path)
    stored = sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())
    # three bfloat16 checkpoints, two float32 sidecars, and the buffer of eight 64-bit numbers in each checkpoint
    assert plan.bytes_read == 3 * stored + 2 * 2 * stored + 3 * 64


def test_a_base_that_is_not_used_is_not_read(tmp_path: Path) -> None:
    write_models(tmp_path)
    stored = sum(2 * torch.Size(shape).numel() for shape in SHAPES.values())
    plan = plan_merge(recipe(tmp_path, "linear"))
    assert plan.bytes_read == 2 * stored + 3 * 64


@every_plan
def test_steps_are_in_the_order_of_names_within_each_shard(make: Callable[[Path], MergePlan], tmp_path: Path) -> None:
    plan = make(tmp_path)
    for unit in plan.units:
        names = [step.name for step in unit.steps]
        assert names == sorted(names)
    written = [entry.name for unit in plan.units for entry in unit.layout.entries]
    assert len(written) == len(set(written))
    assert sorted(written) == sorted(entry.name for step in plan.steps for entry in step.entries)


def test_kinds_of_steps(tmp_path: Path) -> None:
    kinds = {type(step) for step in dense(tmp_path / "dense").steps}
    assert kinds == {MergeStep, CopyStep}
    assert {type(step) for step in factor(tmp_path / "factor").steps} == {ModuleStep}
    untouched = [step.name for step in full(tmp_path / "full").steps if isinstance(step, CopyStep)]
    assert untouched == [name for name in SHAPES if "mlp" not in name] + ["model.position_ids"]


def test_the_job_changes_with_everything_that_decides_bytes_and_nothing_else(tmp_path: Path) -> None:
    write_models(tmp_path)
    prior = {"prior": 0.5}
    job = plan_merge(recipe(tmp_path, precision=prior)).job
    assert plan_merge(recipe(tmp_path, precision=prior), tmp_path / "anywhere").job == job
    others = [
        recipe(tmp_path, "posterior", precision=prior),
        recipe(tmp_path, out_dtype="float32", precision=prior),
        recipe(tmp_path, scale="mean", precision=prior),
        recipe(tmp_path, precision={"prior": 2.0}),
        recipe(tmp_path, output={"max_shard_size": 4000}, precision=prior),
        recipe(tmp_path, seed=1, precision=prior),
    ]
    jobs = [plan_merge(other).job for other in others]
    file = tmp_path / "prose" / "precision.safetensors"
    values = bytearray(file.read_bytes())
    values[-3] ^= 1
    file.write_bytes(values)
    jobs.append(plan_merge(recipe(tmp_path, precision=prior)).job)
    assert len({job, *jobs}) == len(jobs) + 1


def test_the_job_changes_with_the_scaling_of_an_adapter(tmp_path: Path) -> None:
    """Which stands in its configuration alone: no tensor shows it."""
    plan = factor(tmp_path)
    path = Path(plan.sources[0].label) / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "lora_alpha": 2 * config["lora_alpha"]}))
    assert plan_merge(plan.recipe).job != plan.job


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    write_models(tmp_path)
    (tmp_path / "code" / "model.safetensors").write_bytes(b"nonsense")
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("code", "nowhere", "prose")]
    with pytest.raises(PlanError) as caught:
        plan_merge(load_recipe({"merge_method": "linear", "models": models}))
    first, second = caught.value.problems
    assert "models[0].model" in str(first)
    assert str(tmp_path / "code" / "model.safetensors") in str(first)
    assert "models[1].model" in str(second)
    assert "nowhere" in str(second)


def test_problems_have_their_place_in_the_recipe(tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text("merge_method: linear\nmodels:\n  - model: ./nowhere\n    parameters: {weight: 1}\n")
    with pytest.raises(PlanError) as caught:
        plan_merge(load_recipe(file), recipe_dir=tmp_path)
    assert str(caught.value).startswith(f"{file}:3:12  ./nowhere: is no folder")


def test_filters_that_match_no_tensor_are_refused(tmp_path: Path) -> None:
    write_models(tmp_path)
    weight = [{"filter": "mpl", "value": 0.5}, {"value": 1.0}]
    models = [{"model": str(tmp_path / "code"), "parameters": {"weight": weight}}]
    asked = load_recipe({"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models})
    with pytest.raises(PlanError, match='"mpl" matches no tensor name'):
        plan_merge(asked)


def test_tensors_without_a_weight_are_refused_by_name(tmp_path: Path) -> None:
    write_models(tmp_path)
    weight = [{"filter": "mlp", "value": 0.5}]
    models = [{"model": str(tmp_path / "code"), "parameters": {"weight": weight}}]
    asked = load_recipe({"merge_method": "task_arithmetic", "base_model": str(tmp_path / "base"), "models": models})
    with pytest.raises(PlanError) as caught:
        plan_merge(asked)
    lines = str(caught.value).splitlines()
    names = [name for name in SHAPES if "mlp" not in name]
    assert len(lines) == len(names)
    assert all(f"no filter gives tensor {name} a weight" in line for name, line in zip(names, lines, strict=True))


# --- memory ---------------------------------------------------------------------------------------------------------


def wide_plan(root: Path, rows: int, sources: int) -> MergePlan:
    for index in range(sources + 1):
        write_checkpoint(root / f"m{index}", {"a.weight": torch.zeros(rows, 64, dtype=torch.bfloat16)})
    models = [{"model": str(root / f"m{i}"), "parameters": {"weight": 0.1}} for i in range(1, sources + 1)]
    return plan_merge(
        load_recipe({"merge_method": "task_arithmetic", "base_model": str(root / "m0"), "models": models})
    )


def test_estimated_memory_depends_on_workers_not_on_models(tmp_path: Path) -> None:
    small, large = wide_plan(tmp_path / "small", 100, 2), wide_plan(tmp_path / "large", 10_000, 6)
    assert peak_memory(small, workers=2) == peak_memory(large, workers=2)
    one, two, three = (peak_memory(small, workers=workers) for workers in (1, 2, 3))
    assert three - two == two - one > 0
    assert LIBRARY_BYTES < one < 700 << 20
    assert peak_memory(small, workers=1, block_bytes=1 << 20) < one


@pytest.mark.slow
def test_estimated_memory_is_about_what_a_merge_takes(tmp_path: Path) -> None:
    """Within a factor of two, both ways, in a process of its own; builds of torch for GPUs are a gigabyte larger."""
    plan = wide_plan(tmp_path, 100_000, 3)
    script = (
        "import resource, sys, torch\n"
        "torch_alone = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "from mergekit_bayes import merge\n"
        "root = sys.argv[1]\n"
        "models = [{'model': f'{root}/m{i}', 'parameters': {'weight': 0.1}} for i in (1, 2, 3)]\n"
        "recipe = {'merge_method': 'task_arithmetic', 'base_model': f'{root}/m0', 'models': models}\n"
        "merge(recipe, f'{root}/out', threads=1)\n"
        "print(torch_alone, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    torch_alone, peak = (int(kilobytes) * 1024 for kilobytes in run.stdout.split())
    taken = peak - max(0, torch_alone - LIBRARY_BYTES)
    assert 0.5 < peak_memory(plan, workers=1) / taken < 2.0


# --- a plan is light ------------------------------------------------------------------------------------------------

HEAVY = ("torch", "transformers", "peft", "numpy", "safetensors")


@pytest.mark.parametrize("name", ["dense", "product", "full"])
def test_a_plan_imports_no_heavy_library(name: str, tmp_path: Path) -> None:
    PLANS[name](tmp_path)
    names = ("code", "prose") if name == "dense" else LORA
    models = [{"model": str(tmp_path / each), "parameters": {"weight": 0.5}} for each in names]
    space = {} if name == "dense" else {"space": name}
    content = {
        "merge_method": "gradient_matching",
        "base_model": str(tmp_path / "base"),
        "models": models,
        "precision": {"prior": 0.01},
        **space,
    }
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from mergekit_bayes import load_recipe, plan_merge\n"
        "from mergekit_bayes.merge.plan_text import plan_text\n"
        f"plan = plan_merge(load_recipe({content!r}), Path({str(tmp_path / 'out')!r}))\n"
        "assert 'tensors' in plan_text(plan)\n"
        f"print([name for name in {HEAVY} if name in sys.modules])\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (run.stdout, run.stderr) == ("[]\n", "")
