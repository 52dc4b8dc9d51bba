"""Methods that see whole tensors: what reaches their kernel, what is written and measured, and the memory they get."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mergekit_bayes.errors import MethodError, NonFiniteError, NonPositivePrecisionError, NumericalError, OutputError
from mergekit_bayes.merge import registry
from mergekit_bayes.merge.load import load_recipe
from mergekit_bayes.merge.memory import Allowance, largest_whole, peak_memory
from mergekit_bayes.merge.plan import plan_merge
from mergekit_bayes.merge.plan_text import plan_text
from mergekit_bayes.merge.registry import Merge, Parameter, merge_method, methods
from mergekit_bayes.merge.run import MergeResult, merge, run_merge
from mergekit_bayes.merge.steps import CopyStep, TensorStep
from mergekit_bayes.posterior import Diagonal, Isotropic, Posterior
from tests.merge.builders import (
    random_precisions,
    random_tensors,
    read_json,
    read_precisions,
    read_tensors,
    write_adapter,
    write_checkpoint,
    write_precisions,
)
from tests.merge.truth import lora_update

SHAPES: Mapping[str, tuple[int, ...]] = {
    "embed.weight": (6, 4),
    "layers.0.attn.bias": (7,),
    "layers.0.attn.weight": (3, 7),
    "layers.1.attn.bias": (7,),
    "layers.1.attn.weight": (3, 7),
    "layers.1.norm.weight": (3,),
    "scale": (),
    "unused": (0, 5),
}
"""Weights of the layers are stored as (in, out): their biases tell."""

WEIGHTS = (0.5, 0.75)
NAMES = ("one", "two")
SEEN: list[dict[str, Any]] = []
PARAMETERS = (
    Parameter("shift", float, 0.0, help="added"),
    Parameter("density", float, 1.0, per_source=True, help="multiplies"),
)


def spread(base: Posterior, sources: Sequence[Posterior], weights: Tensor) -> Tensor:
    """Task vectors without their mean over the whole tensor: no block can know it."""
    vectors = [source.mean - base.mean for source in sources]
    return sum((w * (v - v.mean()) for w, v in zip(weights.to(base.mean.dtype), vectors, strict=True)), base.mean * 0)


def centred(
    base: Posterior,
    sources: Sequence[Posterior],
    weights: Tensor,
    *,
    floor: float | None = None,
    shift: float = 0.0,
    density: Sequence[float] = (),
) -> Merge:
    """Add what is left of the task vectors without their mean, which only the whole tensor has."""
    SEEN.append({"shape": tuple(base.mean.shape), "shift": shift, "density": density})
    norms = {str(t): float(torch.linalg.vector_norm(source.mean)) for t, source in enumerate(sources)}
    alpha = weights * torch.tensor(density, dtype=torch.float64)
    return Merge(base.with_mean(base.mean + spread(base, sources, alpha) + shift), {"norm": norms, "shift": shift})


def certain(base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None) -> Posterior:
    """Add the task vectors without their mean, and sum up precisions."""
    alpha = weights.to(base.mean.dtype)
    precision = base.precision_tensor() * (1 - alpha.sum())
    for weight, source in zip(alpha, sources, strict=True):
        precision = precision + weight * source.precision_tensor()
    mean = base.mean + spread(base, sources, weights)
    return Diagonal.unchecked(mean, precision) if precision.dim() else Isotropic.unchecked(mean, precision)


@pytest.fixture(autouse=True)
def whole_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    SEEN.clear()
    monkeypatch.setattr(registry, "_methods", {method.name: method for method in methods()})
    known = {"base": "required", "paper": "arXiv 0000.00000", "scope": "tensor"}
    merge_method("centred", precision="unused", prior="unused", parameters=PARAMETERS, **known)(centred)  # type: ignore[arg-type]
    merge_method("certain", precision="required", prior="required", **known)(certain)  # type: ignore[arg-type]


@pytest.fixture
def models(tmp_path: Path) -> dict[str, dict[str, Tensor]]:
    found = {name: random_tensors(seed, SHAPES) for seed, name in enumerate(("base", *NAMES))}
    for name, tensors in found.items():
        write_checkpoint(tmp_path / name, tensors, shards=1 if name == "base" else 2)
    return found


def recipe(root: Path, method: str = "centred", weights: Sequence[float] = WEIGHTS, **extra: Any) -> dict[str, Any]:
    listed = [
        {"model": str(root / name), "parameters": {"weight": weight}}
        for name, weight in zip(NAMES, weights, strict=True)
    ]
    return {"merge_method": method, "base_model": str(root / "base"), "models": listed, **extra}


def wanted(models: Mapping[str, Mapping[str, Tensor]], name: str, weights: Sequence[float] = WEIGHTS) -> Tensor:
    base = models["base"][name].double()
    vectors = [models[source][name].double() - base for source in NAMES]
    return base + sum(
        (w * (v - v.mean()) for w, v in zip(weights, vectors, strict=True)), torch.zeros((), dtype=torch.float64)
    )


def check(out: Path, models: Mapping[str, Mapping[str, Tensor]], weights: Sequence[float] = WEIGHTS) -> None:
    for name, merged in read_tensors(out).items():
        torch.testing.assert_close(merged.double(), wanted(models, name, weights), rtol=1e-6, atol=1e-6)


def test_a_kernel_gets_tensors_whole_and_linear_layers_as_out_by_in(
    models: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    merge(recipe(tmp_path), tmp_path / "out", threads=1)
    check(tmp_path / "out", models)
    assert [seen["shape"] for seen in SEEN] == [(6, 4), (7,), (7, 3), (7,), (7, 3), (3,), ()], "never an empty tensor"


def test_options_follow_layers_names_and_sources(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    content = recipe(tmp_path, parameters={"shift": [0.0, 0.5], "density": [{"filter": "norm", "value": 0.5}]})
    content["models"].reverse()
    content["models"][0]["parameters"]["density"] = 0.25
    result = merge(content, tmp_path / "out", threads=1)
    seen = dict(zip((name for name in sorted(SHAPES) if name != "unused"), SEEN, strict=True))
    assert {name: each["shift"] for name, each in seen.items()} == {
        name: 0.5 if "layers.1" in name else 0.0 for name in seen
    }
    assert all(each["density"] == (0.5 if "norm" in name else 1.0, 0.25) for name, each in seen.items())
    measured = result.report["layers"]["layers.1.attn.weight"]
    sizes = {f"{tmp_path}/{name}": float(models[name]["layers.1.attn.weight"].norm()) for name in NAMES}
    assert measured["norm"] == pytest.approx(sizes)
    assert measured["shift"] == 0.5
    assert read_json(tmp_path / "out" / "merge_report.json")["layers"] == result.report["layers"]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("shard", [10**9, 200])
def test_neither_threads_nor_shards_show(
    models: dict[str, dict[str, Tensor]], threads: int, shard: int, tmp_path: Path
) -> None:
    merge(recipe(tmp_path), tmp_path / "first", threads=2)
    merge(recipe(tmp_path, output={"max_shard_size": shard}), tmp_path / "out", threads=threads)
    first, second = read_tensors(tmp_path / "first"), read_tensors(tmp_path / "out")
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)
    reports = [(tmp_path / name / "merge_report.json").read_bytes() for name in ("first", "out")]
    assert reports[0] == reports[1]


def describe(root: Path, **facts: Any) -> dict[str, dict[str, Tensor]]:
    """Sidecars whose prior is 0.25."""
    found = {name: random_precisions(seed, SHAPES, above=0.5) for seed, name in enumerate(NAMES, start=5)}
    for name, tensors in found.items():
        write_precisions(root / name, tensors, base=root / "base", prior_precision=0.25, num_examples=10, **facts)
    return found


@pytest.mark.parametrize("prior", [0.25, 0.5])
@pytest.mark.parametrize("scale", ["sum", "mean"])
def test_precisions_are_at_hand_whole_and_written_back(
    models: dict[str, dict[str, Tensor]], prior: float, scale: str, tmp_path: Path
) -> None:
    known = describe(tmp_path)
    result = merge(recipe(tmp_path, "certain", precision={"prior": prior}, scale=scale), tmp_path / "out", threads=1)
    check(tmp_path / "out", models)
    units = 10.0 if scale == "mean" else 1.0
    merged = read_precisions(tmp_path / "out")
    for name in SHAPES:
        own = [(known[source][name].double() - 0.25) / units + prior for source in NAMES]
        total = prior + sum(w * (each - prior) for w, each in zip(WEIGHTS, own, strict=True))
        torch.testing.assert_close(merged[name].double(), total * (20.0 if scale == "mean" else 1.0), rtol=1e-5, atol=0)
        if SHAPES[name].count(0) == 0:
            mean = wanted(models, name)
            gaps = result.report["layers"].get(name, {})
            assert not gaps
            for source, each in zip(NAMES, own, strict=True):
                gap = 0.5 * float(((mean - models[source][name].double()) ** 2 * (each - prior)).sum())
                seen = result.report["mismatch"][f"{tmp_path}/{source}"]["by_layer"][name]
                assert seen == pytest.approx(gap * (10.0 if scale == "mean" else 1.0), rel=1e-4)


def test_a_precision_that_is_lost_is_refused(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    describe(tmp_path)
    with pytest.raises(NonPositivePrecisionError, match=rf"merged precisions are zero or negative.*{tmp_path}/one: -9"):
        merge(recipe(tmp_path, "certain", (-9.0, 0.5)), tmp_path / "out")


def refusing(error: Exception) -> Any:
    def kernel(base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None) -> Merge:
        """Refuse."""
        raise error

    return kernel


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.linalg.LinAlgError("did not converge"), r"scale: a decomposition in refusing failed \(did not conv"),  # type: ignore[attr-defined]
        (MethodError("not like this"), "scale: not like this"),
        (NumericalError("too much"), "scale: too much"),
    ],
)
def test_what_a_kernel_refuses_names_the_tensor(
    models: dict[str, dict[str, Tensor]], error: Exception, message: str, tmp_path: Path
) -> None:
    known: dict[str, Any] = {"base": "required", "paper": "arXiv 0000.00000", "scope": "tensor"}
    merge_method("refusing", precision="unused", prior="unused", **known)(refusing(error))
    for name in ("base", *NAMES):
        write_checkpoint(tmp_path / name, {"scale": models[name]["scale"]})
        for index in (tmp_path / name).glob("*.index.json"):
            index.unlink()
        for part in (tmp_path / name).glob("model-*"):
            part.unlink()
    expected = NumericalError if not isinstance(error, MethodError) else MethodError
    with pytest.raises(expected, match=message):
        merge(recipe(tmp_path, "refusing"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_not_finite_never_reaches_a_kernel(
    models: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    models["two"]["layers.0.attn.weight"][1, 2] = float("nan")
    write_checkpoint(tmp_path / "two", models["two"], shards=2)
    with pytest.raises(NonFiniteError, match=rf"layers.0.attn.weight: 1 of 21 values in {tmp_path}/two"):
        merge(recipe(tmp_path), tmp_path / "out")


def test_a_merge_that_does_not_fit_its_dtype_is_refused(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    content = recipe(tmp_path, parameters={"shift": 1e6}, out_dtype="float16")
    with pytest.raises(NonFiniteError, match=r"embed.weight: every input is finite but the merged values are not"):
        merge(content, tmp_path / "out")


def test_methods_for_factors_take_tensors_without_any_in_blocks(
    models: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    """An embedding with a diagonal precision need not fit into memory, and is merged as by the rule itself."""
    describe(tmp_path)
    merge(recipe(tmp_path, "posterior"), tmp_path / "wanted", threads=1)
    for method in ("kronecker", "gram", "mixture"):
        plan = plan_merge(load_recipe(recipe(tmp_path, method)), tmp_path / method)  # type: ignore[arg-type]
        assert not any(isinstance(step, TensorStep) for step in plan.steps)
        run_merge(plan, threads=2, max_memory=1, compile=False)
        for read in (read_tensors, read_precisions):
            seen, wanted = read(tmp_path / method), read(tmp_path / "wanted")
            assert all(torch.equal(seen[name], wanted[name]) for name in wanted)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_a_plan_says_what_is_seen_whole_and_with_which_parameters(
    models: dict[str, dict[str, Tensor]], tmp_path: Path
) -> None:
    plan = plan_merge(load_recipe(recipe(tmp_path, parameters={"shift": 0.5, "density": 0.25})))
    assert all(isinstance(step, TensorStep | CopyStep) for step in plan.steps)
    text = plan_text(plan)
    row = r"^whole  layers\.0\.attn\.weight +3 x 7 +F32 +weights 0\.5, 0\.75; shift 0\.5; density 0\.25, 0\.25$"
    assert re.search(row, text, re.MULTILINE)


def test_the_largest_tensor_has_to_fit(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    plan = plan_merge(load_recipe(recipe(tmp_path)), tmp_path / "out")
    size, name = largest_whole(plan)
    assert name == "embed.weight"
    assert size >= 3 * 24 * 4
    with pytest.raises(
        OutputError, match=rf"--max-memory {size - 1:,} bytes .*: centred has to see embed.weight whole, which"
    ):
        run_merge(plan, max_memory=size - 1)
    run_merge(plan, max_memory=size, threads=3)
    check(tmp_path / "out", models)


def test_the_estimate_grows_with_the_largest_tensor(tmp_path: Path) -> None:
    sizes = []
    for side in (16, 2048):
        for seed, name in enumerate(("base", *NAMES)):
            write_checkpoint(tmp_path / name, random_tensors(seed, {"up.weight": (side, side)}))
        plan = plan_merge(load_recipe(recipe(tmp_path)))
        sizes.append(peak_memory(plan, workers=1, block_bytes=1) - peak_memory(plan, workers=0, block_bytes=0))
    assert sizes[1] == sizes[0] * 128**2


def test_memory_is_shared_and_given_back() -> None:
    """Never more than the limit at a time, save for one that is larger than it and then alone."""
    allowance, lock = Allowance(10), threading.Lock()
    now, peaks, done = [0, 0], [], []

    def take(need: int) -> None:
        with allowance.taken(need):
            with lock:
                now[0] += need
                now[1] += 1
                peaks.append(tuple(now))
            time.sleep(0.002)
            with lock:
                now[0] -= need
                now[1] -= 1
                done.append(need)

    threads = [threading.Thread(target=take, args=(need,)) for need in (4, 4, 4, 11, 10, 1, 3, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert sorted(done) == [1, 3, 4, 4, 4, 6, 10, 11]
    assert all(used <= 10 or count == 1 for used, count in peaks)


# --- adapters ---------------------------------------------------------------------------------------------------------


MODULES = {"layers.0.up": (7, 5), "layers.1.up": (7, 5)}


def adapters(root: Path, *, second: Sequence[str] = tuple(MODULES)) -> dict[str, dict[str, Tensor]]:
    """Two adapters of ranks 2 and 1; their dW by module."""
    write_checkpoint(root / "base", random_tensors(0, {f"{name}.weight": shape for name, shape in MODULES.items()}))
    found = {}
    for seed, (name, rank, modules) in enumerate(zip(NAMES, (2, 1), (tuple(MODULES), second), strict=True), start=1):
        drawn = {m: random_tensors(10 * seed + i, {"a": (rank, 5), "b": (7, rank)}) for i, m in enumerate(modules)}
        write_adapter(root / name, {m: (d["a"], d["b"]) for m, d in drawn.items()}, alpha=float(rank))
        found[name] = {m: lora_update(d["a"], d["b"], 1.0) for m, d in drawn.items()}
    return found


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mergekit_bayes.merge.lora.ROWS_ELEMENTS", 5)


@pytest.mark.parametrize("space", ["product", "full"])
@pytest.mark.usefixtures("rows")
def test_updates_of_adapters_are_seen_whole(space: str, tmp_path: Path) -> None:
    """The layer that one adapter leaves alone has a zero task vector there, as in a merge of full models."""
    known = adapters(tmp_path, second=("layers.0.up",))
    content = recipe(tmp_path, space=space, dtype="float64", parameters={"density": 0.5}, output={"rank": 5})
    result = merge(content, tmp_path / "out", threads=1)
    out = read_tensors(tmp_path / "out", "model" if space == "full" else "adapter_model")
    base = read_tensors(tmp_path / "base")
    for module, shape in MODULES.items():
        updates = [known[name].get(module, torch.zeros(shape, dtype=torch.float64)) for name in NAMES]
        total = sum((0.5 * w * (u - u.mean()) for w, u in zip(WEIGHTS, updates, strict=True)), torch.zeros(()).double())
        if space == "full":
            seen = out[f"{module}.weight"] - base[f"{module}.weight"].double()
            measured = result.report["layers"][f"{module}.weight"]
        else:
            factor = "base_model.model.{}.lora_{}.weight"
            seen = out[factor.format(module, "B")] @ out[factor.format(module, "A")]
            measured = result.report["layers"][module]
            assert measured["lost_energy"] < 1e-12
        torch.testing.assert_close(seen, total, rtol=1e-10, atol=1e-10)
        assert set(measured["norm"]) == {f"{tmp_path}/{name}" for name in NAMES}


@pytest.mark.usefixtures("rows")
def test_precisions_of_factors_reach_a_kernel_as_those_of_the_update(tmp_path: Path) -> None:
    adapters(tmp_path)
    for name in NAMES:
        shapes = {key: tensor.shape for key, tensor in read_tensors(tmp_path / name, "adapter_model").items()}
        write_precisions(tmp_path / name, random_precisions(3, shapes, above=1.0))
    content = recipe(tmp_path, "certain", space="product", precision={"prior": 0.1}, output={"rank": 5})
    result = merge(content, tmp_path / "out", threads=1)
    assert set(result.report["mismatch"]) == {f"{tmp_path}/{name}" for name in NAMES}
    assert read_precisions(tmp_path / "out").keys() == read_tensors(tmp_path / "out", "adapter_model").keys()


def test_factor_space_is_no_place_for_methods_that_see_whole_updates(tmp_path: Path) -> None:
    adapters(tmp_path)
    with pytest.raises(Exception, match=r"factor merges A with A.*centred has to see all of dW.*product or full"):
        merge(recipe(tmp_path, space="factor"), tmp_path / "out")


def test_the_summary_is_for_people(models: dict[str, dict[str, Tensor]], tmp_path: Path) -> None:
    result: MergeResult = merge(recipe(tmp_path), tmp_path / "out")
    assert "7 tensors merged" in result.summary() or "8 tensors merged" in result.summary()
