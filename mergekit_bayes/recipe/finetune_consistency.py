"""What no single value of a fine-tuning recipe can show: keys that exclude, need or silence each other.

These checks look at the plain data, so that they are reported together with the faults of single values; a value that
is faulty itself is left to those who check it. No key is ever ignored: one that has no effect beside the others is a
problem.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mergekit_bayes.recipe.adapter import adapter_mapping
from mergekit_bayes.recipe.data import FORMAT_COLUMNS, dataset_mappings
from mergekit_bayes.recipe.model import model_mapping
from mergekit_bayes.recipe.optimizer import optimizer_mapping
from mergekit_bayes.recipe.problem import Problem, Refusal, format_path, one_of

_Mapping = Mapping[str, object]


@dataclass(frozen=True)
class _Sections:
    """The sections as mappings; one that is missing or faulty is empty. `full`: no adapter was asked for."""

    model: _Mapping
    adapter: _Mapping
    full: bool
    data: _Mapping
    train: Sequence[_Mapping]
    eval: Sequence[_Mapping]
    optimizer: _Mapping
    training: _Mapping
    output: _Mapping


def consistency_problems(data: _Mapping) -> list[Problem]:
    """Everything that is wrong between values of a fine-tuning recipe which may each be right."""
    sections = _sections(data)
    return [problem for check in _CHECKS for problem in check(sections)]


def data_problems(data: _Mapping) -> list[Problem]:
    """What is wrong between the values of the section `data`, in a recipe of any kind that has it."""
    sections = _sections(data)
    return [problem for check in _DATA_CHECKS for problem in check(sections)]


def bit_problems(data: _Mapping) -> list[Problem]:
    """What is wrong between the values of `model` that quantise it, in a recipe of any kind that has it."""
    return list(_bits(_sections(data)))


def _sections(data: _Mapping) -> _Sections:
    rows = _section(data.get("data"))
    return _Sections(
        model=_section(data.get("model"), model_mapping),
        adapter=_section(data.get("adapter"), adapter_mapping),
        full=data.get("adapter") is None,
        data=rows,
        train=_list(rows.get("train")),
        eval=_list(rows.get("eval")),
        optimizer=_section(data.get("optimizer"), optimizer_mapping),
        training=_section(data.get("training")),
        output=_section(data.get("output")),
    )


def _bits(s: _Sections) -> Iterator[Problem]:
    four, eight = _on(s.model, "load_in_4bit"), _on(s.model, "load_in_8bit")
    if four and eight:
        yield Problem(("model", "load_in_8bit"), "8 bits beside `load_in_4bit: true`; keep one of them.")
    for key in s.model:
        if str(key).startswith("bnb_4bit_") and not four:
            yield Problem(("model", key), "has no effect without `load_in_4bit: true`.", at_key=True)


def _trained_codes(s: _Sections) -> Iterator[Problem]:
    four, eight = _on(s.model, "load_in_4bit"), _on(s.model, "load_in_8bit")
    if (four or eight) and s.full:
        key = "load_in_4bit" if four else "load_in_8bit"
        yield Problem(("model", key), "quantised weights cannot be trained; add an `adapter`, or load them whole.")


def _float16(s: _Sections) -> Iterator[Problem]:
    if s.full and s.model.get("dtype") == "float16":
        what = "weights that are trained need more range than float16 has"
        yield Problem(("model", "dtype"), f"{what}; use float32, with `training.fp16: true` for speed, or bfloat16.")
    if _on(s.training, "bf16") and _on(s.training, "fp16"):
        yield Problem(("training", "fp16"), "float16 beside `bf16: true`; keep one of them.")


def _layers(s: _Sections) -> Iterator[Problem]:
    layers, pattern = s.adapter.get("layers_to_transform"), s.adapter.get("layers_pattern")
    if layers is None and pattern is not None:
        yield Problem(("adapter", "layers_pattern"), "has no effect without `layers_to_transform`.", at_key=True)
    if layers is not None and isinstance(s.adapter.get("target_modules", "all-linear"), str):
        needed = "needs `target_modules` as a list of names; PEFT takes no pattern beside it"
        yield Problem(("adapter", "layers_to_transform"), f"{needed}.", at_key=True)


def _held_out(s: _Sections) -> Iterator[Problem]:
    fraction, written = s.data.get("eval_fraction"), s.data.get("eval")
    if s.eval and fraction is not None:
        yield Problem(("data", "eval_fraction"), "held-out rows beside `eval`; keep one of them.")
    nothing = written is None or (isinstance(written, list | tuple) and not written)
    if nothing and fraction is None and s.training.get("eval_steps") is not None:
        yield Problem(("training", "eval_steps"), "nothing to evaluate on; set `data.eval` or `data.eval_fraction`.")
    for index, entry in enumerate(s.eval):
        if entry.get("weight") is not None:
            message = "a share of the training mixture; each held-out data set is evaluated by itself. Remove it."
            yield Problem(("data", "eval", index, "weight"), message, at_key=True)
        for other, trained in enumerate(s.train):
            if _rows(entry) is not None and _rows(entry) == _rows(trained):
                name = format_path(("data", "train", other))
                message = f"the rows of `{name}`; give another file or split, or `eval_fraction` instead of `eval`."
                yield Problem(("data", "eval", index, "path"), message)


def _mixture(s: _Sections) -> Iterator[Problem]:
    without = [index for index, entry in enumerate(s.train) if entry.get("weight") is None]
    if all(s.train) and without and len(without) < len(s.train):
        path = ("data", "train", without[0], "weight")
        yield Problem(path, "missing; give every data set a weight, or none, and every row counts once.")


def _repeated(s: _Sections) -> Iterator[Problem]:
    for index, entry in enumerate(s.train):
        first = next(other for other, earlier in enumerate(s.train) if other == index or _same(earlier, entry))
        if first < index:
            name = format_path(("data", "train", first))
            message = f"the same rows as `{name}`; list them once, with a larger `weight` if they count more."
            yield Problem(("data", "train", index), message)


def _formats(s: _Sections) -> Iterator[Problem]:
    task = s.model.get("task", "causal_lm")
    for split, entries in (("train", s.train), ("eval", s.eval)):
        for index, entry in enumerate(entries):
            path, format = ("data", split, index), entry.get("format")
            if not isinstance(format, str) or format not in FORMAT_COLUMNS:
                continue
            if format == "multiple_choice":
                message = "questions are evaluated, not learned; write right answers as `prompt_completion` rows."
                yield Problem((*path, "format"), message)
                continue
            if task == "causal_lm" and format == "labelled":
                message = "labels are learned with `model.task: sequence_classification`."
                yield Problem((*path, "format"), message)
            if task == "sequence_classification" and format != "labelled":
                yield Problem((*path, "format"), f"`model.task: {task}` learns from `labelled` rows.")
            for name in _section(entry.get("columns")):
                if name in _ALL_COLUMNS and name not in FORMAT_COLUMNS[format]:
                    known = one_of(FORMAT_COLUMNS[format], "and")
                    message = f"no column of the format `{format}`, which has {known}."
                    yield Problem((*path, "columns", name), message, at_key=True)


def _of_the_task(s: _Sections) -> Iterator[Problem]:
    if s.model.get("task", "causal_lm") == "causal_lm":
        if s.data.get("labels") is not None:
            message = "has no effect on `model.task: causal_lm`; labels are those of `sequence_classification`."
            yield Problem(("data", "labels"), message, at_key=True)
    elif s.model.get("task") == "sequence_classification":
        for key in ("packing", "chat_template"):
            if key in s.data and s.data[key] not in (None, False, 0):
                message = "has no use for `model.task: sequence_classification`; remove it."
                yield Problem(("data", key), message, at_key=True)


def _plain_text(s: _Sections) -> Iterator[Problem]:
    if not s.train or any(entry.get("format") != "text" for entry in s.train):
        return
    if "completion_only_loss" in s.data:
        message = "plain text has no completions, all of it is learned; remove it, or use `prompt_completion` rows."
        yield Problem(("data", "completion_only_loss"), message, at_key=True)
    if _on(s.data, "packing") and "long_rows" in s.data:
        yield Problem(("data", "long_rows"), "packed text is cut into rows that fit; remove it.", at_key=True)


def _ivon(s: _Sections) -> Iterator[Problem]:
    samples = s.optimizer.get("mc_samples", 1)
    if _on(s.optimizer, "antithetic") and isinstance(samples, int) and samples > 0 and samples % 2:
        key = "mc_samples" if "mc_samples" in s.optimizer else "antithetic"
        message = f"samples come in pairs; set an even `mc_samples`, found {samples}."
        yield Problem(("optimizer", key), message)
    for given, source in (("ess", "temperature"), ("hess_init", "noise_to_weight")):
        if s.optimizer.get(given) is not None and source in s.optimizer:
            message = f"has no effect beside `{given}`; remove one of them."
            yield Problem(("optimizer", source), message, at_key=True)
    if s.optimizer.get("noise") == "per_process" and _on(s.training, "fp16"):
        message = "each process would skip other steps with `training.fp16`; use bf16, or noise: shared."
        yield Problem(("optimizer", "noise"), message)


def _length(s: _Sections) -> Iterator[Problem]:
    steps, warmup = s.training.get("max_steps"), s.training.get("warmup_steps")
    # num_train_epochs may stand beside max_steps, which wins as in TrainingArguments: `--set` can shorten any run
    if isinstance(steps, int) and isinstance(warmup, int) and 0 < steps <= warmup:
        message = f"expected fewer steps than the run has ({steps}), found {warmup}."
        yield Problem(("training", "warmup_steps"), message)


def _schedule(s: _Sections) -> Iterator[Problem]:
    type_, options = s.training.get("lr_scheduler_type", "linear"), _section(s.training.get("lr_scheduler_kwargs"))
    warmup, path = s.training.get("warmup_steps"), ("training", "lr_scheduler_kwargs", "min_lr_rate")
    if type_ == "cosine_with_min_lr" and "min_lr_rate" not in options:
        yield Problem(path, "missing; `cosine_with_min_lr` ends at this share of `optimizer.lr`, such as 0.1.")
    elif type_ != "cosine_with_min_lr" and "min_lr_rate" in options:
        yield Problem(path, "has no effect without `lr_scheduler_type: cosine_with_min_lr`.", at_key=True)
    if type_ == "constant" and isinstance(warmup, int | float) and warmup > 0:
        message = "has no effect on `lr_scheduler_type: constant`; use `constant_with_warmup`."
        yield Problem(("training", "warmup_steps"), message, at_key=True)


def _checkpoints(s: _Sections) -> Iterator[Problem]:
    if s.training.get("save_total_limit") is not None and s.training.get("save_steps") is None:
        message = "has no effect without `save_steps`: no checkpoint is kept before the end."
        yield Problem(("training", "save_total_limit"), message, at_key=True)


def _sidecar(s: _Sections) -> Iterator[Problem]:
    adamw = s.optimizer.get("name") == "adamw"
    if adamw and s.output.get("precision", False) is not False:
        yield Problem(("output", "precision"), "AdamW leaves no precision behind; use `optimizer: ivon`, or false.")
    if "debias_precision" in s.output and (adamw or s.output.get("precision") is False):
        message = "has no effect where no precision is written; remove it."
        yield Problem(("output", "debias_precision"), message, at_key=True)


_DATA_CHECKS: tuple[Callable[[_Sections], Iterator[Problem]], ...] = (
    _mixture,
    _repeated,
    _formats,
    _of_the_task,
    _plain_text,
)

_CHECKS: tuple[Callable[[_Sections], Iterator[Problem]], ...] = (
    _bits,
    _trained_codes,
    _float16,
    _layers,
    _held_out,
    *_DATA_CHECKS,
    _ivon,
    _length,
    _schedule,
    _checkpoints,
    _sidecar,
)

_ALL_COLUMNS = frozenset(name for names in FORMAT_COLUMNS.values() for name in names)


def _section(raw: object, written_out: Callable[[object], object] = lambda raw: raw) -> _Mapping:
    try:
        mapping: Any = written_out(raw)
    except Refusal:
        return {}
    return mapping if isinstance(mapping, Mapping) else {}


def _list(raw: object) -> Sequence[_Mapping]:
    try:
        return [entry if isinstance(entry, Mapping) else {} for entry in dataset_mappings(raw)]
    except Refusal:
        return []


def _on(section: _Mapping, key: str) -> bool:
    value = section.get(key)
    return isinstance(value, bool | int | float) and value == 1


def _rows(entry: _Mapping) -> tuple[object, ...] | None:
    """Which rows a data set is; None where its path is faulty."""
    return (entry["path"], entry.get("name"), entry.get("split", "train")) if "path" in entry else None


def _same(one: _Mapping, other: _Mapping) -> bool:
    """Whether two data sets read the same of the same rows."""
    how = [(entry.get("format"), entry.get("columns")) for entry in (one, other)]
    return _rows(one) is not None and _rows(one) == _rows(other) and how[0] == how[1]
