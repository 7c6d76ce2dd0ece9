"""YAML files and flags to a dataclass, which is the schema of both. Bad input ends in one line that names the key."""

import functools
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Optional, get_args, get_origin

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, set_parsing_settings

from rae_suite.errors import ConfigError, fail

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def parse(
    schema: type,
    prog: str,
    description: str,
    argv: Optional[list] = None,
    default_config: Optional[Path] = None,
    check: Optional[Callable] = None,
) -> Any:
    """Read a command line into the dataclass `schema`. Bad input exits with code 2 and one line that names the key.

    Args:
        argv: the command line; none: sys.argv.
        default_config: YAML file that is read when the command line names none.
        check: called with the result; raises ConfigError for values that cannot be used.
    """
    parser = build_parser(schema, prog, description, default_config)
    try:
        argv = join_lists(schema, sys.argv[1:] if argv is None else argv)
        argv = files_first(argv, default_config)
        check_digits(named_values(argv))
        for file in config_files(argv):
            if os.path.isfile(file):  # the parser says what else it may be: a pipe, nothing
                check_digits(flat(read_yaml(Path(file))).items())
        parsed = parser.parse_args(argv)
        check_groups(schema, parsed)
        parsed = parser.instantiate_classes(parsed)
        config = schema(**{item.name: getattr(parsed, item.name) for item in fields(schema)})
        check_limits(config)
        if check is not None:
            check(config)
    except ArgumentError as error:
        fail(in_plain_words(str(error)))
    except (ValueError, OSError) as error:
        fail(error)
    return config


TYPES_IN_WORDS = {"int": "an integer", "float": "a number", "bool": "true or false", "dict": "a mapping"}


def in_plain_words(message: str) -> str:
    """What the parser says of a value, said as by the other errors: key, what is expected, what was found."""
    text = " ".join(message.split())
    none = "<class 'NoneType'>"  # every union of the schemas is of something and nothing
    union = rf"Does not validate against .*? Subtypes: \[(.+?), {none}\] Errors: .* Given value: "
    text = re.sub(union, r"Expected a \1 or nothing. Got value: ", text)
    text = re.sub(r"a typing\.Literal\[(.*?)\]", r"one of \1", text)
    text = re.sub(r"a <class '(\w+)'>", lambda found: TYPES_IN_WORDS.get(found[1], found[0]), text)
    group = r"\1: expected a YAML file of these settings, got \2; a single one is given as --\1.NAME"
    text = re.sub(r'^Parser key "(\w+)": Unable to load config .* "(.*)"$', group, text)
    text = re.sub(r'^Parser key "([\w.]+)": Expected (.*?)\. Got value: ', r"\1: expected \2, got ", text)
    return re.sub(r'^Parser key "([\w.]+)": ', r"\1: ", text)


@functools.cache  # a tenth of a second, for those who read many configs
def build_parser(schema: type, prog: str, description: str, default_config: Optional[Path]) -> ArgumentParser:
    """The parser of YAML files and flags for the dataclass `schema`."""
    # a flag is written out: `--conf` for `--config` would be read by the parser and by nobody else
    parser = ArgumentParser(prog=prog, exit_on_error=False, description=description, allow_abbrev=False)
    default = "" if default_config is None else f"; none: configs/{default_config.name}, over the defaults below"
    parser.add_argument("--config", action="config", help=f"YAML file; repeatable, later ones win{default}")
    parser.add_class_arguments(schema, nested_key=None, as_group=False)
    return parser


def files_first(argv: list, default_config: Optional[Path] = None) -> list:
    """The command line with its --config options in front, so that flags win wherever they stand; without any, the
    default file."""
    files, flags, i = [], [], 0
    while i < len(argv):
        length = 2 if argv[i] == "--config" else 1
        (files if argv[i].split("=")[0] == "--config" else flags).extend(argv[i : i + length])
        i += length
    if not files and default_config is not None and not {"--help", "-h"} & set(flags):
        files = ["--config", str(default_config)]
    return [*files, *flags]


def named_values(argv: list) -> list:
    """Every value in a command line, with its flag."""
    name, pairs = "", []
    for word in argv:
        if word.startswith("--"):
            name, _, word = word.partition("=")
        pairs.append((name, word))
    return pairs


def config_files(argv: list) -> list:
    """The values of --config in a command line."""
    return [value for name, value in named_values(argv) if name == "--config" and value]


def check_digits(values: Iterable) -> None:
    """Raise ConfigError for an integer, in pairs of key and value, that no float can hold: the parser would try."""
    for key, value in values:
        found = re.search(r"\d[\da-fA-FxX_:]{200,}", str(value))  # YAML's integers: decimal, 0xf, 0b1, 1_000, 1:30
        require(found is None, key, AT_MOST_LARGEST, found and f"{found[0][:9]}... of {len(found[0])} digits")


def keys_where(schema: type, wanted: Callable[[Any], bool], prefix: str = "") -> set:
    """The flags of `schema` whose type is `wanted`."""
    keys = set()
    for item in fields(schema):
        if wanted(item.type):
            keys.add(f"--{prefix}{item.name}")
        if is_dataclass(item.default_factory):
            keys |= keys_where(item.default_factory, wanted, f"{prefix}{item.name}.")
    return keys


