"""Rows that a model has no place for: said before the model is run, which would fail deep inside."""

from __future__ import annotations

from mergekit_bayes.checkpoint.files import shown

__all__ = ["misfit"]


def misfit(name: str, *, largest_token: int, longest: int, vocabulary: int, longest_row: int | None) -> str | None:
    """Returns why a model cannot take rows, as it may stand in a message; None if it can.

    Args:
        name: how messages call the model.
        largest_token: the highest token id of all rows.
        longest: tokens of the longest row.
        vocabulary: rows of the model's embedding.
        longest_row: tokens that its learned positions can hold; None if it has none of these.
    """
    if largest_token >= vocabulary:
        return (
            f"model {shown(name)}: the data holds token {largest_token}, the embedding has {vocabulary} rows; "
            "expected the tokenizer of this model"
        )
    if longest_row is not None and longest > longest_row:
        return (
            f"data.max_length: the longest row has {longest} tokens, {shown(name)} has places for {longest_row}; "
            "expected at most so many"
        )
    return None
