"""Recipes: what the user asked for, as frozen data.

    load_recipe       a YAML file or a mapping -> the recipe of its kind, or one RecipeError with every problem in it
    MergeRecipe       the data of a merge; `setting` gives a parameter's value for one tensor
    FinetuneRecipe    the data of a fine-tuning run
    PrecisionRecipe   the data of a precision pass
    EvaluateRecipe    the data of an evaluation
    Recipe            what they share: `where` and `describe` name a value's place, `resolved` writes it all out
    unused_filters    filters that decide for no tensor, once the tensors' names are known
    layer_positions   where each tensor's layer stands between the first (0) and the last (1)
    dump_yaml         plain data -> YAML

Nothing here opens a checkpoint or data, and neither torch nor transformers is imported.
"""

from __future__ import annotations

from mergekit_bayes.recipe.document import Document, parse_document, read_document
from mergekit_bayes.recipe.dump import dump_yaml
from mergekit_bayes.recipe.evaluate import EvaluateRecipe
from mergekit_bayes.recipe.filters import unused_filter_problems
from mergekit_bayes.recipe.finetune import (
    AdamWSpec,
    AdapterSpec,
    DatasetSpec,
    DataSpec,
    FinetuneOutputSpec,
    FinetuneRecipe,
    IvonSpec,
    ModelSpec,
    TrainingSpec,
)
from mergekit_bayes.recipe.load import AnyRecipe, load_recipe
from mergekit_bayes.recipe.merge import MergeRecipe, OutputSpec, PrecisionSpec, SourceSpec
from mergekit_bayes.recipe.method_schema import MethodSchema, ParameterSchema
from mergekit_bayes.recipe.parameters import Parameters
from mergekit_bayes.recipe.precision import EstimatorChoice, PrecisionOutputSpec, PrecisionRecipe, PriorSpec
from mergekit_bayes.recipe.spec import Entries, Recipe
from mergekit_bayes.recipe.value import layer_positions, unused_filters, value_at

__all__ = [
    "AdamWSpec",
    "AdapterSpec",
    "AnyRecipe",
    "DataSpec",
    "DatasetSpec",
    "Document",
    "Entries",
    "EstimatorChoice",
    "EvaluateRecipe",
    "FinetuneOutputSpec",
    "FinetuneRecipe",
    "IvonSpec",
    "MergeRecipe",
    "MethodSchema",
    "ModelSpec",
    "OutputSpec",
    "ParameterSchema",
    "Parameters",
    "PrecisionOutputSpec",
    "PrecisionRecipe",
    "PrecisionSpec",
    "PriorSpec",
    "Recipe",
    "SourceSpec",
    "TrainingSpec",
    "dump_yaml",
    "layer_positions",
    "load_recipe",
    "parse_document",
    "read_document",
    "unused_filter_problems",
    "unused_filters",
    "value_at",
]