def takes_several(kind: Any) -> bool:
    """Whether a type, or what an Optional holds, is a list or tuple."""
    return any(get_origin(part) in (list, tuple) for part in (kind, *get_args(kind)))


def join_lists(schema: type, argv: list) -> list:
    """The command line with `--key a b c` as `--key [a,b,c]` for keys that take several values, and with `--key` as
    `--key true` for keys that are true or false."""
    keys, switches = keys_where(schema, takes_several), keys_where(schema, lambda kind: kind is bool)
    texts = keys_where(schema, lambda kind: takes_several(kind) and str in get_args(kind))  # a file may be called 3
    argv = [part for word in argv for part in (word.split("=", 1) if word.split("=")[0] in keys else [word])]
    for key in keys:
        require(argv.count(key) < 2, key, "it once, with all its values", f"it {argv.count(key)} times")
    joined, i = [], 0
    while i < len(argv):
        end = i + 1
        while argv[i] in keys and end < len(argv) and not argv[end].startswith("--"):
            end += 1
        values = argv[i + 1 : end]
        joined.append(argv[i])
        if values:
            quoted = [argv[i] in texts or not re.fullmatch(r"[\w./+-]+", v) for v in values]
            plain = [json.dumps(v, ensure_ascii=False) if q else v for v, q in zip(values, quoted, strict=True)]
            whole = len(values) == 1 and values[0].startswith("[") and values[0].endswith("]")
            joined.append(values[0] if whole else f"[{','.join(plain)}]")
        elif argv[i] in switches and (end == len(argv) or argv[end].startswith("--")):
            joined.append("true")
        i = end
    return joined


def check_groups(schema: type, values: Any, prefix: str = "") -> None:
    """Raise ConfigError where a YAML file gives something else than a mapping for a group of settings, or nothing for a
    setting that needs a value: the parser takes null for any type."""
    for item in fields(schema):
        group, value = item.default_factory, values.get(item.name)
        if is_dataclass(group):
            if not isinstance(value, Namespace):
                raise ConfigError(f"{prefix}{item.name}: expected a mapping of settings, got {value!r}")
            check_groups(group, value, f"{prefix}{item.name}.")
        else:
            require(value is not None or type(None) in get_args(item.type), f"{prefix}{item.name}", "a value", value)


# No number is larger, of either sign: times the steps of an epoch it still counts something, and float32 holds it.
LARGEST = 10**12

AT_MOST_LARGEST = f"a number of at most {LARGEST:.0e}"


def require(condition: bool, key: str, expected: str, value: Any) -> None:
    """Raise ConfigError, about the setting `key`, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {value!r}")


@dataclass(frozen=True)
class Limit:
    """What a value must be beyond its type: a condition, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Limit(lambda value: value > 0, "a positive number")
AT_LEAST_0 = Limit(lambda value: value >= 0, "a number of at least 0")
SHARE = Limit(lambda value: 0 <= value < 1, "a number in [0, 1)")
ALL_AT_LEAST_0 = Limit(lambda values: all(value >= 0 for value in values), "numbers of at least 0")
PROBABILITY = Limit(lambda value: 0 <= value <= 1, "a number in [0, 1]")


def setting(default: Any, *limits: Limit) -> Any:
    """A dataclass field with its default and its limits. A value of None is within all of them."""
    return field(default=default, metadata={"limits": limits})


def check_limits(config: Any, prefix: str = "") -> None:
    """Raise ConfigError for values outside of a field's limits, numbers that nothing can be, text with zero bytes."""
    for item in fields(config):
        key, value = f"{prefix}{item.name}", getattr(config, item.name)
        if is_dataclass(value):
            check_limits(value, f"{key}.")
            continue
        for part in value if isinstance(value, (list, tuple)) else [value]:
            if isinstance(part, str):
                require("\0" not in part, key, "text without zero bytes", part)
            elif isinstance(part, (int, float)):
                require(math.isfinite(part), key, "a finite number", value)
                require(abs(part) <= LARGEST, key, AT_MOST_LARGEST, value)
        shown = list(value) if isinstance(value, tuple) else value
        for limit in item.metadata.get("limits", ()):
            require(value is None or limit.holds(value), key, limit.words, shown)


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings as {"group.name": value}; the free-form `*_config` dictionaries stay whole."""
    leaves = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and not str(key).endswith("_config")
        leaves.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return leaves


def config_dict(config: Any) -> dict:
    """The config as plain YAML types."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return plain(asdict(config))


def with_settings(config: Any, values: dict) -> Any:
    """A copy of the config with other values, {"group.name": value}."""
    for key, value in values.items():
        group, _, name = key.partition(".")
        inner = replace(getattr(config, group), **{name: value})
        config = replace(config, **{group: inner})
    return config


def config_yaml(config: Any) -> str:
    """The resolved config as YAML text, itself a valid `--config`."""
    return yaml.dump(config_dict(config), Dumper=ConfigDumper, sort_keys=False)


class ConfigDumper(yaml.SafeDumper):
    """Quotes text that reads as a number: jsonargparse takes 1e3 for one, PyYAML alone would leave it bare."""


def _quote_numbers(dumper: ConfigDumper, text: str) -> yaml.Node:
    try:
        float(text)
        style = "'"
    except ValueError:
        style = None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


ConfigDumper.add_representer(str, _quote_numbers)

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
