"""What a preview's evaluations and predictions cost.

    OMP_NUM_THREADS=1 python -m evaluation.speed.preview

Writes preview.json and preview.md beside this file. Evaluations: 64 mixes of three LoRA adapters of a Llama with random
weights, in groups of four that alternate between three ways to score them on the same rows: all four in shared forward
passes, as a preview does; a plain PEFT model with one adapter, four times; and merged into the weights, then a forward
pass, four times. Times are CPU time of the process, and ratios the medians of the ratios of neighbours, so that other
work on the machine counts little. Predictions: what the posteriors of the example's three adapters say of 10,011 mixes.
Processes: groups of four mixes, in turn by one process and by two at once, by the clock, so that this part says
something on free cores only.

On a GPU: --device cuda --size 0.5b --dtype bfloat16 --length 512. Times are by the clock then, memory is what the
device had allocated at its peak, and only evaluations are measured. What merges into the weights there is no preview of
this library but the least that any program has to do: the sum of the factors' products, on the device, added to a copy
of the weights. All ways put as many rows through a forward pass, but for a fourth one, which has all rows of four mixes
in one.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from evaluation.speed.alternate import allocated, alternate, described, machine, ratio
from evaluation.speed.lora_step import SIZES, VOCABULARY
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.preview.design import Mix, lattice, random_mixes
from mergekit_bayes.preview.evaluators import Evaluations, Ground
from mergekit_bayes.preview.plans import MethodPlan, curvature_plan, plan_methods
from mergekit_bayes.preview.predict import predict
from mergekit_bayes.preview.tasks import TaskData, score
from mergekit_bayes.recipe import load_recipe
from mergekit_bayes.recipe.preview import PreviewRecipe

HERE = Path(__file__).parent
EXAMPLE = HERE.parent.parent / "examples" / "stdlib_lm" / "artefacts"
TOGETHER, ADAPTERS = 4, 3
LARGER = "together, four times the rows in a forward pass"
AIM_RATIO, AIM_SECONDS, AIM_SPEED_UP = 1.05, 10.0, 1.7


def rows(size: str, *, count: int, length: int) -> TaskData:
    """Random tokens as a task, in batches of `count` rows for one mix."""
    ids = torch.randint(0, VOCABULARY[size], (count, length), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    units = count * (length - 1)
    return TaskData(
        name="random",
        metric="loss",
        batches=(batch,),
        task="causal_lm",
        labels=None,
        units=units,
        key="random",
        packed=False,
        largest_token=VOCABULARY[size] - 1,
        longest=length,
    )


def in_batches(task: TaskData, size: int) -> TaskData:
    """The same rows in smaller batches."""
    (whole,) = task.batches
    parts = zip(*(tensor.split(size) for tensor in whole.values()), strict=True)
    batches = tuple(dict(zip(whole, part, strict=True)) for part in parts)
    return dataclasses.replace(task, batches=batches)


def made(folder: Path, size: str) -> tuple[Any, list[Path]]:
    """A base with random weights and three adapters of it, saved; and the base in memory."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY[size], tie_word_embeddings=True, **SIZES[size])
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    adapters = []
    for index in range(ADAPTERS):
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
        adapters.append(folder / f"adapter{index}")
        peft.get_peft_model(base, lora).save_pretrained(adapters[-1])
    return transformers.LlamaForCausalLM.from_pretrained(folder / "base").eval().requires_grad_(False), adapters


def recipe_of(base: Path, adapters: list[Path], **changes: Any) -> PreviewRecipe:
    """A preview of these adapters."""
    content = {
        "kind": "preview",
        "base_model": str(base),
        "models": [{"model": str(adapter)} for adapter in adapters],
        "tasks": [{"name": f"task {index}"} for index in range(len(adapters))],
        "fidelity": "surrogate",
        **changes,
    }
    return load_recipe(content, expect=PreviewRecipe, methods=method_schemas())


