"""How fast and how lean a merge is, side by side with `cp`, a plain expression and mergekit, in one run.

    python -m evaluation.speed.merge --workdir FOLDER [FOLDER...] --mergekit .venv-mergekit/bin/python

Writes results.json and results.png beside this file and prints the tables. FOLDER needs about 25 GB and
should lie on the kind of disk that models lie on. Runs of the things compared alternate, medians are
reported, outputs are removed and buffers flushed between runs, and inputs are in the page cache.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evaluation.speed.checkpoints import PRIOR_PRECISION, SIZES, Size, write_inputs
from evaluation.speed.report import figure, tables, verdicts
from evaluation.speed.watch import Watched, watch

HERE = Path(__file__).parent
Runs = dict[str, list[dict[str, float]]]


def alternate(repeats: int, variants: dict[str, Callable[[], dict[str, float]]]) -> Runs:
    """Run every variant once, then every variant again, and so on."""
    runs: Runs = {name: [] for name in variants}
    for repeat in range(repeats):
        for name, variant in variants.items():
            os.sync()  # what an earlier run left to write must not slow this one
            runs[name].append(variant())
            print(f"  {repeat + 1}/{repeats} {name}: {runs[name][-1]['seconds']:.2f} s", file=sys.stderr)
    return runs


def streaming(workdir: Path, size: Size, repeats: int) -> dict[str, Any]:
    """Gradient matching of three sources with precisions, against `cp` and the plain expression."""
    folder, out = workdir / "streaming", workdir / "out"
    write_inputs(folder, size, sources=3, precisions=True)
    recipe = write_recipe(folder, "gradient_matching", 3, precision=True)
    files = sorted(folder.glob("*/*.safetensors"))
    nbytes = sum(file.stat().st_size for file in files)
    _warm(files)
    cache = workdir / "compiler"
    shutil.rmtree(cache, ignore_errors=True)

    def copied(*, durable: bool) -> dict[str, float]:
        out.mkdir()
        start = time.perf_counter()
        for index, file in enumerate(files):
            subprocess.run(["cp", str(file), str(out / f"{index}")], check=True)
        if durable:
            subprocess.run(["sync", *(str(path) for path in sorted(out.iterdir()))], check=True)
        seconds = time.perf_counter() - start
        shutil.rmtree(out)
        return {"seconds": seconds, "bytes_read": nbytes, "bytes_written": nbytes}

    def ours(mode: str) -> dict[str, float]:
        command = [sys.executable, "-m", "evaluation.speed.ours", str(recipe), str(out), mode]
        watched = watch(command, environment={"TORCHINDUCTOR_CACHE_DIR": str(cache)})
        return {**json.loads(watched.output.splitlines()[-1]), **_process(watched)}

    def plain() -> dict[str, float]:
        command = [sys.executable, "-m", "evaluation.speed.plain", str(folder), str(out), "3"]
        watched = watch(command)
        written = sum(path.stat().st_size for path in out.iterdir())
        shutil.rmtree(out)
        times = json.loads(watched.output.splitlines()[-1])
        return {**times, "bytes_read": nbytes, "bytes_written": written, **_process(watched)}

    variants: dict[str, Callable[[], dict[str, float]]] = {
        "cp": lambda: copied(durable=False),
        "compiled": lambda: ours("compile"),
        "not compiled": lambda: ours("no-compile"),
        "cp, then sync": lambda: copied(durable=True),
        "plain expression": plain,
    }
    return {"bytes_of_inputs": nbytes, "runs": alternate(repeats, variants)}


def against_mergekit(workdir: Path, sizes: Sequence[Size], repeats: int, mergekit: Path | None) -> dict[str, Any]:
    """Task arithmetic as a whole process: two and six sources, and a model four times as large."""
    small, large = sizes
    write_inputs(workdir / "small", small, sources=6, precisions=False)
    write_inputs(workdir / "large", large, sources=2, precisions=False)
    recipes = {
        "2 sources": write_recipe(workdir / "small", "task_arithmetic", 2),
        "6 sources": write_recipe(workdir / "small", "task_arithmetic", 6),
        "2 sources, 4 x larger": write_recipe(workdir / "large", "task_arithmetic", 2),
    }
    for name in ("small", "large"):
        _warm(sorted(workdir.glob(f"{name}/*/*.safetensors")))
    out = workdir / "out"
    command = Path(sys.executable).parent / "bayes-merge"

    def ours(recipe: Path) -> dict[str, float]:
        watched = watch([str(command), str(recipe), str(out), "--quiet"])
        shutil.rmtree(out)
        return _whole(watched)

    def theirs(recipe: Path) -> dict[str, float]:
        assert mergekit is not None
        program = mergekit.parent / "mergekit-yaml"
        options = ["--no-copy-tokenizer", "--quiet", "--out-shard-size", "100M", "--random-seed", "0"]
        watched = watch([str(program), str(recipe), str(out), *options])
        shutil.rmtree(out)
        return _whole(watched)

    variants: dict[str, Callable[[], dict[str, float]]] = {}
    for name, recipe in recipes.items():
        variants[f"mergekit_bayes, {name}"] = partial(ours, recipe)
        if mergekit is not None:
            variants[f"mergekit, {name}"] = partial(theirs, recipe)
    return {
        "bytes_per_checkpoint": {"small": small.nbytes, "large": large.nbytes},
        "runs": alternate(repeats, variants),
    }


def starting(workdir: Path, repeats: int, mergekit: Path | None) -> dict[str, Any]:
    """How long one waits for help, for a plan and for the news of a typing error."""
    good = write_recipe(workdir / "small", "task_arithmetic", 2)
    bad = good.with_name("misspelt.yaml")
    bad.write_text(good.read_text().replace("weight:", "wieght:"))
    command = str(Path(sys.executable).parent / "bayes-merge")
    variants: dict[str, Callable[[], dict[str, float]]] = {
        "bayes-merge --help": lambda: _whole(watch([command, "--help"])),
        "bayes-merge plan": lambda: _whole(watch([command, "plan", str(good)])),
        "bayes-merge, misspelt key": lambda: _whole(watch([command, str(bad), str(workdir / "out")], expect=2)),
    }
    if mergekit is not None:
        program = str(mergekit.parent / "mergekit-yaml")
        variants["mergekit-yaml --help"] = lambda: _whole(watch([program, "--help"]))
    return {"runs": alternate(repeats, variants)}


def _whole(watched: Watched) -> dict[str, float]:
    return {"seconds": watched.seconds, **_process(watched)}


def _process(watched: Watched) -> dict[str, float]:
    return {
        "process_seconds": watched.seconds,
        "process_cpu_seconds": watched.cpu_seconds,
        "peak_rss": watched.peak_rss,
        "peak_anonymous": watched.peak_anonymous,
    }


def write_recipe(folder: Path, method: str, sources: int, *, precision: bool = False) -> Path:
    """Write a recipe that both programs read; without precisions it holds nothing mergekit does not know."""
    weight = 1.0 if precision else round(1 / sources, 3)
    lines = [f"merge_method: {method}", f"base_model: {folder / 'base'}", "models:"]
    for index in range(1, sources + 1):
        lines += [f"  - model: {folder / f'source{index}'}", f"    parameters: {{weight: {weight}}}"]
    lines.append("dtype: bfloat16")
    if precision:
        lines += [f"precision: {{prior: {PRIOR_PRECISION}}}", "output: {precision: bfloat16}"]
    path = folder / f"{method}-{sources}.yaml"
    path.write_text("\n".join(lines) + "\n")
    return path


def _warm(files: Sequence[Path]) -> None:
    """Read the files once, so that they are in the page cache."""
    block = bytearray(1 << 24)
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(block):
                pass


def _filesystem(folder: Path) -> str:
    """The type of filesystem a folder lies on, such as ext4 or tmpfs."""
    mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    around = [(point, kind) for point, kind in mounts if folder.is_relative_to(point)]
    return max(around, key=lambda mount: len(mount[0]))[1]


def _machine() -> dict[str, Any]:
    model = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "processor": model[0].split(":")[1].strip() if model else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(int(memory) / 2**20, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "load_at_start": os.getloadavg()[0],
    }


def main() -> None:
    """Run the parts asked for and write results, tables and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=Path, nargs="+", required=True, help="streaming is measured in each, the rest in the first"
    )
    parser.add_argument("--mergekit", type=Path, help="python of an environment with mergekit 0.1.5")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE, help="folder for results.json and results.png")
    parser.add_argument("--tiny", action="store_true", help="models of 0.4 MB: does the benchmark work?")
    arguments = parser.parse_args()
    workdirs = [workdir.resolve() for workdir in arguments.workdir]
    for workdir in workdirs:
        workdir.mkdir(parents=True, exist_ok=True)
    names = ("tiny", "tiny") if arguments.tiny else ("half_gigabyte", "two_gigabytes")
    sizes = [SIZES[name] for name in names]
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "command": f"python -m evaluation.speed.merge --workdir{' FOLDER' * len(workdirs)} --mergekit PYTHON"
        f" --repeats {arguments.repeats}{' --tiny' if arguments.tiny else ''}",
        "machine": _machine(),
        "streaming": {_filesystem(each): streaming(each, sizes[0], arguments.repeats) for each in workdirs},
        "mergekit": against_mergekit(workdirs[0], sizes, arguments.repeats, arguments.mergekit),
        "start": starting(workdirs[0], arguments.repeats, arguments.mergekit),
    }
    results["verdicts"] = verdicts(results)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    figure(results, arguments.out / "results.png")
    print(tables(results))


if __name__ == "__main__":
    main()
