"""Everything a run consists of, made from its recipe: model, data, optimizer, and how long it will take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mergekit_bayes.checkpoint.files import listed
from mergekit_bayes.data import load_training_data, misfit, packing_fault
from mergekit_bayes.errors import FinetuneError
from mergekit_bayes.finetune.checkpoints import Checkpoint
from mergekit_bayes.finetune.engine import loading_device, shard, shards
from mergekit_bayes.finetune.feed import Feed
from mergekit_bayes.finetune.ivon import IVON
from mergekit_bayes.finetune.monitor import Monitor
from mergekit_bayes.finetune.optimizers import Start, build_optimizer, starting_point
from mergekit_bayes.finetune.schedule import RunLength, run_length
from mergekit_bayes.finetune.state import Identity
from mergekit_bayes.model import checkpoint_gradients, load_for_training, saved_parameters
from mergekit_bayes.model.base_identity import open_base
from mergekit_bayes.model.tokens import load_tokenizer

if TYPE_CHECKING:
    from accelerate import Accelerator

    from mergekit_bayes.data import TrainingData
    from mergekit_bayes.data.read import Tables
    from mergekit_bayes.model import LoadedModel
    from mergekit_bayes.recipe.finetune import FinetuneRecipe, TrainingSpec

__all__ = ["Setup", "check_agreement", "prepare", "without_cache"]


@dataclass(frozen=True)
class Setup:
    """A run that has not begun.

    Attributes:
        recipe: what was asked for.
        accelerator: device, precision, processes.
        loaded: model, tokenizer and base.
        data: rows to train on and rows held out.
        parameters: trainable ones, by the name they have in the file that is saved.
        optimizer: of these.
        start: of IVON; None for other optimizers.
        monitor: of IVON; None for other optimizers.
        feed: deals the rows.
        length: steps.
        identity: what its checkpoints belong to.
    """

    recipe: FinetuneRecipe
    accelerator: Accelerator
    loaded: LoadedModel
    data: TrainingData
    parameters: Mapping[str, torch.Tensor]
    optimizer: torch.optim.Optimizer
    start: Start | None
    monitor: Monitor | None
    feed: Feed
    length: RunLength
    identity: Identity

    @property
    def sharded(self) -> bool:
        """Whether the model is spread over the processes, so that all of them take part in reading it."""
        return shards(self.accelerator)

    def going_on(self, checkpoint: Checkpoint | None) -> Setup:
        """Returns the run with the starting values it had when it began, whatever the recipe would give now."""
        if checkpoint is None or self.start is None:
            return self
        start = checkpoint.state["identity"]["start"]
        return replace(self, start=Start(**start), identity=replace(self.identity, start=start))


def prepare(
    recipe: FinetuneRecipe, accelerator: Accelerator, *, recipe_dir: Path | None, tables: Tables | None = None
) -> Setup:
    """Loads everything.

    Args:
        recipe: what was asked for.
        accelerator: from `make_accelerator`.
        recipe_dir: folder that relative paths are tried from after the current one.
        tables: data sets in memory, by the path that stands for them in the recipe.

    Raises:
        MergekitBayesError: model, data or options do not fit; nothing was written.
    """
    training = recipe.training
    folder = open_base(recipe.model.path, recipe_dir=recipe_dir)[0].folder
    # before the model: a classification head needs the labels of the data
    tokenizer = load_tokenizer(folder, reference=recipe.model.path)
    data = load_training_data(recipe.data, tokenizer, task=recipe.model.task, recipe_dir=recipe_dir, tables=tables)
    loaded = load_for_training(
        recipe.model,
        recipe.adapter,
        labels=data.labels,
        seed=training.seed,
        device=loading_device(accelerator),
        recipe_dir=recipe_dir,
        training_dtype=torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None,
    )
    if data.chat_template is not None:
        loaded.tokenizer.chat_template = data.chat_template
    if training.gradient_checkpointing:
        checkpoint_gradients(loaded.model)
    check_fit(recipe, loaded, data)
    feed = _feed(recipe, loaded, data, accelerator)
    if shards(accelerator):
        shard(accelerator, loaded.model)
    return _assemble(recipe, accelerator, loaded, data, feed)


def _assemble(
    recipe: FinetuneRecipe, accelerator: Accelerator, loaded: LoadedModel, data: TrainingData, feed: Feed
) -> Setup:
    training = recipe.training
    length = run_length(
        rows=len(data.train),
        global_batch=feed.global_batch,
        num_train_epochs=training.num_train_epochs,
        max_steps=training.max_steps,
    )
    units = feed.units(length.steps, length.steps_per_epoch)
    parameters = saved_parameters(loaded.model)
    start = None
    if recipe.optimizer.name == "ivon":
        start = starting_point(recipe.optimizer, list(parameters.values()), units_seen=units, steps=length.steps)
    optimizer = build_optimizer(
        recipe.optimizer,
        parameters.values(),
        start=start,
        seed=training.seed,
        batch_units=units / length.steps,
    )
    resume = training.resume_from_checkpoint
    identity = Identity(
        recipe=recipe.resolved(),
        base=loaded.base.fingerprint,
        data=data.train.fingerprint,
        global_batch=feed.global_batch,
        origin=resume if isinstance(resume, str) else None,
        start={} if start is None else asdict(start),
    )
    monitor = None
    if isinstance(optimizer, IVON):
        if shards(accelerator):
            optimizer.bind(loaded.model)
        monitor = Monitor(optimizer)
    return Setup(recipe, accelerator, loaded, data, parameters, optimizer, start, monitor, feed, length, identity)


def check_agreement(accelerator: Accelerator, identity: Identity, step: int) -> None:
    """Makes sure that all processes have the same data, base and checkpoint before them.

    Args:
        accelerator: connects the processes.
        identity: of the run, as this process sees it.
        step: of the checkpoint it begins from; 0 for the start.

    Raises:
        FinetuneError: they do not, as on machines whose folders are not the same.
    """
    if accelerator.num_processes == 1:
        return
    from accelerate.utils import gather_object

    own = {"training rows": identity.data, "weights of the base": identity.base, "step to begin from": step}
    everybody: list[dict[str, object]] = gather_object([own])
    for name, value in own.items():
        seen = [str(each[name]) for each in everybody]
        if any(each[name] != value for each in everybody):
            raise FinetuneError(
                f"processes of one run differ in {name}: {listed(seen)}; expected the same everywhere: data, model and "
                "output on a file system that all of them share, or equal copies"
            )


def check_fit(recipe: FinetuneRecipe, loaded: LoadedModel, data: TrainingData) -> None:
    """Makes sure that data, model and options can work together.

    Raises:
        FinetuneError: a token or a position the model has no place for, or weights that loss scaling cannot train.
    """
    everything = (data.train, *data.eval.values())
    fault = misfit(
        recipe.model.path,
        largest_token=max(rows.largest_token for rows in everything),
        longest=max(int(rows.lengths.max(initial=0)) for rows in everything),
        vocabulary=loaded.vocabulary,
        longest_row=loaded.longest_row,
    )
    if fault is not None:
        raise FinetuneError(fault)
    trained = {parameter.dtype for parameter in loaded.model.parameters() if parameter.requires_grad}
    if recipe.training.fp16 and trained != {torch.float32}:
        raise FinetuneError("training.fp16: the loss is scaled for weights in float32; set `model.dtype: float32`")


def _feed(recipe: FinetuneRecipe, loaded: LoadedModel, data: TrainingData, accelerator: Accelerator) -> Feed:
    training = recipe.training
    flatten = data.train.packed and "flash" in (recipe.model.attn_implementation or "")
    if data.train.packed:
        fault = packing_fault(loaded.model, vocabulary=data.train.largest_token + 1, flatten=flatten)
        if fault is not None:
            raise FinetuneError(f"data.packing: {recipe.model.path} cannot train on packed rows: {fault}")
    pad = loaded.tokenizer.pad_token_id
    return Feed(
        rows=data.train,
        pad_token_id=0 if pad is None else pad,
        seed=_data_seed(training),
        batch_size=training.per_device_train_batch_size,
        accumulation=training.gradient_accumulation_steps,
        rank=accelerator.process_index,
        world=accelerator.num_processes,
        workers=training.dataloader_num_workers,
        flatten=flatten,
    )


def _data_seed(training: TrainingSpec) -> int:
    return training.seed if training.data_seed is None else training.data_seed


@contextmanager
def without_cache(model: Any) -> Iterator[None]:
    """Keeps a model from collecting keys and values for a generation that does not come."""
    config = model.config
    before = getattr(config, "use_cache", None)
    if before is not None:
        config.use_cache = False
    try:
        yield
    finally:
        if before is not None:
            config.use_cache = before
