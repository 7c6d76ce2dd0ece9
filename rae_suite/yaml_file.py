"""YAML files that may be anything: read to one mapping, or one line that says what is wrong with them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import yaml

from rae_suite.errors import ConfigError

MAX_DEPTH, MAX_VALUES = 50, 100_000


def read_yaml(file: Path) -> dict:
    """The mapping in a YAML file. Raises ConfigError, about the file, for anything else, and as `check_yaml` says."""
    try:
        text = file.read_bytes().decode("utf-8-sig")
        check_yaml(text)
        settings = yaml.safe_load(text)
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{file}: expected settings in YAML, {error}") from error
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else f"a {type(settings).__name__}"
        raise ConfigError(f"{file}: expected a mapping of settings, found {found}")
    return settings


@dataclass
class OpenNode:
    """A list or mapping whose end has not come yet. `parts`: texts of its items, or of its keys and values in turn;
    None for what is no text. `size`: number of values in it, aliases unfolded."""

    anchor: Optional[str]
    is_mapping: bool
    size: int = 1
    parts: list = field(default_factory=list)


def check_yaml(text: str) -> None:
    """Raise YAMLError for text that a parser takes otherwise than it is meant, or does not survive: a key that is given
    twice (the last one would count), nesting of more than MAX_DEPTH, an alias within its own anchor, and aliases that
    unfold to more than MAX_VALUES values. What is wrong beside that is left to the parser."""

    def check(condition: bool, problem: str) -> None:
        if not condition:
            raise yaml.YAMLError(f"{problem} in line {event.start_mark.line + 1}")

    sizes = {}  # by anchor
    nodes = [OpenNode(None, False)]
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # step by step, and therefore at any depth
        name = None
        if isinstance(event, yaml.CollectionStartEvent):
            nodes.append(OpenNode(event.anchor, isinstance(event, yaml.MappingStartEvent)))
            check(len(nodes) <= MAX_DEPTH, f"nested more than {MAX_DEPTH} deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            node = nodes.pop()
            anchor, size = node.anchor, node.size
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size, name = event.anchor, 1, event.value
        elif isinstance(event, yaml.AliasEvent):
            check(event.anchor not in [node.anchor for node in nodes], f"alias *{event.anchor} within its own anchor")
            anchor, size = None, sizes.get(event.anchor, 1)
        else:
            continue  # the beginning or the end of a document
        sizes[anchor] = size
        parent = nodes[-1]
        is_key = parent.is_mapping and len(parent.parts) % 2 == 0
        check(not is_key or name is None or name not in parent.parts[::2], f"key '{name}' given twice")
        parent.parts.append(name)
        parent.size += size
        check(parent.size <= MAX_VALUES, f"aliases unfold to more than {MAX_VALUES} values")
