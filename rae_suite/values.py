"""Settings as they stand in YAML text or on a command line, to values of a field's type.

A value is text until its field's type says what it is: `output_dir: 2024` is a text, `seed: 2024` a number. A type is
bool, int, float, str, PathText, a Literal of texts, Optional of those, tuple[X, ...], tuple[X, X], dict[str, X] or Any,
which is plain data: texts, numbers, booleans, nothing, lists and mappings. Nothing is ever imported or called.
"""

import os
import re
from typing import Any, Literal, NewType, Optional, get_args, get_origin

import yaml

from rae_suite.errors import ConfigError, scrub

PathText = NewType("PathText", str)  # type of settings that hold a path, or a URL or Hub id: ~ is the home folder

NULL = "tag:yaml.org,2002:null"
FLOAT = "tag:yaml.org,2002:float"
TEXT = "tag:yaml.org,2002:str"
PLAIN_TAGS = {f"tag:yaml.org,2002:{name}" for name in "str int float bool null map seq merge value".split()}
EXPONENT = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")  # 1e-4, which PyYAML alone takes for text


# --------------------------------------------------------------------------------------------------------------------
# YAML text
# --------------------------------------------------------------------------------------------------------------------


class SettingsLoader(yaml.SafeLoader):
    """Composes plain YAML: a key that is given twice (the last one would count) and a tag of a program's own, such as
    !!python/name, are errors; 1e-4 is a number, and a date is text."""

    def compose_node(self, parent: Optional[yaml.Node], index: Any) -> yaml.Node:
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        if node.tag not in PLAIN_TAGS:
            raise yaml.MarkedYAMLError(None, None, f"tag {node.tag} is not for settings", node.start_mark)
        if isinstance(node, yaml.MappingNode) and not is_alias:
            given = set()
            for key, _ in node.value:
                if not isinstance(key, yaml.ScalarNode):
                    raise yaml.MarkedYAMLError(None, None, "a key that is no text", key.start_mark)
                if key.value in given:
                    raise yaml.MarkedYAMLError(None, None, f"key '{key.value}' given twice", key.start_mark)
                given.add(key.value)
            self.flatten_mapping(node)  # of `<<: *anchor`, which the mapping's own keys, that come later, replace
            node.value = list({key.value: (key, value) for key, value in node.value}.values())
        return node


SettingsLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
SettingsLoader.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))


class SettingsDumper(yaml.SafeDumper):
    """Quotes text that SettingsLoader would take for a number, and the word none, which is_nothing would take for
    nothing."""


SettingsDumper.add_implicit_resolver(FLOAT, EXPONENT, list("-+.0123456789"))
SettingsDumper.add_representer(
    str, lambda dumper, text: dumper.represent_scalar(TEXT, text, style="'" if text.lower() == "none" else None)
)


def compose(text: str) -> Optional[yaml.Node]:
    """The node of the only document in YAML text, None for a document without content. Raises ValueError, in one line,
    for text that is no plain YAML."""
    try:
        return yaml.compose(text, Loader=SettingsLoader)
    except yaml.MarkedYAMLError as error:  # its own text shows a piece of the file, which may hold a password
        what = ", ".join(filter(None, (error.context, error.problem)))
        mark = error.problem_mark or error.context_mark
        raise ValueError(f"{what}{'' if mark is None else f' in line {mark.line + 1}'}") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


def plain_data(node: yaml.Node) -> Any:
    """Texts, numbers, booleans, None, lists and dictionaries. Raises ValueError for a node that contains itself."""
    loader = SettingsLoader("")
    try:
        return loader.construct_object(node, deep=True)
    except yaml.MarkedYAMLError as error:
        raise ValueError(error.problem) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    finally:
        loader.dispose()


def dump(tree: Any) -> str:
    """Plain data as YAML text."""
    return yaml.dump(tree, Dumper=SettingsDumper, sort_keys=False)


# --------------------------------------------------------------------------------------------------------------------
# Values of a type
# --------------------------------------------------------------------------------------------------------------------


def convert(kind: Any, node: yaml.Node, key: str) -> Any:
    """The value of the type `kind` that a node stands for. Raises ConfigError, about the setting `key`."""
    try:
        return value_of(kind, node)
    except ValueError:
        raise ConfigError(f"{key}: expected {in_words(kind)}, got {shown(node)}") from None


