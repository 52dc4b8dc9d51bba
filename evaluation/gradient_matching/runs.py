"""One seed and optimizer of the study: train, estimate, merge at every scale, score on every domain."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from evaluation.gradient_matching.classifier import Classifier
from evaluation.gradient_matching.domains import LABELS
from evaluation.gradient_matching.merges import SCALES, Model, merge
from evaluation.gradient_matching.train import (
    Ivon,
    Optimizer,
    Schedule,
    Trained,
    train_adamw,
    train_ivon,
)
from evaluation.merging.family import put
from evaluation.merging.packages import Packages
from evaluation.merging.precisions import estimate

ARITHMETIC, FISHER, SQUARED, WITH_IVON = (
    "task arithmetic",
    "Fisher averaging",
    "gradient matching, squared gradients",
    "gradient matching, IVON",
)
IVON_ARITHMETIC, IVON_SQUARED = "task arithmetic, IVON's models", "gradient matching, squared gradients, IVON's models"


OPTIMIZERS: tuple[Optimizer, ...] = ("adamw", "ivon")


@dataclass(frozen=True)
class Curve:
    """A line of the figure: which models are merged how, with which precisions, at which scales."""

    optimizer: Optimizer
    method: str
    precisions: str | None
    scales: tuple[float, ...]


CURVES: Mapping[str, Curve] = {
    ARITHMETIC: Curve("adamw", "task_arithmetic", None, SCALES),
    FISHER: Curve("adamw", "hessian_weighted", "fisher", (1.0,)),
    SQUARED: Curve("adamw", "gradient_matching", "fisher", SCALES),
    WITH_IVON: Curve("ivon", "gradient_matching", "ivon", SCALES),
    IVON_ARITHMETIC: Curve("ivon", "task_arithmetic", None, SCALES[::2]),
    IVON_SQUARED: Curve("ivon", "gradient_matching", "fisher", SCALES[::2]),
}


@dataclass(frozen=True)
class Settings:
    """Everything that was chosen: how base and experts are trained, and rows of a pass of squared gradients."""

    adamw_base: Schedule
    adamw_expert: Schedule
    ivon_base: Schedule
    ivon_expert: Schedule
    ivon: Ivon
    fisher_rows: int

    def schedule(self, optimizer: Optimizer, *, base: bool) -> Schedule:
        """Of one model."""
        pair = (self.adamw_base, self.adamw_expert) if optimizer == "adamw" else (self.ivon_base, self.ivon_expert)
        return pair[0 if base else 1]


@dataclass(frozen=True)
class Chain:
    """A base and its experts, made by one optimizer; and seconds of CPU time."""

    base: Model
    experts: Mapping[str, Model]
    training: float
    diagnoses: Mapping[str, Mapping[str, float]]


def run(family: Packages, seed: int, optimizer: Optimizer, settings: Settings) -> dict[str, Any]:
    """What one optimizer gives with one seed, as plain data.

    Returns:
        Scores by curve, scale and domain (`curves`), those of every model on its own domain (`at_home`), seconds of CPU
        time of training and of the passes of squared gradients, and of IVON what its curvature is like.
    """
    model = Classifier(family.folder, len(LABELS), seed=seed)
    chain = train_chain(family, model, optimizer, seed, settings)
    estimated, passes = with_fisher(family, model, chain, settings.fisher_rows)
    base = everywhere(family, model, chain.base.means)
    curves = {}
    for name, curve in CURVES.items():
        if curve.optimizer == optimizer:
            merged = estimated if curve.precisions == "fisher" else chain
            curves[name] = follow(family, model, curve, merged, base)
            print(f"seed {seed}: scored {name}", file=sys.stderr, flush=True)
    found: dict[str, Any] = {
        "curves": curves,
        "at_home": at_home(family, model, chain),
        "seconds": {"training": round(chain.training, 2), "passes": round(passes, 2)},
    }
    if optimizer == "ivon":
        found |= {"diagnoses": chain.diagnoses, "agreement": agreement(chain, estimated)}
    return found


def train_chain(family: Packages, model: nn.Module, optimizer: Optimizer, seed: int, settings: Settings) -> Chain:
    """Train a base on the first domain, and from it an expert on each of the others."""
    first, *others = family.tasks
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    found = {first: _train(family, model, first, optimizer, seed, settings)}
    for domain in others:
        put(model, found[first].means)
        found[domain] = _train(family, model, domain, optimizer, seed, settings)
    put(model, start)
    models = {
        domain: Model(each.means, each.curvature, family.training_units(domain)) for domain, each in found.items()
    }
    return Chain(
        base=models[first],
        experts={domain: models[domain] for domain in others},
        training=sum(each.seconds for each in found.values()),
        diagnoses={domain: each.diagnosis for domain, each in found.items() if each.diagnosis},
    )


def _train(
    family: Packages, model: nn.Module, domain: str, optimizer: Optimizer, seed: int, settings: Settings
) -> Trained:
    base = domain == family.tasks[0]
    schedule, feed = settings.schedule(optimizer, base=base), family.training(domain, seed)
    if optimizer == "adamw":
        found = train_adamw(model, feed, schedule)
    else:
        found = train_ivon(model, feed, schedule, settings.ivon, seed=1000 * seed + family.tasks.index(domain))
    print(f"seed {seed}: {optimizer} {domain}, {found.seconds:.1f} s {found.diagnosis}", file=sys.stderr, flush=True)
    return found


def with_fisher(family: Packages, model: nn.Module, chain: Chain, rows: int) -> tuple[Chain, float]:
    """The same models with the squared gradients of their own training rows as curvature, and seconds of CPU time."""
    started, first = time.process_time(), family.tasks[0]
    found = {}
    for domain, trained in {first: chain.base, **chain.experts}.items():
        put(model, dict(trained.means))
        sample = family.sample(domain, rows)
        found[domain] = replace(trained, curvature=estimate(model, list(trained.means), sample, "fisher"))
    base = found.pop(first)
    return replace(chain, base=base, experts=found), time.process_time() - started


def follow(
    family: Packages, model: nn.Module, curve: Curve, chain: Chain, base: Mapping[str, list[float]]
) -> dict[str, Mapping[str, list[float]]]:
    """Scores of one curve: by scale, by domain; at scale 0 every merge is the base."""
    found = {}
    for scale in curve.scales:
        merged = merge(curve.method, scale, chain.base, list(chain.experts.values())) if scale else None
        found[f"{scale:g}"] = base if merged is None else everywhere(family, model, merged)
    return found


def everywhere(family: Packages, model: nn.Module, means: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Scores of one set of tensors on every domain."""
    put(model, dict(means))
    return {domain: score(family, model, domain) for domain in family.tasks}


