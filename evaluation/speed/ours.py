"""One merge of this library, timed from inside: planning and carrying out, without Python's own start-up.

    python -m evaluation.speed.ours RECIPE OUT compile|no-compile

The merge runs twice in the process. What the first takes longer than the second is the compiler; the second
is the time reported. Prints one JSON object.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

from mergekit_bayes.merge.plan import plan_merge
from mergekit_bayes.merge.run import run_merge
from mergekit_bayes.merge.schemas import method_schemas
from mergekit_bayes.recipe.load import load_recipe
from mergekit_bayes.recipe.merge import MergeRecipe


def timed(recipe: Path, out: Path, *, compile_kernel: bool) -> dict[str, float]:
    """Plan, merge and publish; then remove the output.

    Args:
        recipe: path of the recipe.
        out: output folder.
        compile_kernel: whether the arithmetic goes through torch.compile.

    Returns:
        Seconds, and the bytes of weights and precisions read and written.
    """
    start = time.perf_counter()
    plan = plan_merge(load_recipe(recipe, expect=MergeRecipe, methods=method_schemas()), out, recipe_dir=recipe.parent)
    planned = time.perf_counter()
    run_merge(plan, compile=compile_kernel)
    end = time.perf_counter()
    shutil.rmtree(out)
    return {
        "seconds": end - start,
        "planning_seconds": planned - start,
        "bytes_read": plan.bytes_read,
        "bytes_written": plan.bytes_written,
    }


if __name__ == "__main__":
    import torch  # noqa: F401  its import belongs to start-up, not to the first merge

    arguments = Path(sys.argv[1]), Path(sys.argv[2])
    first = timed(*arguments, compile_kernel=sys.argv[3] == "compile")
    second = timed(*arguments, compile_kernel=sys.argv[3] == "compile")
    print(json.dumps({**second, "first_seconds": first["seconds"]}))
