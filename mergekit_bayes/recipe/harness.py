"""The section `lm_eval`: tasks of lm-eval-harness, in the harness' own words.

lm_eval: hellaswag
lm_eval: [arc_easy, hellaswag]
lm_eval: {tasks: [my_task], include_path: tasks, num_fewshot: 5, limit: 200}
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from mergekit_bayes.recipe import field
from mergekit_bayes.recipe.problem import refusal, show
from mergekit_bayes.recipe.spec import Spec, checked

__all__ = ["HarnessSpec", "harness_mapping"]


def _tasks(value: object) -> tuple[str, ...]:
    names = field.several(field.text)([value] if isinstance(value, str) else value)
    if not names:
        raise refusal("found no task; name at least one.")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise refusal(f"names {show(twice)} twice.")
    return names


def _limit(value: object) -> int | float | None:
    """Documents, or a share of them below one, as the harness takes it."""
    if value is None:
        return None
    found = field.positive(value)
    if found >= 1 and found != int(found):
        raise refusal(f"expected a whole number of documents, or a share of them below 1, found {show(value)}.")
    return int(found) if found >= 1 else found


def _template(value: object) -> bool | str:
    return field.text(value) if isinstance(value, str) else field.boolean(value)


class HarnessSpec(Spec):
    """Tasks of lm-eval-harness, and how they are asked; what is left out is as the harness has it.

    Attributes:
        tasks: names of tasks, groups or tags.
        num_fewshot: solved examples before each question; None for what the task says.
        limit: evaluate only so many documents of each task, or this share of them below one; None for all.
        include_path: folder with task files of your own.
        batch_size: requests in one forward pass; None for that of the recipe.
        max_length: tokens that are looked at; None for what the model has places for.
        apply_chat_template: whether prompts are written with the tokenizer's chat template, or the name of one of them.
        fewshot_as_multiturn: whether solved examples are turns of a conversation, with a chat template.
        system_instruction: what the conversation begins with; None for nothing.
        bootstrap_iters: resamples for standard errors that have no formula; 0 for no standard errors at all.
    """

    tasks: Annotated[tuple[str, ...], checked(_tasks)]
    num_fewshot: Annotated[int | None, checked(field.optional(field.integer(0)))] = None
    limit: Annotated[int | float | None, checked(_limit)] = None
    include_path: Annotated[str | None, checked(field.optional(field.text))] = None
    batch_size: Annotated[int | None, checked(field.optional(field.integer(1)))] = None
    max_length: Annotated[int | None, checked(field.optional(field.integer(1)))] = None
    apply_chat_template: Annotated[bool | str, checked(_template)] = False
    fewshot_as_multiturn: Annotated[bool, checked(field.boolean)] = True
    system_instruction: Annotated[str | None, checked(field.optional(field.text))] = None
    bootstrap_iters: Annotated[int, checked(field.integer(0))] = 1000

    def without_effect(self) -> frozenset[str]:
        """What only conversations have."""
        return frozenset() if self.apply_chat_template else frozenset({"fewshot_as_multiturn"})


def harness_mapping(value: object) -> object:
    """The section written out, also where it is only a task or a list of tasks."""
    if value is None or isinstance(value, HarnessSpec | Mapping):
        return value
    if isinstance(value, str | list | tuple):
        return {"tasks": value}
    raise refusal(f"expected a task, a list of tasks or a mapping with `tasks`, found {show(value)}.")
