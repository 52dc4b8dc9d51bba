"""IVON as a torch optimizer: a mean and a curvature for every weight, at about the price of AdamW."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor
from torch.optim import Optimizer

from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.ivon.noise import PREDICT, TRAIN, KeyedNoise, stream_key
from mergekit_bayes.finetune.ivon.options import check_group
from mergekit_bayes.finetune.ivon.reduction import average_over_processes, process_rank
from mergekit_bayes.finetune.ivon.update import Coefficients, blocks, hess_floor, perturb_, update_

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

    All options can differ between parameter groups except seed, mc_samples, antithetic and noise.

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
    ) -> None:
        if mc_samples < 1 or (antithetic and mc_samples % 2):
            wanted = "an even number" if antithetic else "1 or more"
            raise FinetuneError(f"IVON: mc_samples is {mc_samples}, expected {wanted}")
        if noise not in ("shared", "per_process"):
            raise FinetuneError(f"IVON: noise is {noise!r}, expected 'shared' or 'per_process'")
        self.mc_samples, self.antithetic, self.noise = mc_samples, antithetic, noise
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
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        own = {"mc_samples": self.mc_samples, "antithetic": self.antithetic, "noise": self.noise}
        return {**super().__getstate__(), **own}

    def _forget(self) -> None:
        """Drops everything that belongs to the step under way."""
        self._generator = KeyedNoise()
        self._active: str | None = None
        self._contexts = 0
        self._noise: dict[Tensor, Tensor] = {}
        self._sums: dict[Tensor, Tensor] = {}
        self._products: dict[Tensor, Tensor] = {}
        self._norms: dict[Tensor, Tensor] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds parameters; their curvature starts at h0.

        Raises:
            FinetuneError: an option out of range.
        """
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        if "solved_weight_decay" not in param_group or len(self.param_groups) > 1:
            group["solved_weight_decay"] = group["weight_decay"]
        group.update({key: self.param_groups[0][key] for key in _OWN})
        try:
            check_group(group)
        except FinetuneError:
            self.param_groups.pop()
            raise

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
        self._active = "train" if train else "predict"
        means: dict[Tensor, Tensor] = {}
        try:
            self._perturb(means, train, sample, temperature)
            yield
        finally:
            with torch.no_grad():
                for parameter, mean in means.items():
                    parameter.copy_(mean)
            self._active = None
        # reached only without an exception: a sample that failed counts for nothing
        if train:
            self._contexts += 1
            if self.mc_samples > 1:
                self._capture()

    def _check_sample(self, train: bool, sample: int | None, temperature: float) -> None:
        if not (math.isfinite(temperature) and temperature >= 0) or (train and temperature != 1):
            raise FinetuneError(f"IVON: temperature is {temperature}, expected 1 when training, else finite and >= 0")
        if sample is not None and not 0 <= sample < (self.mc_samples if train else math.inf):
            raise FinetuneError(f"IVON: sample is {sample}, expected 0 to mc_samples - 1 = {self.mc_samples - 1}")

    @torch.no_grad()
    def _perturb(self, means: dict[Tensor, Tensor], train: bool, sample: int | None, temperature: float) -> None:
        shared = self.param_groups[0]
        if train:
            chosen = self._contexts % self.mc_samples if sample is None else sample
            number = chosen // 2 if self.antithetic else chosen
            rank = process_rank() if self.noise == "per_process" else 0
            key = stream_key(shared["seed"], shared["draws"], number, purpose=TRAIN, rank=rank)
            negate = self.antithetic and chosen % 2 == 1
        else:
            number = shared["predictions"] if sample is None else sample
            key, negate = stream_key(shared["seed"], 0, number, purpose=PREDICT), False
            if sample is None:
                self._set_own("predictions", number + 1)
        lists: dict[tuple[float, float, torch.device], list[list[Tensor]]] = {}
        for group, index, parameter in self._trainable():
            self._start(group, parameter)
            z = self._noise.get(parameter) if train else None
            if z is None:
                z = self._generator.normal(parameter, key, index)
                if negate:
                    z.neg_()
                if train:
                    self._noise[parameter] = z
            if train and parameter.grad is not None and parameter.grad is self._sums.get(parameter):
                parameter.grad = None
            means[parameter] = parameter.detach().clone()
            where = (math.sqrt(temperature / group["ess"]), group["weight_decay"], parameter.device)
            tensors = lists.setdefault(where, [[], [], []])
            for each, tensor in zip(tensors, (parameter.detach(), self.state[parameter]["hess"], z), strict=True):
                each.append(tensor)
        for (scale, weight_decay, _), tensors in lists.items():
            for mean, hess, noise in blocks(tensors):
                perturb_(mean, hess, noise, scale=scale, weight_decay=weight_decay)

    def _trainable(self) -> Iterator[tuple[dict[str, Any], int, Tensor]]:
        """Every trainable parameter with its group and its index, which names its noise."""
        index = 0
        for group in self.param_groups:
            self._solve_prior(group)
            for parameter in group["params"]:
                if parameter.requires_grad:
                    yield group, index, parameter
                index += 1

    def _start(self, group: Mapping[str, Any], parameter: Tensor) -> None:
        if not self.state[parameter]:
            zeros = torch.zeros_like(parameter, dtype=torch.float32, requires_grad=False)
            hess = torch.full_like(zeros, group["hess_init"])
            self.state[parameter] = {"step": 0, "momentum": zeros, "hess": hess, "hess_init_share": 1.0}

    def _solve_prior(self, group: dict[str, Any]) -> None:
        """After a change of weight_decay: keeps h, the data's share; where it is negative, keeps h + delta if lower."""
        delta = group["weight_decay"]
        if delta == group["solved_weight_decay"]:
            return
        check_group(group)
        kept, old = 0, group["solved_weight_decay"]
        for parameter in group["params"]:
            if delta < old and self.state.get(parameter):
                hess = self.state[parameter]["hess"]
                kept += int((hess < 0).sum())
                hess.copy_(torch.where(hess < 0, hess + (old - delta), hess)).clamp_(min=hess_floor(delta))
        if kept:
            message = f"IVON: weight_decay changed from {old} to {delta}; {kept} weights of negative curvature keep "
            warnings.warn(message + "the precision they had", stacklevel=4)
        group["solved_weight_decay"] = delta

    def _set_own(self, key: str, value: int) -> None:
        for group in self.param_groups:
            group[key] = value

    @torch.no_grad()
    def _capture(self) -> None:
        """With several samples: forms noise * gradient of this one and adds both to the averages."""
        for group, _, parameter in self._trainable():
            z, gradient = self._noise.get(parameter), parameter.grad
            if z is None or gradient is None:
                continue
            gradient = gradient.detach()
            product = self._product(group, z, gradient).mul_(1 / self.mc_samples)
            if parameter in self._sums:
                self._products[parameter].add_(product)
                self._sums[parameter].add_(gradient, alpha=1 / self.mc_samples)
            else:
                self._products[parameter] = product
                self._sums[parameter] = gradient.mul(1 / self.mc_samples)
            parameter.grad = self._sums[parameter]
        self._noise.clear()
        for parameter, total in self._sums.items():
            parameter.grad = total
            self._norms[parameter] = torch.linalg.vector_norm(total, dtype=torch.float32)

    @staticmethod
    def _product(group: Mapping[str, Any], z: Tensor, gradient: Tensor) -> Tensor:
        """Noise times gradient, or the curvature estimate of `gradsq`; overwrites the noise."""
        if group["hess_approx"] == "gradsq":
            return z.copy_(gradient).square_().mul_(group["batch_size"])
        return z.mul_(gradient)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients; samples of this step that were already averaged stay."""
        if self._active == "train" and self._contexts and self.mc_samples == 1 and self._has_gradients():
            message = "IVON: zero_grad between two contexts of one step drops the gradients of the first; divide the "
            message += "loss and keep them, or set mc_samples if each context was meant to be another sample"
            warnings.warn(message, stacklevel=2)
        for parameter, total in self._sums.items():
            if parameter.grad is total:
                parameter.grad = None
        super().zero_grad(set_to_none)

    def _has_gradients(self) -> bool:
        return any(parameter.grad is not None for parameter in self._noise)

    def discard(self) -> None:
        """Drops the sample and the gradients captured since the last step; the next step starts anew."""
        generator = self._generator
        self._forget()
        self._generator = generator
        self.zero_grad()

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
        loss = None if closure is None else self._run_closure(closure)
        self._check_contexts()
        work = self._gather()
        if self.noise == "per_process":
            # every process takes part, also one whose parameters got no gradient
            work, finite = average_over_processes(
                work, [(group, parameter) for group, _, parameter in self._trainable()]
            )
        else:
            finite = _all_finite([gradient for _, _, gradient, _ in work])
        if finite:
            self._update(work)
        else:
            self._set_own("skipped", self.param_groups[0]["skipped"] + 1)
        self._set_own("draws", self.param_groups[0]["draws"] + 1)
        generator = self._generator
        self._forget()
        self._generator = generator
        return loss

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
        if self._contexts == 0 or self._contexts % self.mc_samples:
            seen = f"IVON: step after {self._contexts} contexts `with optimizer.sampled_params(train=True)`"
            raise FinetuneError(f"{seen}; expected {self.mc_samples}, or a multiple for micro-batches")

    @torch.no_grad()
    def _gather(self) -> list[tuple[dict[str, Any], Tensor, Tensor, Tensor]]:
        """Group, parameter, gradient and product of everything that has a gradient."""
        work = []
        for group, _, parameter in self._trainable():
            if self.mc_samples > 1:
                if parameter not in self._sums:
                    continue
                gradient, product = self._sums[parameter], self._products[parameter]
                if parameter.grad is gradient:
                    # what clipping or unscaling did to the averaged gradient since, done to the products
                    ratio = torch.linalg.vector_norm(gradient, dtype=torch.float32) / self._norms[parameter]
                    ratio = torch.where(self._norms[parameter] > 0, ratio, torch.ones_like(ratio))
                    product.mul_(ratio.square() if group["hess_approx"] == "gradsq" else ratio)
            else:
                if parameter.grad is None:
                    continue
                if parameter not in self._noise:
                    raise FinetuneError("IVON: a parameter became trainable between the context and the step")
                gradient = parameter.grad.detach()
                product = self._product(group, self._noise.pop(parameter), gradient)
            if gradient.layout != torch.strided:
                raise FinetuneError("IVON: sparse gradients have no noise * gradient; use a dense embedding")
            work.append((group, parameter, gradient, product))
        return work

    @torch.no_grad()
    def _update(self, work: list[tuple[dict[str, Any], Tensor, Tensor, Tensor]]) -> None:
        parts: dict[tuple[Any, ...], list[list[Tensor]]] = {}
        groups: dict[int, dict[str, Any]] = {}
        for group, parameter, gradient, product in work:
            state = self.state[parameter]
            state["step"] += 1
            state["hess_init_share"] *= group["beta2"]
            groups[id(group)] = group
            lists = parts.setdefault((id(group), parameter.device, state["step"]), [[], [], [], [], []])
            row = (parameter.detach(), state["momentum"], state["hess"], gradient, product)
            for tensors, tensor in zip(lists, row, strict=True):
                tensors.append(tensor)
        for (which, _, count), lists in parts.items():
            coefficients = _coefficients(groups[which], count)
            for means, momenta, hess, gradients, products in blocks(lists):
                update_(means, momenta, hess, gradients, products, coefficients=coefficients)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads a state: moved to the device of each parameter, always float32, never shared with the source.

        Raises:
            FinetuneError: a shape that differs from the parameter's.
        """
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        present = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, present, strict=False):
            hess = state_dict["state"].get(index, {}).get("hess")
            if hess is not None and hess.shape != parameter.shape:
                seen = f"{tuple(hess.shape)}, the parameter {tuple(parameter.shape)}"
                raise FinetuneError(f"IVON: state of parameter {index} has the shape {seen}")
        super().load_state_dict(state_dict)
        for index, parameter in zip(saved, present, strict=True):
            for key in ("momentum", "hess"):
                if index in state_dict["state"]:
                    # torch has cast it to the dtype of the parameter: from the source again
                    tensor = cast("Tensor", state_dict["state"][index][key])
                    self.state[parameter][key] = tensor.detach().to(parameter.device, torch.float32, copy=True)
        self._forget()


def _coefficients(group: Mapping[str, Any], count: int) -> Coefficients:
    rescale = group["hess_init"] + group["weight_decay"] if group["rescale_lr"] else 1.0
    return Coefficients(
        ess=group["ess"],
        weight_decay=group["weight_decay"],
        beta1=group["beta1"],
        beta2=group["beta2"],
        step_size=float(group["lr"]) * rescale,
        clip_radius=group["clip_radius"],
        bias_correction=1 - group["beta1"] ** count if group["debias"] else 1.0,
        squares=group["hess_approx"] == "gradsq",
    )


def _all_finite(tensors: list[Tensor]) -> bool:
    """One pass over the tensors and one synchronisation per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel():
            by_device.setdefault(tensor.device, []).append(tensor)
    extremes = []
    for device, each in by_device.items():
        if device.type == "cpu":  # seven times as fast there as the norm
            extremes.append(torch.stack([value.float() for t in each for value in torch.aminmax(t)]))
        else:
            extremes.append(torch.stack([value.float() for value in torch._foreach_norm(each, math.inf)]))
    return all(bool(torch.isfinite(values).all()) for values in extremes)
