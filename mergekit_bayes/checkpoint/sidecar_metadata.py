"""What the numbers in a precision sidecar mean: their origin, their unit, and which weights they describe."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields

from mergekit_bayes.checkpoint.files import brief, parse_json_object, shown
from mergekit_bayes.errors import CheckpointError

METADATA_KEY = "mergekit_bayes"
"""Key in the safetensors header under which the one JSON string stands."""

FORMAT = "mergekit_bayes.precision"
VERSION = 1
FAMILIES = ("isotropic", "diagonal", "kronecker", "mixture")
SUPPORTED_FAMILIES = ("diagonal", "kronecker")

SPACES = ("factor", "product", "full")


@dataclass(frozen=True, kw_only=True)
class SidecarMetadata:
    """The metadata of a sidecar.

    With N training units, `ess` and `weight_decay` as in IVON: precision = N (hess + weight_decay), of
    which the prior's share is prior_precision = N weight_decay. The posterior sampled in training was the
    precision over N / ess.

    Attributes:
        family: shape of the posterior: `diagonal`, or `kronecker`, which has factors for linear layers and diagonals
            for the rest.
        estimator: what estimated the precision, such as `ivon` or `fisher`; `merged` for the result of a
            merge.
        space: `factor` if the tensors described are adapter factors, `full` if they are weights, `product` if they
            are the updates dW of an adapter, as (out, in), of embeddings as (words, length), by the names of the
            base's weights.
        mean_fingerprint: fingerprint of the checkpoint or adapter described.
        loss_unit: what N counts, `token` or `example`; None if sources of a merge counted differently.
        num_examples: N, the number of training units the loss is summed over.
        ess: effective sample size.
        weight_decay: L2 rate of the mean loss.
        prior_precision: the prior's share of every precision; None if it is a tensor (the base's own
            sidecar).
        prior_mean: what the prior is centred on, `base` or `zero`.
        hess_init: initial curvature.
        beta2: decay of the curvature average.
        steps: optimizer steps taken.
        batch_size: training units per step.
        debiased: whether the initial curvature's share was removed.
        adapter_scaling: s in dW = s B A while training, if the same for all modules; the prior of B is meant at
            this scaling, also where a merge has baked another one into B.
        scale: `sum`: the loss is summed over the N units, prior included once.
        base_model: name of the base.
        base_fingerprint: fingerprint of the base.
        format: always `mergekit_bayes.precision`.
        version: of this format.

    Raises:
        CheckpointError: any value that the above does not allow, all of them in one message.
    """

    family: str
    estimator: str
    space: str
    mean_fingerprint: str
    loss_unit: str | None = None
    num_examples: int | None = None
    ess: float | None = None
    weight_decay: float | None = None
    prior_precision: float | None = None
    prior_mean: str = "base"
    hess_init: float | None = None
    beta2: float | None = None
    steps: int | None = None
    batch_size: int | None = None
    debiased: bool = False
    adapter_scaling: float | None = None
    scale: str = "sum"
    base_model: str | None = None
    base_fingerprint: str | None = None
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        faults = _faults(asdict(self))
        if faults:
            raise CheckpointError(f"sidecar metadata: {'; '.join(faults)}")

    def to_json(self) -> str:
        """Returns the metadata as JSON with sorted keys: equal metadata, equal bytes."""
        return json.dumps(asdict(self), sort_keys=True, allow_nan=False, separators=(",", ":"))

    def to_metadata(self) -> dict[str, str]:
        """Returns the strings for the header of a sidecar file."""
        return {METADATA_KEY: self.to_json()}

    @classmethod
    def from_json(cls, text: str, *, where: str) -> SidecarMetadata:
        """Reads metadata strictly.

        Args:
            text: what `to_json` wrote.
            where: the file, as messages name it.

        Raises:
            CheckpointError: not JSON, another format or version, unknown or missing keys, or invalid values.
        """
        values = parse_json_object(text.encode(errors="surrogatepass"), f"{where}: metadata {METADATA_KEY}")
        if values.get("format") != FORMAT:
            raise CheckpointError(f"{where}: its format is {brief(values.get('format'))}; expected {FORMAT}")
        if values.get("version") != VERSION:
            seen = f"{where}: its version is {brief(values.get('version'))}"
            raise CheckpointError(f"{seen}; expected {VERSION}; a newer version of this software may have written it")
        faults = _key_faults(values) or _faults(values)
        if faults:
            raise CheckpointError(f"{where}: sidecar metadata: {'; '.join(faults)}")
        return cls(**values)  # type: ignore[arg-type]  # checked just above


Check = Callable[[object], bool]


def _one_of(*allowed: str) -> Check:
    return lambda value: isinstance(value, str) and value in allowed


def _whole(minimum: int) -> Check:
    return lambda value: type(value) is int and value >= minimum


def _number(minimum: float, *, maximum: float = sys.float_info.max) -> Check:
    def check(value: object) -> bool:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and minimum <= value <= maximum  # type: ignore[operator]

    return check


def _matching(pattern: str) -> Check:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _optional(check: Check) -> Check:
    return lambda value: value is None or check(value)


_FINGERPRINT = _matching(r"blake2b-16:[0-9a-f]{32}")
_POSITIVE, _NOT_NEGATIVE = _number(sys.float_info.min), _number(0.0)
_NUMBER_TEXT, _FINGERPRINT_TEXT = "a finite number >= 0 or null", "blake2b-16: and 32 hexadecimal digits"

_RULES: Mapping[str, tuple[Check, str]] = {
    "format": (_one_of(FORMAT), FORMAT),
    "version": (lambda value: type(value) is int and value == VERSION, str(VERSION)),
    "family": (_one_of(*SUPPORTED_FAMILIES), "diagonal or kronecker (the families this version reads)"),
    "estimator": (_matching(r"[a-z][a-z0-9_]{0,63}"), "a name of lower-case letters, digits and _"),
    "space": (_one_of(*SPACES), "factor, product or full"),
    "mean_fingerprint": (_FINGERPRINT, _FINGERPRINT_TEXT),
    "loss_unit": (_optional(_one_of("token", "example")), "token, example or null"),
    "num_examples": (_optional(_whole(1)), "a whole number >= 1 or null"),
    "ess": (_optional(_POSITIVE), "a finite number > 0 or null"),
    "weight_decay": (_optional(_NOT_NEGATIVE), _NUMBER_TEXT),
    "prior_precision": (_optional(_NOT_NEGATIVE), _NUMBER_TEXT),
    "prior_mean": (_one_of("base", "zero"), "base or zero"),
    "hess_init": (_optional(_NOT_NEGATIVE), _NUMBER_TEXT),
    "beta2": (_optional(_number(0.0, maximum=1.0)), "a number from 0 to 1 or null"),
    "steps": (_optional(_whole(0)), "a whole number >= 0 or null"),
    "batch_size": (_optional(_whole(1)), "a whole number >= 1 or null"),
    "debiased": (lambda value: isinstance(value, bool), "true or false"),
    "adapter_scaling": (_optional(_POSITIVE), "a finite number > 0 or null"),
    "scale": (_one_of("sum"), "sum"),
    "base_model": (_optional(lambda value: isinstance(value, str)), "a text or null"),
    "base_fingerprint": (_optional(_FINGERPRINT), f"{_FINGERPRINT_TEXT}, or null"),
}


def _faults(values: Mapping[str, object]) -> list[str]:
    faults = [
        f"{key} is {brief(value)}, expected {_RULES[key][1]}"
        for key, value in sorted(values.items())
        if not _RULES[key][0](value)
    ]
    if values["family"] == "kronecker" and values["space"] == "factor":
        faults.append("space is factor, expected product or full for the family kronecker")
    return faults


def _key_faults(values: Mapping[str, object]) -> list[str]:
    known = {field.name for field in fields(SidecarMetadata)}
    required = {"family", "estimator", "space", "mean_fingerprint"}
    faults = [f"{key} is missing" for key in sorted(required - values.keys())]
    for key in sorted(values.keys() - known):
        near = difflib.get_close_matches(key, sorted(known), n=1)
        faults.append(f"{shown(key)} is unknown{f'; did you mean {near[0]}?' if near else ''}")
    return faults
