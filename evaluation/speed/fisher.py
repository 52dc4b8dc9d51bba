"""What a pass of an estimator costs beside a plain forward and backward pass over the same tokens.

    OMP_NUM_THREADS=1 python -m evaluation.speed.fisher

Writes fisher.json and fisher.md beside this file. The model is a Llama with random weights, the rows are random tokens
without padding. All passes alternate in one process; medians are reported, and a ratio is the median of the ratios of
neighbours. Memory is measured in a process for each pass, in two ways: what torch has allocated at the peak, beside the
weights of the model, and by how much the resident memory of the process has grown.

On a GPU: --device cuda --size 0.5b --dtype bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from evaluation.speed.alternate import Runs, Step, allocated, alternate, described, machine, ratio
from evaluation.speed.lora_step import SIZES, VOCABULARY
from mergekit_bayes.precision.registry import create, get_estimator
from mergekit_bayes.precision.targets import find_targets

HERE = Path(__file__).parent
AIM = 3.0
PLAIN = "forward and backward"
FORWARD = "forward"
BY_ROW = "backward row by row"
ESTIMATORS = ("fisher", "empirical_fisher", "ggn", "kfac", "gram")
NAMES = (PLAIN, FORWARD, BY_ROW, *ESTIMATORS)


def model_of(size: str, device: str, dtype: torch.dtype) -> nn.Module:
    """A model with random weights, the same every time."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY[size], tie_word_embeddings=True, **SIZES[size])
    return transformers.LlamaForCausalLM(config).to(device, dtype).eval()  # type: ignore[no-any-return]


def work(name: str, model: nn.Module, ids: torch.Tensor, *, chunk: int) -> Callable[[], Step]:
    """What makes one pass: calling it sets up whatever is kept from pass to pass, and returns the pass."""

    def loss(rows: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=rows, use_cache=False).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), rows[:, 1:].flatten(), reduction="sum")

    def plain() -> None:
        for rows in ids.split(chunk):
            loss(rows).backward()  # gradients are added up, as in a training step over several chunks
        model.zero_grad()

    def forward() -> None:
        with torch.no_grad():
            for rows in ids.split(chunk):
                loss(rows)

    def by_row() -> Step:
        squares = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in model.parameters()]

        def step() -> None:
            for row in ids.split(1):
                loss(row).backward()
                for total, parameter in zip(squares, model.parameters(), strict=True):
                    assert parameter.grad is not None
                    total.addcmul_(parameter.grad, parameter.grad)
                model.zero_grad()

        return step

    def estimate() -> Step:
        targets = find_targets(model, space="full", factors=get_estimator(name).factors)
        estimator = create(name, model, targets, seed=0, chunk_size=chunk)
        batch = {"input_ids": ids, "labels": ids, "row": torch.arange(len(ids))}
        return lambda: estimator.update(batch)

    simple = {PLAIN: lambda: plain, FORWARD: lambda: forward, BY_ROW: by_row}
    return simple.get(name, estimate)


def peak(name: str, given: argparse.Namespace) -> dict[str, int]:
    """Bytes that a pass takes beside the weights, with what it keeps; to be called once in a process."""
    model, ids = subject(given)
    setup = work(name, model, ids, chunk=given.chunk)
    if given.device == "cuda":
        held = torch.cuda.memory_allocated()
        setup()()
        return {"allocated": torch.cuda.max_memory_allocated() - held, "resident": 0}
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, not while the model was made
    before = _status("VmRSS")
    step = setup()
    step()
    grown = _status("VmHWM") - before
    del step

    def both() -> None:
        setup()()

    return {"allocated": allocated(both)[0], "resident": grown}