def evaluations(size: str, *, groups: int, length: int, device: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds per group of mixes of every way, alternating: of the processor, or by the clock with a GPU."""
    import peft

    def copy() -> Any:
        model = type(base).from_pretrained(Path(temporary) / "base").to(device, dtype)
        return model.eval().requires_grad_(False)

    with tempfile.TemporaryDirectory() as temporary:
        base, adapters = made(Path(temporary), size)
        base = base.to(device, dtype)
        methods = [
            {"merge_method": "task_arithmetic"},
            {"merge_method": "task_arithmetic", "name": "d", "space": "full"},
        ]
        stacked, dense = plan_methods(recipe_of(Path(temporary) / "base", adapters, methods=methods))
        task = rows(size, count=TOGETHER * TOGETHER, length=length)
        plain = peft.PeftModel.from_pretrained(copy(), adapters[0], autocast_adapter_dtype=False).eval()
        mixes = iter(random_mixes(ADAPTERS, TOGETHER * (groups + 2) * 4, seed=0))
        merged = (
            _evaluator(copy(), dense, task, mixes, together=1)
            if device == "cpu"
            else _merger(copy(), adapters, task, mixes, dtype)
        )
        ways = {
            "together": _evaluator(base, stacked, in_batches(task, TOGETHER), mixes, together=TOGETHER),
            "plain adapter": lambda: [score(plain, task) for _ in range(TOGETHER)],
            "merge, then forward": merged,
        }
        if device != "cpu":
            ways[LARGER] = _evaluator(copy(), stacked, task, mixes, together=TOGETHER)
        peak = _peak(ways["together"], device)
        runs = alternate(ways, repeats=groups, warmup=1, device=device)
    seconds = {name: list(each.cpu if device == "cpu" else each.wall) for name, each in runs.items()}
    return {
        "parameters": sum(parameter.numel() for parameter in base.parameters()),
        "mixes": groups * TOGETHER,
        "tokens_per_mix": task.units,
        "cpu_seconds" if device == "cpu" else "seconds": {name: sum(values) for name, values in seconds.items()},
        "of_plain": {name: ratio(values, seconds["plain adapter"]) for name, values in seconds.items()},
        "peak_bytes_together": peak,
    }


def _peak(step: Callable[[], object], device: str) -> int:
    """Bytes that a step has allocated at its peak, beyond what was there before."""
    if device == "cpu":
        return allocated(step)[0]
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    return torch.cuda.max_memory_allocated() - before


def _merger(
    model: Any, adapters: Sequence[Path], task: TaskData, mixes: Iterator[Mix], dtype: torch.dtype
) -> Callable[[], object]:
    """Scores the next group of mixes, each merged into the weights on their device; the base's are kept beside them."""
    from safetensors.torch import load_file

    found = [load_file(folder / "adapter_model.safetensors", device=str(model.device)) for folder in adapters]
    names = [name.removesuffix(".lora_A.weight") for name in found[0] if name.endswith(".lora_A.weight")]
    weights = [model.get_submodule(name.removeprefix("base_model.model.")).weight for name in names]
    kept = [weight.clone() for weight in weights]
    a = [torch.cat([each[f"{name}.lora_A.weight"] for each in found]).to(dtype) for name in names]
    b = [torch.cat([each[f"{name}.lora_B.weight"] for each in found], dim=1).to(dtype) for name in names]
    rank, scaling = len(a[0]) // ADAPTERS, 2.0  # lora_alpha over r, as `made` chose them

    def one() -> object:
        by_row = scaling * torch.tensor(next(mixes), dtype=dtype, device=model.device).repeat_interleave(rank)
        for weight, base, left, right in zip(weights, kept, b, a, strict=True):
            torch.addmm(base, left * by_row, right, out=weight)
        return score(model, task)

    def step() -> object:
        with torch.no_grad():
            return [one() for _ in range(TOGETHER)]

    return step


def _evaluator(model: Any, method: MethodPlan, task: TaskData, mixes: Any, *, together: int) -> Callable[[], object]:
    """Scores the next group of mixes by a method."""
    ground = Ground(model, (task,), model.device, model.dtype)
    evaluator = Evaluations(ground, together, 4 * 10**9)

    def step() -> object:
        group = [next(mixes) for _ in range(TOGETHER)]
        found = [evaluator.evaluate(method, group[at : at + together]) for at in range(0, TOGETHER, together)]
        assert all(each.error is None for part in found for each in part)
        return found

    return step


def processes(size: str, *, groups: int, length: int) -> dict[str, Any]:
    """Evaluations per second of one process and of two, which load the same models, in turn."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as temporary:
        made(Path(temporary), size)
        pipes = [context.Pipe() for _ in range(2)]
        workers = [context.Process(target=_evaluate, args=(end, temporary, size, length)) for _, end in pipes]
        connections = [connection for connection, _ in pipes]
        for worker in workers:
            worker.start()
        try:
            return _in_turn(connections, groups)
        finally:
            for connection, worker in zip(connections, workers, strict=True):
                connection.send(None)
                worker.join()


def _in_turn(connections: Sequence[Connection], groups: int) -> dict[str, Any]:
    mixes = iter(random_mixes(ADAPTERS, 3 * TOGETHER * groups, seed=1))
    first = random_mixes(ADAPTERS, TOGETHER, seed=0)
    losses = _carried_out(connections, [first] * len(connections))  # also loads the models
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(groups):
        for count, found in seconds.items():
            work = [[next(mixes) for _ in range(TOGETHER)] for _ in range(count)]
            began = time.perf_counter()
            _carried_out(connections[:count], work)
            found.append(time.perf_counter() - began)
    return {
        "per_second": {str(count): count * TOGETHER * groups / sum(found) for count, found in seconds.items()},
        "speed_up": 2 * ratio(seconds[1], seconds[2]),
        "same_numbers": losses[0] == losses[1],
    }


def _carried_out(connections: Sequence[Connection], work: Sequence[Sequence[Mix]]) -> list[list[float]]:
    """Losses of a group of mixes from each of some processes, which work at the same time."""
    for connection, group in zip(connections, work, strict=True):
        connection.send(group)
    return [connection.recv() for connection in connections]


def _evaluate(connection: Connection, folder: str, size: str, length: int) -> None:
    """A process that answers groups of mixes with their losses until it gets none."""
    import transformers

    torch.set_num_threads(1)
    paths = [Path(folder) / f"adapter{index}" for index in range(ADAPTERS)]
    (method,) = plan_methods(recipe_of(Path(folder) / "base", paths, methods=["task_arithmetic"]))
    model = transformers.LlamaForCausalLM.from_pretrained(Path(folder) / "base").eval().requires_grad_(False)
    task = in_batches(rows(size, count=TOGETHER * TOGETHER, length=length), TOGETHER)
    evaluator = Evaluations(Ground(model, (task,), torch.device("cpu"), torch.float32), TOGETHER, 4 * 10**9)
    while (group := connection.recv()) is not None:
        connection.send([each.scores[task.name]["loss"] for each in evaluator.evaluate(method, group)])


def predictions(partitions: int) -> dict[str, Any]:
    """Seconds for the posteriors' predictions of a lattice, from opening files to the last increase."""
    recipe = recipe_of(
        EXAMPLE / "base",
        [EXAMPLE / name for name in ("code", "docs", "headers")],
        methods=["posterior", "task_arithmetic"],
        precision={"prior": 0.001},
    )
    mixes = lattice(ADAPTERS, partitions)
    found: dict[str, Any] = {"mixes": len(mixes)}
    for plan in plan_methods(recipe, space="full"):
        began, cpu = time.perf_counter(), time.process_time()
        prediction = predict(curvature_plan(recipe), [(plan, mixes)]).methods[0]
        found[plan.title] = {
            "seconds": time.perf_counter() - began,
            "cpu_seconds": time.process_time() - cpu,
            "largest_error": prediction.error,
        }
    return found


def page(results: dict[str, Any]) -> str:
    """The results as Markdown."""
    runs = results["evaluations"]
    clock = "CPU seconds" if "cpu_seconds" in runs else "seconds"
    lines = [
        f"{runs['mixes']} mixes of {ADAPTERS} adapters of rank 8 on all linear layers of a Llama of "
        f"{runs['parameters'] / 1e6:.1f} M parameters, {runs['tokens_per_mix']} tokens each:",
        "",
        f"| way | {clock} | mixes per {clock.removesuffix('s')} | of a plain adapter model |",
        "| --- | ---: | ---: | ---: |",
    ]
    for name, seconds in runs[clock.lower().replace(" ", "_")].items():
        rate = runs["mixes"] / seconds
        lines.append(f"| {name} | {seconds:.1f} | {rate:.1f} | {runs['of_plain'][name]:.3f} |")
    lines += [
        "",
        f"Peak of what torch allocated for the first group that shares forward passes, adapters included and the base "
        f"not: {runs['peak_bytes_together'] / 2**20:.0f} MiB.",
        "",
    ]
    told, both = results.get("predictions"), results.get("processes")
    if told is not None:
        lines += [
            f"| predicted for {told['mixes']} mixes | seconds | CPU seconds | "
            "largest error, of the increase at the base |",
            "| --- | ---: | ---: | ---: |",
        ]
        for name in ("posterior", "task_arithmetic"):
            each = told[name]
            cells = [f"{each['seconds']:.2f}", f"{each['cpu_seconds']:.2f}", f"{each['largest_error']:.1e}"]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    holds = {True: "yes", False: "NO"}
    together = runs["of_plain"]["together"]
    time = "CPU time" if "cpu_seconds" in runs else "time"
    lines += [
        "| promise | measured | wanted | holds |",
        "| --- | ---: | ---: | ---: |",
        f"| mixes together, {time} over that of a plain adapter model | {together:.3f} | <= {AIM_RATIO} | "
        f"{holds[together <= AIM_RATIO]} |",
    ]
    if told is not None:
        seconds = told["posterior"]["seconds"]
        lines.append(
            f"| {told['mixes']} predictions, seconds | {seconds:.2f} | <= {AIM_SECONDS:g} | "
            f"{holds[seconds <= AIM_SECONDS]} |"
        )
    if both is not None:  # there are none on a machine of one core
        lines += _about_processes(both, holds[both["speed_up"] >= AIM_SPEED_UP])
    lines += ["", f"{described(results['machine'], results['load'])} {results['date']}. `{results['command']}`"]
    return "\n".join(lines) + "\n"


def _about_processes(both: dict[str, Any], holds: str) -> list[str]:
    """The line of the promise, and what is behind it."""
    alone, two = both["per_second"]["1"], both["per_second"]["2"]
    same = "the same numbers" if both["same_numbers"] else "OTHER NUMBERS"
    return [
        f"| two processes, evaluations per second over those of one | {both['speed_up']:.2f} | >= {AIM_SPEED_UP} | "
        f"{holds} |",
        "",
        f"One process evaluates {alone:.2f} mixes per second by the clock, two {two:.2f}, with {same}.",
    ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--groups", type=int, default=16, help="groups of four mixes")
    parser.add_argument("--length", type=int, default=64, help="tokens per row; sixteen rows are scored")
    parser.add_argument("--partitions", type=int, default=140, help="of the lattice that is predicted")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE)
    options = parser.parse_args(arguments)
    given = "".join(
        f" --{name} {value}"
        for name, value in vars(options).items()
        if name != "out" and value != parser.get_default(name)
    )
    where = {"device": options.device, "dtype": getattr(torch, options.dtype)}
    results: dict[str, Any] = {
        "machine": machine(options.device),
        "date": date.today().isoformat(),
        "command": f"OMP_NUM_THREADS=1 python -m evaluation.speed.preview{given}",
        "evaluations": evaluations(options.size, groups=options.groups, length=options.length, **where),
    }
    if options.device == "cpu":
        results["predictions"] = predictions(options.partitions)
        if (os.cpu_count() or 1) > 1:
            results["processes"] = processes(options.size, groups=options.groups, length=options.length)
    results["load"] = os.getloadavg()[0]
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "preview.json").write_text(json.dumps(results, indent=1) + "\n")
    (options.out / "preview.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
