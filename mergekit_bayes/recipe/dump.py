"""Plain data written as YAML 1.2 that reads back to the same data."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.representer import SafeRepresenter

from mergekit_bayes.recipe.scalar import resolve_scalar

_LINE = 90
"""Characters of a mapping that still goes on one line."""


class _Representer(SafeRepresenter):
    """Scalars so that our own reader takes them for what they are; short lists and mappings on one line."""

    def represent_mapping(self, tag: Any, mapping: Any, flow_style: Any = None) -> Any:
        node = super().represent_mapping(tag, mapping, flow_style=flow_style)
        if node.flow_style and sum(len(key.value) + len(value.value) + 4 for key, value in node.value) > _LINE:
            node.flow_style = False
        return node


_WORD = re.compile(r"[A-Za-z0-9_./~][A-Za-z0-9_./~@+-]{0,250}")
"""Text that is written without quotes, unless it reads as a number or the like; the rest of Unicode has quotes."""


def _text(representer: Any, value: str) -> Any:
    plain = _WORD.fullmatch(value) is not None and resolve_scalar(value) == value
    return representer.represent_scalar("tag:yaml.org,2002:str", value, style=None if plain else '"')


def _number(representer: Any, value: float) -> Any:
    return representer.represent_scalar("tag:yaml.org,2002:float", repr(value))


_Representer.add_representer(str, _text)
_Representer.add_representer(float, _number)


def dump_yaml(data: Mapping[str, object]) -> str:
    """YAML text of nested mappings, lists and scalars, keys in their given order.

    Args:
        data: plain data with text keys and finite numbers.
    """
    yaml = YAML(typ="safe", pure=True)
    yaml.Representer = _Representer
    # innermost lists and mappings on one line
    yaml.default_flow_style = None
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]  # read as a flag, declared None
    yaml.width = 110
    stream = io.StringIO()
    yaml.dump(dict(data), stream)
    return stream.getvalue()