def at_home(family: Packages, model: nn.Module, chain: Chain) -> dict[str, list[float]]:
    """Every expert on its own domain, and the base on its own."""
    found = {}
    for domain, trained in {family.tasks[0]: chain.base, **chain.experts}.items():
        put(model, dict(trained.means))
        found[domain] = score(family, model, domain)
    return found


@torch.no_grad()
def score(family: Packages, model: nn.Module, domain: str, part: str = "test") -> list[float]:
    """Accuracy and negative log-likelihood in nats, averaged over the rows of a domain."""
    model.eval()
    right, loss, rows = 0, 0.0, 0
    for batch in family.held_out(domain, part):
        labels = batch["labels"]
        logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        right += int((logits.argmax(-1) == labels).sum())
        loss += float(cross_entropy(logits, labels, reduction="sum"))
        rows += len(labels)
    return [round(right / rows, 5), round(loss / rows, 5)]


def agreement(free: Chain, passed: Chain) -> dict[str, dict[str, float]]:
    """IVON's curvature beside squared gradients of the same models: means at data scale, and rank correlation."""
    pairs = {"base": (free.base, passed.base)}
    pairs |= {domain: (expert, passed.experts[domain]) for domain, expert in free.experts.items()}
    return {name: _agree(_flat(first), _flat(second)) for name, (first, second) in pairs.items()}


def _flat(model: Model) -> Tensor:
    return torch.cat([model.summed(name).flatten() for name in model.means])


def _agree(first: Tensor, second: Tensor, *, entries: int = 200_000) -> dict[str, float]:
    chosen = torch.randperm(len(first), generator=torch.Generator().manual_seed(0))[:entries]
    ranks = torch.stack([values[chosen].argsort().argsort().double() for values in (first, second)])
    return {
        "ivon": float(first.double().mean()),
        "squared_gradients": float(second.double().mean()),
        "rank_correlation": round(float(torch.corrcoef(ranks)[0, 1]), 4),
    }
