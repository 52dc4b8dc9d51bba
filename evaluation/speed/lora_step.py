"""What a training step of an adapter costs with IVON, beside the same step with AdamW.

    OMP_NUM_THREADS=1 python -m evaluation.speed.lora_step

Writes lora_step.json and lora_step.md beside this file, lora_step_nf4 with --load-in-4bit. The model is a Llama with
random weights and LoRA factors on all its linear layers; a step is forward and backward pass over one batch, clipping,
the optimizer and zeroing. The two steps alternate in one process, each with a model of its own; medians are reported,
and the ratio is the median of the ratios of neighbours. Memory is the peak of what torch allocated: weights, state, and
the most that a step borrows.

On a GPU: --device cuda --size 0.5b --dtype bfloat16, with or without --load-in-4bit.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evaluation.speed.alternate import Runs, Step, allocated, alternate, described, machine, ratio
from mergekit_bayes import IVON
from mergekit_bayes.finetune import starting_values

HERE = Path(__file__).parent
AIM_TIME = {"cpu": 1.05, "cuda": 1.02}
AIM_MEMORY = 1.10

SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "25m": {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8},
    "0.5b": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 28, "num_attention_heads": 16},
}
VOCABULARY = {"tiny": 128, "25m": 8192, "0.5b": 32000}


def adapted(size: str, device: str, dtype: torch.dtype, *, four_bit: bool) -> nn.Module:
    """A model with random weights and an adapter of rank 8, the same every time."""
    import peft
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=VOCABULARY[size], tie_word_embeddings=True, **SIZES[size])
    model = transformers.LlamaForCausalLM(config).to(dtype)
    if four_bit:
        quantized = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
        )
        with tempfile.TemporaryDirectory() as folder:  # quantizing happens while loading
            model.save_pretrained(folder)
            model = transformers.LlamaForCausalLM.from_pretrained(
                folder, quantization_config=quantized, device_map={"": device}
            )
    lora = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    return peft.get_peft_model(model, lora).to(device).train()  # type: ignore[no-any-return]


def trained(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of the adapter."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def training_step(model: nn.Module, optimizer: Any, ids: torch.Tensor) -> Step:
    """One step, written as in any training loop."""

    def backward() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    def step() -> None:
        if isinstance(optimizer, IVON):
            with optimizer.sampled_params(train=True):
                backward()
        else:
            backward()
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ivon(parameters: list[nn.Parameter]) -> IVON:
    """With the starting values of a run of a thousand steps."""
    start = starting_values(parameters, units_seen=8000, steps=1000)
    return IVON(parameters, lr=0.1, ess=start.ess, hess_init=start.hess_init, beta2=start.beta2, weight_decay=0.0)


def adamw(parameters: list[nn.Parameter]) -> torch.optim.AdamW:
    """The fused one of torch."""
    return torch.optim.AdamW(parameters, lr=2e-4, fused=True)


def peak(model: nn.Module, step: Step, device: str) -> int:
    """Bytes in use at the peak of a step: weights, state, and what is borrowed."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        own = sum(parameter.untyped_storage().nbytes() for parameter in model.parameters())
        return own + torch.cuda.max_memory_allocated() - before
    return sum(parameter.untyped_storage().nbytes() for parameter in model.parameters()) + allocated(step)[0]


def measure(given: argparse.Namespace) -> dict[str, Any]:
    """Times and memory of both."""
    steps: dict[str, Step] = {}
    memory: dict[str, int] = {}
    size = {}
    for name, make in {"AdamW": adamw, "IVON": ivon}.items():
        model = adapted(given.size, given.device, getattr(torch, given.dtype), four_bit=given.load_in_4bit)
        ids = torch.randint(0, VOCABULARY[given.size], (given.batch, given.tokens), device=given.device)
        steps[name] = training_step(model, make(trained(model)), ids)
        # the first step makes the state as well: what it allocates holds all there is
        memory[name] = peak(model, steps[name], given.device)
        size = {
            "parameters": sum(parameter.numel() for parameter in model.parameters()),
            "trained": sum(parameter.numel() for parameter in trained(model)),
            "trained tensors": len(trained(model)),
        }
    runs = alternate(steps, repeats=given.repeats, warmup=1, device=given.device)
    return {"runs": {name: vars(each) for name, each in runs.items()}, "memory": memory, "size": size}


def summary(results: dict[str, Any]) -> dict[str, Any]:
    """Medians in seconds, and ratios."""
    runs = {name: Runs(**values) for name, values in results["runs"].items()}
    return {
        "wall": {name: statistics.median(each.wall) for name, each in runs.items()},
        "cpu": {name: statistics.median(each.cpu) for name, each in runs.items()},
        "time": ratio(runs["IVON"].wall, runs["AdamW"].wall),
        "processor time": ratio(runs["IVON"].cpu, runs["AdamW"].cpu),
        "memory": results["memory"]["IVON"] / results["memory"]["AdamW"],
    }


def page(results: dict[str, Any]) -> str:
    """The results for people."""
    found, size, setting = summary(results), results["size"], results["setting"]
    lines = ["# A training step of an adapter", "", described(results["machine"], results["load at end"])]
    quantized = ", weights in NF4" if setting["load_in_4bit"] else ""
    lines += [
        f"Llama of {size['parameters'] / 1e6:.1f} million parameters, {setting['dtype']}{quantized}; adapter of"
        f" {size['trained'] / 1e6:.2f} million in {size['trained tensors']} tensors;"
        f" batches of {setting['batch']} x {setting['tokens']} tokens.",
        "",
        "| | seconds per step | processor time | peak memory |",
        "| --- | --- | --- | --- |",
    ]
    for name, value in found["wall"].items():
        megabytes = results["memory"][name] / 1e6
        lines.append(f"| {name} | {value:.4f} | {found['cpu'][name]:.4f} | {megabytes:.1f} MB |")
    lines += [
        "",
        f"A step with IVON takes {found['time']:.3f} times as long as one with AdamW"
        f" ({found['processor time']:.3f} times by processor time);",
        f"at most {AIM_TIME[setting['device']]:g} times is the aim. It takes {found['memory']:.3f} times the memory;"
        f" at most {AIM_MEMORY:g} times is the aim.",
    ]
    return "\n".join([*lines, "", f"`{results['command']}`, {results['date']}", ""])


def main(arguments: list[str] | None = None) -> None:
    """Measure, and write results and page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="25m")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--load-in-4bit", action="store_true")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=HERE, help="folder for lora_step.json and lora_step.md")
    given = parser.parse_args(arguments)
    where = machine(given.device)
    setting = {name: value for name, value in vars(given).items() if name != "out"}
    command = " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}")
        for name, value in setting.items()
        if value is not False
    )
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": f"python -m evaluation.speed.lora_step {command}",
        "machine": where,
        "setting": setting,
        **measure(given),
        "load at end": os.getloadavg()[0],
    }
    results["summary"] = summary(results)
    given.out.mkdir(parents=True, exist_ok=True)
    stem = "lora_step_nf4" if given.load_in_4bit else "lora_step"
    (given.out / f"{stem}.json").write_text(json.dumps(results, indent=2) + "\n")
    (given.out / f"{stem}.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    main()
