"""YAML files of options, read strictly: what they hold is looked at before it is built."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from hsat.untrusted import open_regular, shown

_MOST_BYTES, _MOST_DEPTH = 1 << 18, 20


def read_yaml(path: Path, *, numbered: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file; anything else ends the program with the reason.

    Refused are aliases (`*name`, of which a few lines make gigabytes), keys that come twice, keys that are no text,
    more than 20 lists and mappings inside each other, and files of more than 256 KiB.

    Args:
        path: The file.
        numbered: Whether the outermost keys may be whole numbers, too.

    Returns:
        The mapping; empty for an empty file.

    Raises:
        SystemExit: For anything else; the message names the file.
    """
    try:
        with open_regular(path, kind="configuration") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ValueError(f"it has more than {_MOST_BYTES >> 10} KiB")
        text = content.decode("utf-8-sig")
        _check_events(text)
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader), numbered=numbered)
        value = yaml.safe_load(text) or {}
    except (OSError, ValueError, OverflowError, yaml.YAMLError) as error:
        raise SystemExit(f"error: cannot read the configuration {path}: {error}") from None
    if not isinstance(value, dict):
        raise SystemExit(
            f"error: the configuration {path} must hold a mapping of options, not a {type(value).__name__}"
        )
    return value


def _check_events(text: str) -> None:
    """ValueError for what would grow when it is built: the parser itself needs no more than the file."""
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        line = event.start_mark.line + 1 if event.start_mark else 0
        if isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line} has the alias *{event.anchor}; write what it stands for")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > _MOST_DEPTH:
            raise ValueError(f"line {line} has more than {_MOST_DEPTH} lists and mappings inside each other")


def _check_keys(node: yaml.Node | None, *, numbered: bool = False) -> None:
    """ValueError for keys that come twice in a mapping, or that are no text."""
    if isinstance(node, yaml.SequenceNode):
        for one in node.value:
            _check_keys(one)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        line = key.start_mark.line + 1
        kind = key.tag.rpartition(":")[2]
        if not isinstance(key, yaml.ScalarNode) or kind not in ("str", *["int"] * numbered):
            given = shown(key.value) if isinstance(key, yaml.ScalarNode) else "a list or a mapping"
            raise ValueError(f"line {line}: a key must be a text, got {given}, which YAML takes for {kind}")
        if key.value in seen:
            raise ValueError(f"line {line}: the key {shown(key.value)} comes twice")
        seen.add(key.value)
        _check_keys(value)
