"""IVON as a torch optimizer: a mean and a curvature for every weight, at about the price of AdamW."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.apply import apply_
from mergekit_bayes.finetune.ivon.finite import agree, all_finite
from mergekit_bayes.finetune.ivon.fused import decide
from mergekit_bayes.finetune.ivon.loading import check_shapes, in_float32
from mergekit_bayes.finetune.ivon.noise import PREDICT, TRAIN, KeyedNoise, aligned, stream_key
from mergekit_bayes.finetune.ivon.options import check_group, check_whole
from mergekit_bayes.finetune.ivon.pack import Pack, Packs, Place, UnitPlace
from mergekit_bayes.finetune.ivon.prior import solve_prior
from mergekit_bayes.finetune.ivon.reduction import average_over_processes, process_rank
from mergekit_bayes.finetune.ivon.sampling import Draw, Excursion
from mergekit_bayes.finetune.ivon.sharding import (
    drop_gathered,
    is_sharded,
    local,
    refuse_foreign_sharding,
    refuse_foreign_wrapper,
)
from mergekit_bayes.finetune.ivon.underway import StepUnderWay

__all__ = ["IVON"]

_OWN = ("seed", "draws", "predictions", "skipped")  # one value for the whole optimizer, kept in every group


class IVON(Optimizer):
    """Improved variational online Newton (Shen et al., ICML 2024, arXiv 2402.17641).

    Approximates argmin_q ess E_q[loss] + KL(q || p) by q = N(m, 1 / (ess (h + weight_decay))) with the prior
    p = N(0, 1 / (ess weight_decay)); the parameters hold m. The gradient is taken at a sample:

        with optimizer.sampled_params(train=True):
            loss = loss_fn(model(x), y)
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # optional; before step, as with any optimizer
        optimizer.step()
        optimizer.zero_grad()

    One sample belongs to one step: entering the context again before `step` gives the same sample, so that
    micro-batches add up to the batch they were cut from, with the loss of each divided by their number. With
    `mc_samples` M, the contexts of a step go through samples 0 to M - 1 in turn, and the gradients of the
    samples are averaged; zeroing gradients in between is allowed and changes nothing.

    A gradient scaler and Accelerate wrap it like any optimizer; `IVON.of(prepared)` is the one inside, which has the
    context. After `fully_shard`, `bind(model)` tells it whose weights it samples. Engines that train copies of the
    weights (DeepSpeed ZeRO, FSDP 1) are refused: a sample would not reach them.

    All options can differ between parameter groups except seed, mc_samples, antithetic and noise. The state of small
    parameters lies in tensors that they share.

    Args:
        params: parameters, or groups of them.
        lr: step size, comparable to SGD's if `rescale_lr`.
        ess: effective sample size: what multiplies the MEAN loss. The number of training units gives the
            posterior, a larger one a colder one.
        hess_init: initial curvature h0 of the mean loss, positive.
        beta1: decay of the momentum, in [0, 1).
        beta2: decay of the curvature, in [0, 1]; 1 keeps it at h0.
        weight_decay: delta, the prior precision over ess.
        mc_samples: samples per step.
        hess_approx: `price` estimates curvature by noise times gradient; `gradsq` by the squared gradient times
            `batch_size`.
        clip_radius: bound of every entry of the preconditioned direction.
        debias: divide the momentum by 1 - beta1^t.
        rescale_lr: multiply lr by h0 + delta.
        batch_size: units per gradient; used by `gradsq` only, which then estimates the diagonal Fisher where the
            mean gradient vanishes.
        antithetic: samples 2i and 2i + 1 use opposite noise, which removes the noise of lowest order from
            the curvature estimate; mc_samples must be even.
        noise: `shared`: all processes see the same weights, and gradients are averaged by whoever averages them (DDP).
            `per_process`: every process draws its own; the caller keeps gradients local (`no_sync`), and `step`
            averages gradients and curvature estimates.
        seed: of the noise; the global generators are neither used nor changed.
        fused: one pass over memory for the sample and one for the update, by torch.compile. None: where the weights
            are so many that the seconds of compiling come back (4 million on CPU, 64 million on an accelerator) and
            a compiler works; foreach operations otherwise. The numbers are the same to rounding, and the same in
            every run of one kind.

    Raises:
        FinetuneError: an option out of range.
    """

    def __init__(  # noqa: PLR0913, PLR0917 - the names and the order of the established optimizer
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        ess: float,
        hess_init: float = 1.0,
        beta1: float = 0.9,
        beta2: float = 0.99999,
        weight_decay: float = 1e-4,
        mc_samples: int = 1,
        hess_approx: str = "price",
        clip_radius: float = math.inf,
        *,
        debias: bool = True,
        rescale_lr: bool = True,
        batch_size: float = 1.0,
        antithetic: bool = False,
        noise: str = "shared",
        seed: int = 0,
        fused: bool | None = None,
    ) -> None:
        check_whole(mc_samples=mc_samples, antithetic=antithetic, noise=noise, fused=fused)
        self.mc_samples, self.antithetic, self.noise, self.fused = mc_samples, antithetic, noise, fused
        self._model: nn.Module | None = None
        self._forget()
        defaults = {
            "lr": lr,
            "ess": ess,
            "hess_init": hess_init,
            "beta1": beta1,
            "beta2": beta2,
            "weight_decay": weight_decay,
            "hess_approx": hess_approx,
            "clip_radius": clip_radius,
            "debias": debias,
            "rescale_lr": rescale_lr,
            "batch_size": batch_size,
            "solved_weight_decay": weight_decay,
            "seed": seed,
            "draws": 0,
            "predictions": 0,
            "skipped": 0,
        }
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._model = self.__dict__.get("_model")  # loading a state comes by here too, and leaves the model
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        own = ("mc_samples", "antithetic", "noise", "fused")
        return {**super().__getstate__(), **{name: getattr(self, name) for name in own}}

    def _forget(self) -> None:
        """Drops everything that belongs to the step under way."""
        self._generator = KeyedNoise()
        self._active: str | None = None
        self._under_way = StepUnderWay(self.mc_samples)
        self._fusing: bool | None = None
        self._packs = Packs()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; their curvature starts at h0.

        Raises:
            FinetuneError: an option out of range.
        """
        super().add_param_group(param_group)
        self._fusing = None
        group = self.param_groups[-1]
        if "solved_weight_decay" not in param_group or len(self.param_groups) > 1:
            group["solved_weight_decay"] = group["weight_decay"]
        group.update({key: self.param_groups[0][key] for key in _OWN})
        try:
            check_group(group)
        except FinetuneError:
            self.param_groups.pop()
            raise

    @classmethod
    def of(cls, optimizer: Any) -> IVON:
        """Returns the IVON inside a wrapper, such as what `Accelerator.prepare` makes of it.

        Raises:
            FinetuneError: there is none, or an engine wraps it that trains copies of the weights.
        """
        inner = optimizer
        while not isinstance(inner, cls):
            refuse_foreign_wrapper(inner)
            inner = getattr(inner, "optimizer", None)
            if inner is None:
                raise FinetuneError(f"IVON: there is none in {type(optimizer).__name__}")
        return inner

    def bind(self, model: nn.Module) -> None:
        """Names the model whose weights these are; needed after `fully_shard`, harmless otherwise.

        A sharded model may keep a gathered copy of weights from one forward pass to the next. It is dropped where a
        context begins or ends, so that the model computes with what the context promises.

        Raises:
            FinetuneError: a trainable parameter that is not one of the model's.
        """
        own = {id(parameter) for parameter in model.parameters()}
        strangers = sum(id(parameter) not in own for _, _, parameter in self._trainable())
        if strangers:
            seen = f"IVON: {strangers} trainable parameters of the optimizer are not parameters of the model"
            raise FinetuneError(f"{seen}; after `fully_shard`, make the optimizer anew or let Accelerate prepare both")
        self._model = model

    @contextmanager
    def sampled_params(
        self, train: bool = False, *, sample: int | None = None, temperature: float = 1.0
    ) -> Iterator[None]:
        """Replaces the trainable parameters, in place, by a sample; the mean comes back bit for bit at exit.

        Args:
            train: the gradients computed inside belong to the next step.
            sample: which sample; by default the next in turn when training, a new one otherwise.
            temperature: factor on the variance; 1 when training.

        Raises:
            FinetuneError: inside another such context, or an argument out of range.
        """
        if train and self._active == "closure":
            yield  # `step` has already entered the context for this closure
            return
        if self._active is not None:
            raise FinetuneError("IVON: sampled_params inside sampled_params; leave the first context before")
        self._check_sample(train, sample, temperature)
        trainable = list(self._trainable())
        self._check_sharding(trainable)
        units = self._units(trainable, anew=True)
        self._active = "train" if train else "predict"
        away = Excursion(units)
        try:
            self._leave(away, units, train, sample, temperature)
            yield
        except BaseException:
            self._return(away, keep=False)
            if train:  # a sample that failed counts for nothing
                self._under_way.fail_sample(trainable)
            raise
        else:
            self._return(away, keep=train)
            if train:
                self._under_way.end_sample(trainable)
        finally:
            self._active = None

    def _units(self, trainable: list[Place], *, anew: bool = False) -> Sequence[UnitPlace]:
        """Small neighbours taken together, where every step is one sample that all processes see.

        Args:
            trainable: every trainable parameter.
            anew: also if what was taken together before no longer holds, unless a step is under way.
        """
        if self.mc_samples > 1 or self.noise == "per_process":
            return trainable
        units = self._packs.units(trainable, self.state)
        if units is not None:
            return units
        self._under_way.unpack()
        if not anew or self._under_way.contexts:
            return trainable
        with torch.inference_mode(False), torch.no_grad():  # what is made here is trained later
            for group, _, parameter in trainable:
                self._start(group, parameter)
            return self._packs.form(trainable, self.state)

    @torch.no_grad()
    def _return(self, away: Excursion, *, keep: bool) -> None:
        away.end(self._under_way.samples if keep else None)
        self._drop_gathered()

    def _check_sample(self, train: bool, sample: int | None, temperature: float) -> None:
        if not (math.isfinite(temperature) and temperature >= 0) or (train and temperature != 1):
            raise FinetuneError(f"IVON: temperature is {temperature}, expected 1 when training, else finite and >= 0")
        if sample is not None and not 0 <= sample < (self.mc_samples if train else math.inf):
            raise FinetuneError(f"IVON: sample is {sample}, expected 0 to mc_samples - 1 = {self.mc_samples - 1}")

    def _check_sharding(self, trainable: list[Place]) -> None:
        if not any(is_sharded(parameter) for _, _, parameter in trainable):
            return
        if self._model is None:
            raise FinetuneError("IVON: the parameters are sharded; call `optimizer.bind(model)` after `fully_shard`")
        if self.noise == "per_process":
            raise FinetuneError("IVON: noise 'per_process' with sharded parameters; expected 'shared'")

    def _drop_gathered(self) -> None:
        if self._model is not None:
            drop_gathered(self._model)

    @torch.no_grad()
    def _leave(
        self, away: Excursion, units: Sequence[UnitPlace], train: bool, sample: int | None, temperature: float
    ) -> None:
        singles = [(group, at, unit) for group, at, unit in units if not isinstance(unit, Pack)]
        for group, _, parameter in singles:
            self._start(group, parameter)
        if train:
            self._under_way.begin_sample(singles)
        key, sign = self._key(train, sample)
        draw = Draw(self._generator, key, sign, temperature, self._decide_fusing(units))
        self._drop_gathered()
        away.begin(self.state, self._under_way.samples if train else {}, draw)

    def _key(self, train: bool, sample: int | None) -> tuple[int, int]:
        """The key of the noise of a sample, and its sign."""
        shared = self.param_groups[0]
        if not train:
            number = shared["predictions"] if sample is None else sample
            if sample is None:
                self._set_own("predictions", number + 1)
            return stream_key(shared["seed"], 0, number, purpose=PREDICT), 1
        chosen = self._under_way.contexts % self.mc_samples if sample is None else sample
        number = chosen // 2 if self.antithetic else chosen
        rank = process_rank() if self.noise == "per_process" else 0
        key = stream_key(shared["seed"], shared["draws"], number, purpose=TRAIN, rank=rank)
        return key, -1 if self.antithetic and chosen % 2 == 1 else 1

    def _trainable(self) -> Iterator[Place]:
        """Every trainable parameter with its group and its place in the stream of noise."""
        at = 0
        for group in self.param_groups:
            solve_prior(group, self.state)
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield group, at, parameter
                at += aligned(parameter.numel())

    def _decide_fusing(self, units: Sequence[UnitPlace]) -> bool:
        """Decided when the first sample is drawn: by then the weights are where they will be trained."""
        if self._fusing is None:
            tensors = [unit.hess if isinstance(unit, Pack) else local(unit) for *_, unit in units]
            self._fusing = decide(self.fused, tensors)
        return self._fusing

    def _start(self, group: Mapping[str, Any], parameter: Tensor) -> None:
        if not self.state[parameter]:
            refuse_foreign_sharding(parameter)
            zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            hess = torch.full_like(zeros, group["hess_init"])
            self.state[parameter] = {"step": 0, "momentum": zeros, "hess": hess, "hess_init_share": 1.0}

    def _set_own(self, key: str, value: int) -> None:
        for group in self.param_groups:
            group[key] = value

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; samples already averaged stay until the last of the step is in.

        After a step that was not taken (a gradient scaler saw an overflow), this gives up what it would have used.
        """
        if self._under_way.complete:
            if self._active is None:
                # what they belonged to is given up, as a step that a gradient scaler has skipped
                self._under_way = StepUnderWay(self.mc_samples)
            elif self._active == "train":
                self._drop_within()
        super().zero_grad(set_to_none)

    def _drop_within(self) -> None:
        """Inside a context, with earlier ones complete: an old habit that loses gradients, unless they are no loss."""
        lost = self._under_way.drop_averages(self._trainable())
        if lost and all_finite([local(gradient) for gradient in lost]):
            message = "IVON: zero_grad between two contexts of one step drops the gradients of the first; divide the "
            message += "loss and keep them, or set mc_samples if each context was meant to be another sample"
            warnings.warn(message, stacklevel=3)

    def discard(self) -> None:
        """Drops the sample and the gradients captured since the last step; the next step starts anew."""
        self._under_way = StepUnderWay(self.mc_samples)
        super().zero_grad()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Updates mean and curvature from the gradients of the contexts since the last step.

        A step whose gradients are not all finite changes neither mean, momentum, curvature nor step count; the groups'
        `skipped` counts it, and the next step draws other noise.

        Args:
            closure: zeroes the gradients, computes the loss, calls backward and returns the loss; called once per
                sample, inside the context (whether or not it enters it itself).

        Returns:
            The mean of the closure's losses; None without a closure.

        Raises:
            FinetuneError: no context since the last step, or not a multiple of mc_samples.
        """
        if self._only_initializes():
            return None
        loss = None if closure is None else self._run_closure(closure)
        self._check_contexts()
        trainable = list(self._trainable())
        units = self._units(trainable)
        work, kind = self._under_way.gather(units, products=self.noise == "per_process")
        if self.noise == "per_process":
            # every process takes part, also one whose parameters got no gradient
            work, finite = average_over_processes(work, trainable)
        else:
            finite = all_finite([gradient for _, _, gradient, _ in work])
            finite = agree(finite, [unit for *_, unit in units if isinstance(unit, Tensor)])
        if finite:
            apply_(work, self.state, kind, fusing=self._decide_fusing(units))
        else:
            self._set_own("skipped", self.param_groups[0]["skipped"] + 1)
        self._set_own("draws", self.param_groups[0]["draws"] + 1)
        self._under_way = StepUnderWay(self.mc_samples)
        return loss

    def _only_initializes(self) -> bool:
        """Whether torch.distributed.checkpoint steps with zero gradients and lr, only to make the state appear."""
        if self._under_way.contexts or self._active or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        trainable = list(self._trainable())
        if not all(parameter.grad is not None and not self.state.get(parameter) for _, _, parameter in trainable):
            return False
        for group, _, parameter in trainable:
            self._start(group, parameter)
        return True

    def _run_closure(self, closure: Callable[[], Any]) -> Any:
        losses = []
        for _ in range(self.mc_samples):
            with self.sampled_params(train=True):
                self._active = "closure"
                with torch.enable_grad():
                    losses.append(closure())
        if losses[0] is None:
            return None
        return losses[0] if len(losses) == 1 else sum(losses) / len(losses)

    def _check_contexts(self) -> None:
        if self._active is not None:
            raise FinetuneError("IVON: step inside sampled_params; leave the context first, it restores the mean")
        if not self._under_way.complete:
            seen = f"IVON: step after {self._under_way.contexts} contexts `with optimizer.sampled_params(train=True)`"
            raise FinetuneError(f"{seen}; expected {self.mc_samples}, or a multiple for micro-batches")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state: moved to the device of each parameter, always float32, never shared with the source.

        Raises:
            FinetuneError: a shape that differs from the parameter's.
        """
        present = [parameter for group in self.param_groups for parameter in group["params"]]
        check_shapes(state_dict, present)
        super().load_state_dict(state_dict)
        in_float32(state_dict, present, self.state)
        self._forget()
