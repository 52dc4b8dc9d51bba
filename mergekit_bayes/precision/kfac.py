"""Kronecker-factored curvature of linear layers, with corrected eigenvalues where wanted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from mergekit_bayes.precision.chunks import Chunk
from mergekit_bayes.precision.estimator import Estimator
from mergekit_bayes.precision.gradients import add_squares, weight_rule
from mergekit_bayes.precision.moments import Moments, layer_zeros
from mergekit_bayes.precision.observe import Observation, Use
from mergekit_bayes.precision.targets import Layer, Target, Targets, count

__all__ = ["KFAC"]


class KFAC(Estimator):
    r"""The Fisher information of linear layers as G (x) A, labels drawn from the model.

        A = mean over places of x x^T,     G = sum over places of d d^T,     H[W] = G W A

    for inputs x and output gradients d at the places of all rows (K-FAC: Martens & Grosse 2015, arXiv 1503.05671; the
    places of a sequence as in the *expand* setting of Eschenhagen et al. 2023, arXiv 2311.00636). A place is a token
    that some loss of its row depends on, as in `Gram`. Exact if x and d do not depend on each other and gradients of
    different places are uncorrelated. With the option `eigenvalues`, a second pass over the data finds

        H[W] = U_G (L * (U_G^T W U_A)) U_A^T,     L = sum over rows of (U_G^T g U_A)^2

    for the eigenvectors U of G and A and the gradient g = sum d x^T of a row: in this basis the best there is (EK-FAC:
    George et al. 2018, arXiv 1806.03884). All other targets get the diagonal of `Fisher`, from the same passes.
    """

    name = "kfac"
    family = "kronecker"
    signal = "sampled_label"

    def __init__(
        self,
        model: nn.Module,
        targets: Targets,
        *,
        seed: int = 0,
        chunk_size: int = 8,
        options: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        super().__init__(model, targets, seed=seed, chunk_size=chunk_size, options=options)
        self.passes = 2 if options.get("eigenvalues", False) else 1
        self._layers = tuple(layer for layer in targets.layers if layer.factored)
        self._moments = Moments(model, self._layers, sides=("input", "output"))
        self._eigenvalues: dict[str, Tensor] = {}

    @classmethod
    def size(cls, target: Target, options: Mapping[str, object] = MappingProxyType({})) -> int:
        """Returns 4 bytes for every entry of a layer's factors and eigenvalues, or of a diagonal."""
        if not isinstance(target, Layer) or not target.factored:
            return 4 * count(target)
        corrected = count(target) if options.get("eigenvalues", False) else 0
        return 4 * (target.in_features**2 + target.out_features**2 + corrected)

    def start_pass(self, index: int) -> None:
        """Begins a pass; the second one puts eigenvectors in the place of the factors."""
        super().start_pass(index)
        if index == 0:
            return
        for layer in self._layers:
            for side in ("input", "output"):
                total = self._moments.totals[f"{layer.name}.{side}_factor"]
                total.copy_(torch.linalg.eigh(total.double()).eigenvectors)
            self._eigenvalues[f"{layer.name}.eigenvalues"] = layer_zeros(self.model, layer, *layer.shape)

    @property
    def _corrects(self) -> bool:
        return bool(self._eigenvalues)

    def _needs_rows(self) -> bool:
        return self._corrects or super()._needs_rows()

    def _direct(self) -> Mapping[str, nn.Parameter]:
        return {} if self._corrects else super()._direct()

    def _totals(self) -> Mapping[str, Tensor]:
        return self._eigenvalues if self._corrects else {**self._moments.totals, **self._squares.totals}

    def _curvature(self) -> Mapping[str, Tensor]:
        curvature = dict(self._squares.totals)
        for layer in self._layers:
            places = max(1.0, float(self._moments.totals[f"{layer.name}.places"]))
            factor = self._moments.totals[f"{layer.name}.input_factor"]
            curvature[f"{layer.name}.input_factor"] = (factor if self._corrects else factor / places)[None]
            curvature[f"{layer.name}.output_factor"] = self._moments.totals[f"{layer.name}.output_factor"][None]
            if self._corrects:
                curvature[f"{layer.name}.eigenvalues"] = self._eigenvalues[f"{layer.name}.eigenvalues"][None]
        return curvature

    def _watched(self) -> Iterable[str]:
        paths = [layer.path for layer in self._layers]
        return paths if self._corrects else [*paths, *self._squares.watched]

    def _add(self, seen: Observation, chunk: Chunk) -> None:
        if not self._corrects:
            self._moments.add(seen.uses, chunk)
            self._squares.add(seen, len(chunk))
            return
        for layer in self._layers:
            bases = [self._moments.totals[f"{layer.name}.{side}_factor"] for side in ("input", "output")]
            uses = [(weight_rule(), _rotated(use, *bases)) for use in seen.uses[layer.path]]
            add_squares(self._eigenvalues[f"{layer.name}.eigenvalues"], uses, len(chunk))


def _rotated(use: Use, inputs: Tensor, outputs: Tensor) -> Use:
    """The same call in the coordinates of other bases."""
    gradient = None if use.gradient is None else use.gradient.to(outputs.dtype) @ outputs
    return Use((use.input.to(inputs.dtype) @ inputs,), {}, gradient)
