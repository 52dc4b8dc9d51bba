"""Precision of a model or adapter that was trained without one: recipe -> rows, passes -> sidecar, report, figure.

setup.py                        everything a pass consists of, made from its recipe; what does not fit is refused
rows.py                         which rows are looked at, in which blocks and batches
passes.py                       targets in groups that fit into memory, each in passes over the rows
state.py                        a pass on disk, so that it can go on
movement.py, picture.py         how much the estimate still moves, in numbers and as a figure
optimizer_state.py, adam.py     curvature from the state of an optimizer instead of rows
sidecar.py                      curvature and prior -> precisions in files
folder.py                       the three files put in place beside weights that are not touched
progress.py, notes.py, report.py, describe.py       what is seen of it
run.py                          from a recipe to a sidecar
"""
