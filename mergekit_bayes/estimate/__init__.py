"""Precision of a model or adapter that was trained without one: recipe -> rows, passes -> sidecar, report, figure.

run.py, request.py              from a recipe to a sidecar
from_rows.py, from_state.py     its two ways: rows that are looked at, or what Adam averaged
setup.py, memory.py             model, rows and targets, made from the recipe; how much is summed up at once
rows.py                         which rows are looked at, in which blocks and batches
passes.py, state.py             each group of targets in passes over the rows; a pass on disk, so that it can go on
optimizer_state.py              the averages in the files of two trainers, and whose they are
sidecar.py                      curvature and prior -> precisions in files
finish.py, folder.py            sidecar, report and figure, put in place beside weights that are not touched
progress.py, picture.py, notes.py, report.py, describe.py       what is seen of it
"""
