"""Run every parity case through the real mergekit and write what it gives to `golden/`.

mergekit pins its own versions of things, so it lives in its own environment. From the repository's root:

    python3 -m venv .venv-mergekit
    .venv-mergekit/bin/pip install -c constraints.txt torch
    .venv-mergekit/bin/pip install -c constraints.txt mergekit==0.1.5
    .venv-mergekit/bin/python -m tests.parity.regenerate [--out FOLDER] [CASE...]

Neither pytest nor mergekit_bayes is imported here.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import os
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import mergekit.merge
import mergekit.options
import torch
import yaml
from mergekit.config import MergeConfiguration
from safetensors.torch import load_file, save_file

from tests.parity.cases import CASES, GOLDEN, Case
from tests.parity.inputs import build_inputs

MERGEKIT = "0.1.5"


def merge_with_mergekit(case: Case, inputs: Path, output: Path) -> dict[str, torch.Tensor]:
    """What mergekit writes for a case, by tensor name.

    Args:
        case: the recipe to run.
        inputs: folder with the models the recipe names.
        output: folder to write to.
    """
    with contextlib.chdir(inputs):
        mergekit.merge.run_merge(
            MergeConfiguration.model_validate(yaml.safe_load(case.recipe)),
            str(output),
            mergekit.options.MergeOptions(
                copy_tokenizer=False,
                write_model_card=False,
                quiet=True,
                random_seed=0,
                lora_merge_cache=str(output / "lora"),
            ),
        )
    shards = sorted(output.glob("*.safetensors"))
    return {name: tensor for shard in shards for name, tensor in load_file(shard).items()}


def write_golden(case: Case, scratch: Path, target: Path) -> None:
    """Merge one case below `scratch` and save the result as one file with sorted names."""
    tensors = merge_with_mergekit(case, build_inputs(case, scratch), scratch / "merged" / case.name)
    save_file({name: tensors[name].contiguous() for name in sorted(tensors)}, target)
    target.chmod(0o644)
    print(f"{case.name}: {len(tensors)} tensors, {target.stat().st_size} bytes", flush=True)


def main() -> None:
    """Write one golden file per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=GOLDEN)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    arguments = parser.parse_args()
    if version("mergekit") != MERGEKIT:
        sys.exit(f"mergekit {version('mergekit')} is installed, {MERGEKIT} is what parity is claimed for")
    arguments.out.mkdir(parents=True, exist_ok=True)
    failed = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in CASES:
            if arguments.cases and case.name not in arguments.cases:
                continue
            # a process each: mergekit keeps what it opened by name, and every case calls its models the same;
            # forked, because importing mergekit takes ten seconds
            target = arguments.out / case.golden.name
            process = multiprocessing.get_context("fork").Process(
                target=write_golden, args=(case, Path(scratch), target)
            )
            process.start()
            process.join()
            if process.exitcode != 0:
                failed.append(case.name)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