def subject(given: argparse.Namespace) -> tuple[nn.Module, torch.Tensor]:
    """The model and the tokens, (rows, tokens)."""
    model = model_of(given.size, given.device, getattr(torch, given.dtype))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCABULARY[given.size], (given.rows, given.tokens), generator=generator)
    return model, ids.to(given.device)


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of all passes."""
    model, ids = subject(given)
    steps = {name: work(name, model, ids, chunk=given.chunk)() for name in given.names}
    runs = alternate(steps, repeats=given.repeats, warmup=1, device=given.device)
    memory = {name: _peak_elsewhere(name, given) for name in given.names}
    size = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "bytes": sum(parameter.nbytes for parameter in model.parameters()),
    }
    return {"runs": {name: vars(each) for name, each in runs.items()}, "memory": memory, "size": size}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Medians in seconds, ratios to the plain pass, and memory beside the weights in copies of them in float32."""
    runs = {name: Runs(**values) for name, values in results["runs"].items()}
    copy = 4 * results["size"]["parameters"]
    return {
        "wall": {name: statistics.median(each.wall) for name, each in runs.items()},
        "time": {name: ratio(each.wall, runs[PLAIN].wall) for name, each in runs.items()},
        "processor time": {name: ratio(each.cpu, runs[PLAIN].cpu) for name, each in runs.items()},
        "copies": {name: found["allocated"] / copy for name, found in results["memory"].items()},
    }


def page(results: dict[str, Any]) -> str:
    """The results for people."""
    found, setting = summary(results), results["setting"]
    copy = 4 * results["size"]["parameters"]
    lines = ["# A pass of an estimator", "", described(results["machine"], results["load at end"])]
    lines += [
        f"Llama of {results['size']['parameters'] / 1e6:.1f} million parameters, {setting['dtype']};"
        f" {setting['rows']} rows of {setting['tokens']} tokens, {setting['chunk']} at once; precisions of all"
        " parameters.",
        "",
        "| | seconds | of the plain pass | by processor time | allocated beside the weights | resident beside them |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, seconds in found["wall"].items():
        memory = results["memory"][name]
        times = f"{found['time'][name]:.2f} | {found['processor time'][name]:.2f}"
        sizes = f"{memory['allocated'] / 1e6:.0f} MB | {memory['resident'] / 1e6:.0f} MB"
        lines.append(f"| {name} | {seconds:.2f} | {times} | {sizes} |")
    if "fisher" in found["time"]:
        chunk = results["memory"]["fisher"]["allocated"] - copy
        activations = results["memory"][PLAIN]["allocated"] - results["size"]["bytes"]
        lines += [
            "",
            f"The Fisher diagonal takes {found['time']['fisher']:.2f} times as long as a plain forward and backward"
            " pass over the same tokens",
            f"({found['processor time']['fisher']:.2f} times by processor time); at most {AIM:g} times is the aim."
            f" Beside the weights and one float32 copy of what is",
            f"estimated ({copy / 1e6:.0f} MB) it takes {chunk / 1e6:.0f} MB for a chunk; the plain pass takes"
            f" {activations / 1e6:.0f} MB beside weights and gradients.",
        ]
    return "\n".join([*lines, "", f"`{results['command']}`, {results['date']}", ""])


def _status(entry: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(entry))
    return int(line.split()[1]) * 1024


def _peak_elsewhere(name: str, given: argparse.Namespace) -> dict[str, int]:
    options = [f"--{key}={getattr(given, key)}" for key in ("size", "rows", "tokens", "chunk", "dtype", "device")]
    command = [sys.executable, "-m", "evaluation.speed.fisher", f"--memory-of={name}", *options]
    root = HERE.parent.parent
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--chunk", type=int, default=4, help="rows at once")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--names", nargs="+", choices=NAMES, default=list(NAMES), help="what is measured")
    parser.add_argument("--memory-of", choices=NAMES, help="print the memory of one of them and write nothing")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for fisher.json and fisher.md")
    given = parser.parse_args(arguments)
    if given.memory_of:
        print(json.dumps(peak(given.memory_of, given)))
        return
    where = machine(given.device)
    setting = {name: getattr(given, name) for name in ("size", "rows", "tokens", "chunk", "dtype", "repeats", "device")}
    command = " ".join(f"--{name} {value}" for name, value in setting.items())
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": f"python -m evaluation.speed.fisher {command}",
        "machine": where,
        "setting": setting,
        **measure(given),
        "load at end": os.getloadavg()[0],
    }
    results["summary"] = summary(results)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "fisher.json").write_text(json.dumps(results, indent=2) + "\n")
    (given.out / "fisher.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
