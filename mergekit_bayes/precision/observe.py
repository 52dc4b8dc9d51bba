"""One pass forwards and backwards over a few rows, and what layers saw of it.

Per-example gradients need no pass of their own: with the input x of a module and the gradient d of its output, both of
which a pass over many rows has anyway, the gradient of any row follows for that module alone (d^T x for a linear
layer). So parameters are frozen and hooks collect x and d; nothing is added up before it is known that all of it is
finite.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergekit_bayes.errors import DataError, ModelError
from mergekit_bayes.precision.chunks import IGNORED, Chunk
from mergekit_bayes.precision.signals import Signal, row_generator

__all__ = ["Observation", "Use", "logits_of", "observe", "prepared"]


@dataclass
class Use:
    """One call of a module.

    Attributes:
        arguments: as called; the first is the input. Gradients are not recorded.
        keywords: as called.
        gradient: of the summed signal in the output; None if the logits do not depend on it.
    """

    arguments: tuple[Any, ...]
    keywords: Mapping[str, Any]
    gradient: Tensor | None = None

    @property
    def input(self) -> Tensor:
        """What came first: features, or the tokens of an embedding."""
        value: Tensor = self.arguments[0] if self.arguments else next(iter(self.keywords.values()))
        return value


@dataclass
class Observation:
    """What was seen of a chunk.

    Attributes:
        uses: calls of each watched module, by its path, in order.
        direct: gradients of parameters that were differentiated themselves, by name, summed over the rows.
        apart: whether the first dimension of all inputs and outputs counts rows, so that rows can be told apart.
        finite: whether all of it is finite.
    """

    uses: dict[str, list[Use]]
    direct: dict[str, Tensor] = field(default_factory=dict)
    apart: bool = True
    finite: bool = True


def observe(
    model: nn.Module,
    chunk: Chunk,
    watched: Collection[str],
    *,
    signal: Signal | None,
    seed: int,
    direct: Mapping[str, nn.Parameter],
) -> Observation:
    """Shows a model some rows.

    Args:
        model: inside `prepared`.
        chunk: the rows.
        watched: paths of modules.
        signal: what is sent backwards; None to look at inputs only.
        seed: of what is drawn for a row, with the row's number.
        direct: parameters to differentiate themselves, whose gradients do not tell rows apart.

    Raises:
        DataError: a label that is no class of the model's.
        ModelError: an output that has no logits.
    """
    with (
        _Hooks(model, watched, chunk, backward=signal is not None) as hooks,
        torch.set_grad_enabled(signal is not None),
    ):
        logits = logits_of(model, chunk.inputs)
        seen = hooks.observation
        if logits.numel() and not logits.detach().amax().isfinite():  # a class may be ruled out by minus infinity
            seen.finite = False
            return seen
        if signal is not None:
            sent = _sent(logits, chunk, signal, seed)
            inputs = [*direct.values(), *hooks.starts]
            if logits.requires_grad and inputs:
                gradients = torch.autograd.grad(logits, inputs, sent, allow_unused=True)
                found = zip(direct, gradients, strict=False)
                seen.direct = {name: gradient for name, gradient in found if gradient is not None}
    seen.finite = _all_finite(_tensors(seen))
    return seen


def logits_of(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
    """Calls a model that returns logits, or something with logits.

    Raises:
        ModelError: its output has none.
    """
    output = model(**inputs)
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        seen = f"{type(model).__name__}: returns a {type(output).__name__} without logits"
        raise ModelError(f"{seen}; expected a model with a head")
    return logits


@contextmanager
def prepared(model: nn.Module, direct: Collection[nn.Parameter]) -> Iterator[None]:
    """All but the given parameters are frozen, and keys and values are not cached, inside; all is as before after."""
    chosen = {id(parameter) for parameter in direct}
    config = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    thawed = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in thawed:
            parameter.requires_grad_(id(parameter) in chosen)
        if cached is not None:
            config.use_cache = False  # type: ignore[union-attr]
        yield
    finally:
        for parameter in thawed:
            parameter.requires_grad_(True)
        if cached is not None:
            config.use_cache = cached  # type: ignore[union-attr]


class _Hooks:
    """Forward hooks on modules, that keep what goes in and hook the gradient of what comes out."""

    def __init__(self, model: nn.Module, watched: Collection[str], chunk: Chunk, *, backward: bool) -> None:
        self.observation = Observation({path: [] for path in watched})
        self.starts: list[Tensor] = []
        self._model, self._chunk, self._backward = model, chunk, backward
        self._handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        for path, uses in self.observation.uses.items():
            module = self._model.get_submodule(path)
            self._handles.append(module.register_forward_hook(self._hook(uses), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _hook(self, uses: list[Use]) -> Any:
        def keep(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: Tensor) -> Tensor | None:
            use = Use(tuple(_detached(each) for each in arguments), {k: _detached(v) for k, v in keywords.items()})
            uses.append(use)
            replaced = self._one_for_each_row(use, output)
            self._check(use.input, output if replaced is None else replaced)
            return self._follow(use, output if replaced is None else replaced) if self._backward else replaced

        return keep

    def _one_for_each_row(self, use: Use, output: Tensor) -> Tensor | None:
        """Repeats what was computed once for all rows, such as embeddings of positions, to tell gradients apart."""
        rows = len(self._chunk)
        if rows == 1 or len(use.arguments) != 1 or use.keywords or len(use.input) != 1 or len(output) != 1:
            return None
        use.arguments = (use.input.expand(rows, *use.input.shape[1:]),)
        return output.expand(rows, *output.shape[1:])

    def _check(self, value: Tensor, output: Tensor) -> None:
        rows, tokens = len(self._chunk), self._chunk.wanted.dim() == 2
        fits = all(each.dim() >= 1 and len(each) == rows for each in (value, output))
        # in a language model a matrix of features holds tokens of all rows, even if there are as many of them as rows
        features = output.dim()
        self.observation.apart &= fits and (features > 2 or not tokens)

    def _follow(self, use: Use, output: Tensor) -> Tensor:
        def receive(gradient: Tensor) -> None:
            use.gradient = gradient.detach()

        if not output.requires_grad:
            start = output.detach().requires_grad_()
            self.starts.append(start)
            output = start.clone()  # whoever comes next may change it in place, which a leaf forbids
        output.register_hook(receive)  # type: ignore[no-untyped-call]
        return output


def _detached(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _sent(logits: Tensor, chunk: Chunk, signal: Signal, seed: int) -> Tensor:
    """What goes backwards: the signal of each row where it has a label, zero elsewhere; shape and dtype of logits."""
    _check_labels(logits, chunk)
    sent = torch.zeros_like(logits)
    for n, number in enumerate(chunk.numbers):
        wanted = chunk.wanted[n : n + 1].reshape(-1)
        places = (wanted != IGNORED).nonzero().squeeze(1)
        there = logits.detach()[n : n + 1].reshape(len(wanted), -1)[places.to(logits.device)]
        there = there.to(torch.promote_types(there.dtype, torch.float32))
        labels = wanted[places].to(logits.device)
        value = signal(there, labels, row_generator(seed, number)).to(sent.dtype)
        sent[n : n + 1].view(len(wanted), -1)[places.to(logits.device)] = value
    return sent


def _check_labels(logits: Tensor, chunk: Chunk) -> None:
    classes = logits.shape[-1]
    if logits.shape[:-1] != chunk.wanted.shape:
        seen = f"row {chunk.numbers[0]}: logits of shape {tuple(logits.shape)}, labels of {tuple(chunk.wanted.shape)}"
        raise DataError(f"{seen}; expected logits for every label")
    for number, wanted in zip(chunk.numbers, chunk.wanted, strict=True):
        wrong = (wanted != IGNORED) & ((wanted < 0) | (wanted >= classes))
        if wrong.any():
            label = int(wanted[wrong][0]) if wanted.dim() else int(wanted)
            raise DataError(f"row {number}: label {label}; expected 0 to {classes - 1}, the classes of the model")


def _tensors(seen: Observation) -> Iterator[Tensor]:
    """Everything that goes into sums; inputs that several layers share once."""
    shared: dict[tuple[int, torch.Size], Tensor] = {}
    for uses in seen.uses.values():
        for use in uses:
            if use.input.is_floating_point():
                shared.setdefault((use.input.data_ptr(), use.input.shape), use.input)
            if use.gradient is not None:
                yield use.gradient
    yield from shared.values()
    yield from seen.direct.values()


def _all_finite(tensors: Iterable[Tensor]) -> bool:
    # minimum and maximum pass NaN on, and are found several times faster than every number is checked
    verdicts = [torch.stack(each.aminmax()).isfinite().all() for each in tensors if each.numel()]
    return not verdicts or bool(torch.stack([verdict.to(verdicts[0].device) for verdict in verdicts]).all())