def value_of(kind: Any, node: yaml.Node) -> Any:
    """As `convert`, but raises ValueError for a node that is no `kind`."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return plain_data(node)
    if type(None) in parts:
        inner = inner_type(kind)
        return None if is_nothing(node, inner) else value_of(inner, node)
    if origin is tuple:
        items = items_of(parts[0], node)
        kinds = parts[:1] * len(items) if parts[-1] is ... else parts
        return tuple(value_of(item_kind, item) for item_kind, item in zip(kinds, items, strict=True))
    if origin is dict:
        if not isinstance(node, yaml.MappingNode):
            raise ValueError
        return {value_of(parts[0], name): value_of(parts[1], value) for name, value in node.value}
    if not isinstance(node, yaml.ScalarNode) or node.tag == NULL:
        raise ValueError
    if origin is Literal:
        if node.value not in parts:
            raise ValueError
        return node.value
    return READERS[kind](node.value)


def inner_type(kind: Any) -> Any:
    """X of Optional[X], any other type itself."""
    parts = get_args(kind)
    return next(part for part in parts if part is not type(None)) if type(None) in parts else kind


def is_nothing(node: yaml.Node, kind: Any) -> bool:
    """Whether a node is null, or the word none where that is no text of its own: encoder_final_norm may be "none"."""
    if not isinstance(node, yaml.ScalarNode):
        return False
    return node.tag == NULL or (node.style is None and kind is not str and node.value.lower() == "none")


def items_of(kind: Any, node: yaml.Node) -> list:
    """The nodes of a list of `kind`: one word is a list of one, and psnr,ssim is two; a path may have a comma in it.
    Raises ValueError for a mapping and for nothing."""
    if isinstance(node, yaml.SequenceNode):
        return node.value
    if not isinstance(node, yaml.ScalarNode) or node.tag == NULL:
        raise ValueError
    if node.style is None and kind is not PathText and "," in node.value:
        return [yaml.ScalarNode(TEXT, word.strip()) for word in node.value.split(",")]
    return [node]


def read_bool(text: str) -> bool:
    known = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if text.lower() not in known:
        raise ValueError
    return known[text.lower()]


def read_int(text: str) -> int:
    """Of 100000, 100_000 and 1e5."""
    try:
        return int(text)
    except ValueError:
        number = float(text)
        if not number.is_integer():
            raise
        return int(number)


READERS = {bool: read_bool, int: read_int, float: float, str: str, PathText: os.path.expanduser}


# --------------------------------------------------------------------------------------------------------------------
# Words of a command line
# --------------------------------------------------------------------------------------------------------------------


def node_of(kind: Any, words: list, key: str) -> yaml.Node:
    """The node of the type `kind` that the words after --key stand for. Raises ConfigError for too many or too few."""
    origin = get_origin(inner_type(kind))
    if not words and kind is bool:
        return word_node("true")
    if not words:
        raise ConfigError(f"--{key}: expected {in_words(kind)}, got nothing")
    if origin is tuple and len(words) > 1:
        return yaml.SequenceNode("tag:yaml.org,2002:seq", [yaml.ScalarNode(TEXT, word) for word in words])
    if len(words) > 1:
        raise ConfigError(f"--{key}: expected {in_words(kind)}, got several words: {shorten(' '.join(words))}")
    [word] = words
    if origin is dict or (origin is tuple and word.startswith("[") and word.endswith("]")):
        try:
            return compose(word) or word_node("null")
        except ValueError as error:
            raise ConfigError(
                f"--{key}: expected {in_words(kind)} as YAML text, got {shorten(word)}: {error}"
            ) from None
    return word_node(word)


def word_node(word: str) -> yaml.ScalarNode:
    """A word is null where YAML says so, else text; no word at all is an empty text."""
    tag = NULL if word in ("null", "Null", "NULL", "~") else TEXT
    return yaml.ScalarNode(tag, word)


# --------------------------------------------------------------------------------------------------------------------
# What messages and the help say
# --------------------------------------------------------------------------------------------------------------------

WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a text", PathText: "a path", Any: "YAML"}
SEVERAL = {int: "integers", float: "numbers", str: "texts", PathText: "paths"}


def in_words(kind: Any) -> str:
    """What a setting of the type expects."""
    origin, parts = get_origin(kind), get_args(kind)
    if type(None) in parts:
        return f"{in_words(inner_type(kind))} or nothing"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}"
    if origin is dict:
        return "a mapping" if parts[1] is Any else f"a mapping to {SEVERAL[parts[1]]}"
    if origin is tuple:
        if get_origin(parts[0]) is Literal:
            return f"values among {', '.join(map(repr, get_args(parts[0])))}"
        return f"a list of {SEVERAL[parts[0]]}" if parts[-1] is ... else f"{len(parts)} {SEVERAL[parts[0]]}"
    return WORDS[kind]


def metavar(kind: Any) -> str:
    """The same for a flag in the help."""
    origin, parts = get_origin(kind), get_args(kind)
    if type(None) in parts:
        return metavar(inner_type(kind))
    if origin is Literal:
        return f"{{{','.join(parts)}}}"
    if origin is tuple:
        return f"{metavar(parts[0])} ..." if parts[-1] is ... else " ".join(map(metavar, parts))
    return {bool: "{true,false}", int: "INT", float: "NUMBER", str: "TEXT", PathText: "PATH"}.get(kind, "YAML")


def shown(node: yaml.Node) -> str:
    """The value in a message, as it was written; what is nested in it only as far as it is short."""
    if isinstance(node, yaml.ScalarNode):
        return shorten("nothing" if node.tag == NULL else node.value or "''")
    if isinstance(node, yaml.SequenceNode):
        return shorten(f"[{', '.join(map(scalar_shown, node.value))}]")
    return shorten(f"{{{', '.join(f'{name.value}: {scalar_shown(value)}' for name, value in node.value)}}}")


def scalar_shown(node: yaml.Node) -> str:
    return shown(node) if isinstance(node, yaml.ScalarNode) else "..."


def shorten(text: str) -> str:
    """Text for a message. Half a password could not be found there any more."""
    return text if len(text) <= 100 else f"{scrub(text)[:60]}... ({len(text)} characters)"
