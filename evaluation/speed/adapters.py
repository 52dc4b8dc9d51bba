r"""Merging LoRA adapters, beside PEFT's `add_weighted_adapter`: time, and how far from the sum of updates.

    OMP_NUM_THREADS=1 python -m evaluation.speed.adapters

Writes adapters.json and adapters.md beside this file. Three adapters of one Llama with random weights are merged with
weights of one, and the merged adapter is written to disk, by every variant in turn in one process; medians are
reported, and ratios are medians of ratios of neighbours. PEFT merges inside a model in memory: its model with the three
adapters is loaded before, and the seconds of that are reported apart. The error of a merged adapter is

    sqrt( sum_l |dW_l - sum_t dW_{t,l}|^2 / sum_l |sum_t dW_{t,l}|^2 )

over the layers l, from the files in float64. It is zero for the exact merge, whose rank is the sum of ranks.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from evaluation.speed.alternate import Runs, alternate, described, machine, ratio
from evaluation.speed.lora_step import SIZES, VOCABULARY
from mergekit_bayes import merge

HERE = Path(__file__).parent
ADAPTERS = 3
PAIRS = {"exact": ("ours, exact", "PEFT, cat"), "truncated": ("ours, rank of one", "PEFT, svd")}
"""What makes the same adapter, ours and theirs."""


def made(folder: Path, size: str, rank: int) -> tuple[Path, list[Path]]:
    """A base with random weights and adapters of it on disk."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY[size], tie_word_embeddings=True, **SIZES[size])
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "base")
    found = []
    for index in range(ADAPTERS):
        base = transformers.LlamaForCausalLM.from_pretrained(folder / "base")
        lora = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", init_lora_weights=False)
        found.append(folder / f"adapter{index}")
        peft.get_peft_model(base, lora).save_pretrained(found[-1])
    return folder / "base", found


def ours(base: Path, adapters: list[Path], out: Path, rank: int | None) -> Callable[[], None]:
    """Task arithmetic of this library, from files to a published folder."""
    recipe: dict[str, Any] = {
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "models": [{"model": str(adapter), "parameters": {"weight": 1.0}} for adapter in adapters],
        "output": {"precision": False, **({} if rank is None else {"rank": rank})},
    }

    def step() -> None:
        merge(recipe, out, overwrite=True)

    return step


def theirs(model: Any, names: list[str], out: Path, options: Mapping[str, Any]) -> Callable[[], None]:
    """PEFT's merge inside a loaded model, saved."""

    def step() -> None:
        shutil.rmtree(out, ignore_errors=True)
        model.add_weighted_adapter(names, [1.0] * len(names), "merged", **options)
        model.save_pretrained(out, selected_adapters=["merged"])
        model.delete_adapter("merged")

    return step


def loaded(base: Path, adapters: list[Path]) -> tuple[Any, list[str], float]:
    """PEFT's model with all adapters, their names in it, and the seconds it took."""
    import peft
    import transformers

    began = time.perf_counter()
    model = transformers.LlamaForCausalLM.from_pretrained(base)
    names = [adapter.name for adapter in adapters]
    found = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name=names[0])
    for adapter, name in zip(adapters[1:], names[1:], strict=True):
        found.load_adapter(adapter, adapter_name=name)
    return found, names, time.perf_counter() - began


def updates(folder: Path) -> dict[str, Tensor]:
    """S B A of every layer, in float64."""
    (weights,) = folder.rglob("adapter_model.safetensors")
    config = json.loads((weights.parent / "adapter_config.json").read_text())
    tensors = load_file(weights)
    ends = ("lora_A.weight", "lora_B.weight")
    found = {}
    for name in (key.removesuffix(ends[0]) for key in tensors if key.endswith(ends[0])):
        a, b = (tensors[name + end].double() for end in ends)
        module = name.removeprefix("base_model.model.").removesuffix(".")
        rank = config.get("rank_pattern", {}).get(module, config["r"])
        alpha = config.get("alpha_pattern", {}).get(module, config["lora_alpha"])
        found[module] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank) * b @ a
    return found


