"""Merge methods as recipes see them; like the registered ones, but fixed, so that messages stay what they are."""

from __future__ import annotations

from mergekit_bayes.recipe import MethodSchema, ParameterSchema

METHODS = (
    MethodSchema("linear", base="unused", parameters=(ParameterSchema("normalize", bool, True),)),
    MethodSchema(
        "task_arithmetic",
        parameters=(
            ParameterSchema("normalize", bool, False),
            ParameterSchema("lambda", float, 1.0, minimum=-10, maximum=10),
            ParameterSchema("density", float, 1.0, only=1.0, per_source=True, help="1 keeps all"),
        ),
    ),
    MethodSchema("gradient_matching"),
    MethodSchema("hessian_weighted", aliases=("fisher",), base="unused"),
    MethodSchema(
        "tuned",
        parameters=(
            ParameterSchema("steps", int, 3, minimum=1),
            ParameterSchema("mode", str, "fast"),
            ParameterSchema("rate", float),
        ),
    ),
)
