"""A family that is neither isotropic nor diagonal, to see where the walls of the algebra stand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NoReturn, Self

import torch
from torch import Tensor

from mergekit_bayes.posterior import Posterior


class Other(Posterior):
    """Knows how to merge, by returning the first source, and nothing else."""

    family: ClassVar[str] = "other"
    richness: ClassVar[int] = 99

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean

    def precision_tensor(self) -> Tensor:
        return torch.ones(())

    def quadratic(self, x: Tensor, *, beyond: Posterior | None = None) -> NoReturn:
        raise NotImplementedError

    def check(self) -> Self:
        return self

    def with_mean(self, mean: Tensor) -> Self:
        return type(self)(mean)

    @classmethod
    def merge(
        cls, base: Posterior, sources: Sequence[Posterior], weights: Tensor, *, floor: float | None = None
    ) -> Posterior:
        return cls(sources[0].mean)

    def product(self, other: Posterior) -> NoReturn:
        raise NotImplementedError

    def quotient(self, other: Posterior) -> NoReturn:
        raise NotImplementedError

    def power(self, alpha: float) -> NoReturn:
        raise NotImplementedError

    def sample(self, generator: torch.Generator | None = None, *, temperature: float = 1.0) -> NoReturn:
        raise NotImplementedError

    def log_density(self, x: Tensor) -> NoReturn:
        raise NotImplementedError

    def kl(self, other: Posterior) -> NoReturn:
        raise NotImplementedError