def error(folder: Path, adapters: list[Path]) -> float:
    """How far a merged adapter is from the sum of updates, relative."""
    parts = [updates(adapter) for adapter in adapters]
    wanted = {name: torch.stack([part[name] for part in parts]).sum(0) for name in parts[0]}
    found = updates(folder)
    if found.keys() != wanted.keys():
        raise SystemExit(f"{folder}: has other layers than the adapters")
    missed = sum(float((found[name] - wanted[name]).square().sum()) for name in wanted)
    return math.sqrt(missed / sum(float(each.square().sum()) for each in wanted.values()))


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Times and errors of all variants."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base, adapters = made(folder, given.size, given.rank)
        model, names, seconds = loaded(base, adapters)
        out = {name: folder / name.replace(" ", "-") for name in (*sum(PAIRS.values(), ()), "PEFT, linear")}
        steps = {
            "ours, exact": ours(base, adapters, out["ours, exact"], None),
            "PEFT, cat": theirs(model, names, out["PEFT, cat"], {"combination_type": "cat"}),
            "ours, rank of one": ours(base, adapters, out["ours, rank of one"], given.rank),
            "PEFT, svd": theirs(model, names, out["PEFT, svd"], {"combination_type": "svd", "svd_rank": given.rank}),
            "PEFT, linear": theirs(model, names, out["PEFT, linear"], {"combination_type": "linear"}),
        }
        runs = alternate(steps, repeats=given.repeats, warmup=1, device="cpu")
        return {
            "runs": {name: vars(each) for name, each in runs.items()},
            "errors": {name: error(out[name], adapters) for name in steps},
            "seconds to load PEFT's model": seconds,
            "parameters": sum(parameter.numel() for parameter in model.get_base_model().parameters()),
        }


def summary(results: Mapping[str, Any]) -> dict[str, Any]:
    """Median seconds by the clock and of the processor, and PEFT's time over ours where the result is the same."""
    runs = {name: Runs(**values) for name, values in results["runs"].items()}
    return {
        "wall": {name: statistics.median(each.wall) for name, each in runs.items()},
        "cpu": {name: statistics.median(each.cpu) for name, each in runs.items()},
        "ratio": {pair: ratio(runs[theirs].wall, runs[ours].wall) for pair, (ours, theirs) in PAIRS.items()},
    }


def page(results: Mapping[str, Any]) -> str:
    """The results for people."""
    found, setting = summary(results), results["setting"]
    lines = [
        "# Merging adapters",
        "",
        described(results["machine"], results["load at end"]),
        f"{ADAPTERS} adapters of rank {setting['rank']} on all linear layers of a Llama of"
        f" {results['parameters'] / 1e6:.1f} million weights, random; PEFT {results['peft']}, whose model with the"
        f" adapters was loaded before, in {results[LOAD]:.1f} s.",
        "",
        "| | seconds | processor seconds | error |",
        "| --- | --- | --- | --- |",
    ]
    for name, seconds in found["wall"].items():
        lines.append(f"| {name} | {seconds:.2f} | {found['cpu'][name]:.2f} | {results['errors'][name]:.1e} |")
    exact, truncated = found["ratio"]["exact"], found["ratio"]["truncated"]
    lines += [
        "",
        f"PEFT's `cat` takes {exact:.2f} times as long as the exact merge here, which reads and checks the base's"
        f" headers and publishes a folder. Its `svd` finds the best adapter of rank {setting['rank']} in"
        f" {truncated:.1f} times the time that the same truncation takes here, from the factors alone. `linear`"
        " averages factors, which is another adapter.",
        "",
        f"`{results['command']}`, {results['date']}",
        "",
    ]
    return "\n".join(lines)


LOAD = "seconds to load PEFT's model"


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write results and page."""
    from importlib.metadata import version

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for adapters.json and adapters.md")
    given = parser.parse_args(arguments)
    where = machine("cpu")
    setting = {name: getattr(given, name) for name in ("size", "rank", "repeats")}
    command = " ".join(f"--{name} {value}" for name, value in setting.items())
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": f"python -m evaluation.speed.adapters {command}",
        "machine": where,
        "setting": setting,
        "peft": version("peft"),
        **measure(given),
        "load at end": os.getloadavg()[0],
    }
    results["summary"] = summary(results)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "adapters.json").write_text(json.dumps(results, indent=2) + "\n")
    (given.out / "adapters.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
