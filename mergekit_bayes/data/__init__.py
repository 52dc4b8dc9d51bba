"""From rows of text to rows of tokens: what training, precision passes and evaluation read.

    load_training_data   the section `data` of a recipe -> TrainingData: rows, held-out rows, labels, a report
    Rows                 rows of tokens with labels and training units
    epoch_order          the order of one epoch
    batches              the optimizer steps of one epoch, as one process sees them
    steps_per_epoch      how many those are
    evaluation_batches   every row once, over all processes
    deal                 some rows once, over all processes
    collate              rows -> tensors
    misfit               why a model has no place for rows, if it has none
    packing_fault        why a model cannot learn packed rows, if it cannot

Neither torch nor transformers nor datasets is imported before it is needed.
"""

from __future__ import annotations

from mergekit_bayes.data.collate import collate
from mergekit_bayes.data.deal import batches, deal, evaluation_batches, steps_per_epoch
from mergekit_bayes.data.load import TrainingData, load_training_data
from mergekit_bayes.data.misfit import misfit
from mergekit_bayes.data.order import epoch_order, epoch_shares
from mergekit_bayes.data.packing_fault import packing_fault
from mergekit_bayes.data.report import DataReport, DatasetReport
from mergekit_bayes.data.rows import IGNORED, ModelTask, Part, Row, Rows, Task, model_task

__all__ = [
    "IGNORED",
    "DataReport",
    "DatasetReport",
    "ModelTask",
    "Part",
    "Row",
    "Rows",
    "Task",
    "TrainingData",
    "batches",
    "collate",
    "deal",
    "epoch_order",
    "epoch_shares",
    "evaluation_batches",
    "load_training_data",
    "misfit",
    "model_task",
    "packing_fault",
    "steps_per_epoch",
]
