"""YAML files and flags to a dataclass, which is the schema of both. Bad input ends in one line that names the key."""

import argparse
import ast
import difflib
import inspect
import itertools
import sys
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, asdict, dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Optional, get_origin

import yaml

from rae_suite.errors import ConfigError, fail, scrub
from rae_suite.output import surviving_output
from rae_suite.values import compose, convert, dump, in_words, inner_type, metavar, node_of, plain_data, shorten, shown


def parse(
    schema: type,
    prog: str,
    description: str,
    argv: Optional[list] = None,
    default_config: Optional[Path] = None,
    check: Optional[Callable] = None,
) -> Any:
    """Read a command line into the dataclass `schema`: its files first, so that flags win wherever they stand. Bad
    input exits with code 2 and one line that names the key, and the file where the value is from one.

    Args:
        argv: the command line; none: sys.argv.
        default_config: YAML file that is read when the command line names none.
        check: called with the result; raises ConfigError for values that cannot be used.
    """
    argv = sys.argv[1:] if argv is None else argv
    if not {"-h", "--help"}.isdisjoint(argv):
        with surviving_output():  # `| head` is no error
            print(help_text(schema, prog, description, default_config))
        sys.exit(0)
    settings, values, origins = all_settings(schema), {}, {}
    try:
        for key, node, file in given_nodes(argv, settings, default_config):
            origins[key] = file
            values[key] = convert(settings[key].type, node, key)
        config = build(schema, values)
        check_limits(config)
        if check is not None:
            check(config)
    except ConfigError as error:
        file = origins.get(str(error).partition(":")[0])
        fail(error if file is None else f"{error} (in {file})")
    return config


# --------------------------------------------------------------------------------------------------------------------
# Files and flags
# --------------------------------------------------------------------------------------------------------------------


def all_settings(schema: type, prefix: str = "") -> dict[str, Field]:
    """{"group.name": field} of every setting, and of every group, {"group": field}."""
    found = {}
    for item in fields(schema):
        found[f"{prefix}{item.name}"] = item
        if is_group(item):
            found |= all_settings(item.default_factory, f"{prefix}{item.name}.")
    return found


def is_group(item: Field) -> bool:
    return is_dataclass(item.default_factory)


def given_nodes(argv: list, settings: dict, default_config: Optional[Path]) -> Iterator[tuple]:
    """(key, YAML node, file or None) of every value that files and then flags give."""
    flags = read_flags(argv, settings)
    files = [one_file(words) for key, words in flags if key == "config"]
    for file in files or ([] if default_config is None else [default_config]):
        for key, node in file_nodes(read_node(file), settings, file).items():
            yield key, node, file
    for key, words in flags:
        if key != "config":
            yield key, node_of(settings[key].type, words, key), None


def names_config(argv: list) -> bool:
    """Whether a command line has a --config."""
    return any(word.partition("=")[0] == "--config" for word in argv)


def one_file(words: list) -> Path:
    if len(words) != 1:
        raise ConfigError(f"--config: expected one YAML file, got {' '.join(words) or 'nothing'}; it may be repeated")
    return Path(words[0]).expanduser()


def read_flags(argv: list, settings: dict) -> list:
    """[(key, words)] of a command line of --KEY WORDS or --KEY=WORD, in its order. Raises ConfigError."""
    flags = []
    for word in argv:
        if word.startswith("--"):
            key, has_word, first = word[2:].partition("=")
            if key != "config":
                check_known(f"--{key}", key, settings)
                if is_group(settings[key]):
                    raise ConfigError(f"--{key}: expected one of its settings, as --{key}.NAME VALUE")
            flags.append((key, [first] if has_word else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            raise ConfigError(f"{word}: expected settings as --NAME VALUE; --help lists them")
    for key in {key for key, _ in flags if key != "config" and get_origin(inner_type(settings[key].type)) is tuple}:
        times = sum(name == key for name, _ in flags)
        require(times < 2, f"--{key}", "it once, with all its values", f"it {times} times")
    return flags


def check_known(shown_key: str, key: str, settings: dict, where: str = "") -> None:
    """Raise ConfigError, which names the nearest key, unless there is a setting `key`."""
    if key in settings:
        return
    last = key.rpartition(".")[2]
    near = [known for known in settings if known.rpartition(".")[2] == last and not is_group(settings[known])]
    near = near or difflib.get_close_matches(key, [*settings, "config"], n=1)
    hint = f"; did you mean {' or '.join(near[:3])}?" if near else "; --help lists all"
    raise ConfigError(f"{shown_key}: there is no such setting{where}{hint}")


def read_node(file: Path) -> yaml.Node:
    """The mapping in a YAML file. Raises ConfigError, about the file, for anything else."""
    try:
        node = compose(file.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(f"{file} does not exist, expected settings in YAML") from None
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: expected settings in YAML, {error}") from error
    if not isinstance(node, yaml.MappingNode):
        raise ConfigError(f"{file}: expected a mapping of settings, found {'nothing' if node is None else shown(node)}")
    return node


def read_yaml(file: Path) -> dict:
    """The settings in a YAML file as plain data. Raises ConfigError, about the file, for anything else."""
    try:
        return plain_data(read_node(file))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"{file}: expected settings in YAML, {error}") from error


def read_group(schema: type, file: Path, group: str) -> Any:
    """The dataclass `schema` of the settings below `group` in a YAML file. Raises ConfigError, about the file or one of
    them, for anything else; the other groups are not looked at."""
    settings = all_settings(schema, f"{group}.")
    nodes = [node for name, node in read_node(file).value if name.value == group]
    if len(nodes) != 1 or not isinstance(nodes[0], yaml.MappingNode):
        raise ConfigError(f"{file}: expected a mapping of settings below {group}")
    found = file_nodes(nodes[0], settings, file, f"{group}.")
    config = build(schema, {key: convert(settings[key].type, node, key) for key, node in found.items()}, f"{group}.")
    check_limits(config, f"{group}.")
    return config


def file_nodes(node: yaml.Node, settings: dict, file: Path, prefix: str = "") -> dict:
    """{key: node} of the settings in a mapping below the group `prefix`. Raises ConfigError for an unknown key, for one
    that is given twice, and for a group that is no mapping."""
    found = {}
    for name, value in node.value:
        key = f"{prefix}{name.value}"
        check_known(key, key, settings, f" (in {file})")
        inner = {key: value}
        if is_group(settings[key]):
            if not isinstance(value, yaml.MappingNode):
                raise ConfigError(f"{key}: expected a mapping of settings, got {shown(value)} (in {file})")
            inner = file_nodes(value, settings, file, f"{key}.")
        for twice in found.keys() & inner.keys():
            raise ConfigError(f"{twice}: given twice (in {file})")
        found |= inner
    return found


def build(schema: type, values: dict, prefix: str = "") -> Any:
    """The dataclass with the `values`, {"group.name": value}. Raises ConfigError for one that is missing and needed."""
    made = {}
    for item in fields(schema):
        key = f"{prefix}{item.name}"
        if is_group(item):
            made[item.name] = build(item.default_factory, values, f"{key}.")
        elif key in values:
            made[item.name] = values[key]
        elif item.default is MISSING and item.default_factory is MISSING:
            raise ConfigError(f"{key}: expected {in_words(item.type)}, got nothing")
    return schema(**made)


# --------------------------------------------------------------------------------------------------------------------
# Help
# --------------------------------------------------------------------------------------------------------------------


def help_text(schema: type, prog: str, description: str, default_config: Optional[Path]) -> str:
    """All settings in their groups, with type, docstring and default."""
    usage = "%(prog)s [--config FILE ...] [--SETTING VALUE ...]"
    parser = argparse.ArgumentParser(prog=prog, usage=usage, description=description, add_help=False)
    default = "" if default_config is None else f"; none: configs/{default_config.name}, over the defaults below"
    parser.add_argument("--config", metavar="FILE", help=f"YAML file; repeatable, later ones win{default}")
    parser.add_argument("--help", action="store_true", help="show this")
    add_help(parser, schema)
    return parser.format_help()


def add_help(parser: argparse.ArgumentParser, schema: type, prefix: str = "", about: str = "") -> None:
    """Add the settings below `prefix`, which are `about` something, and those of the groups in it."""
    docs, single = field_docs(schema), [item for item in fields(schema) if not is_group(item)]
    if single:
        group = parser.add_argument_group(prefix.rstrip(".") or "settings", about)
        for item in single:
            text = f"{docs.get(item.name, '')} ({default_in_words(item)})".strip().replace("%", "%%")
            group.add_argument(f"--{prefix}{item.name}", metavar=metavar(item.type), help=text)
    for item in fields(schema):
        if is_group(item):
            doc = docs.get(item.name) or inspect.getdoc(item.default_factory)
            add_help(parser, item.default_factory, f"{prefix}{item.name}.", doc)


def default_in_words(item: Field) -> str:
    default = item.default if item.default_factory is MISSING else item.default_factory()
    if default is MISSING:
        return "needed"
    if isinstance(default, tuple):
        default = " ".join(map(str, default))
    words = {"": "empty", "None": "none", "{}": "empty", "True": "true", "False": "false"}
    return f"default: {words.get(str(default), default)}"


def field_docs(schema: type) -> dict:
    """{field: the text below it in the source} of a dataclass and those that it extends."""
    docs = {}
    for parent in reversed(schema.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(parent))).body[0].body
        for statement, after in itertools.pairwise(body):
            text = after.value if isinstance(after, ast.Expr) else None
            if isinstance(statement, ast.AnnAssign) and isinstance(text, ast.Constant):
                docs[statement.target.id] = inspect.cleandoc(text.value)
    return docs


# --------------------------------------------------------------------------------------------------------------------
# Limits
# --------------------------------------------------------------------------------------------------------------------

# No number is larger, of either sign: times the steps of an epoch it still counts something, and float32 holds it.
LARGEST = 10**12

AT_MOST_LARGEST = f"a number of at most {LARGEST:.0e}"


def require(condition: bool, key: str, expected: str, value: Any) -> None:
    """Raise ConfigError, about the setting `key`, unless the condition holds."""
    if not condition:
        raise ConfigError(f"{key}: expected {expected}, got {shorten(repr(value))}")


@dataclass(frozen=True)
class Limit:
    """What a value must be beyond its type: a condition, and the words for it."""

    holds: Callable[[Any], bool]
    words: str


POSITIVE = Limit(lambda value: value > 0, "a positive number")
AT_LEAST_0 = Limit(lambda value: value >= 0, "a number of at least 0")
SHARE = Limit(lambda value: 0 <= value < 1, "a number in [0, 1)")
ALL_AT_LEAST_0 = Limit(lambda values: all(value >= 0 for value in values), "numbers of at least 0")
ALL_POSITIVE = Limit(lambda values: all(value > 0 for value in values), "positive numbers")
DISTINCT = Limit(lambda values: 0 < len(values) == len(set(values)), "one or more, distinct")
THREE = Limit(lambda values: len(values) == 3, "three numbers")
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
        found = list(value) if isinstance(value, tuple) else value
        for part in found if isinstance(found, list) else [found]:
            if isinstance(part, str):
                require("\0" not in part, key, "text without zero bytes", part)
            elif isinstance(part, (int, float)):
                require(abs(part) <= LARGEST, key, AT_MOST_LARGEST, found)  # inf and nan are not
        for limit in item.metadata.get("limits", ()):
            require(value is None or limit.holds(value), key, limit.words, found)


# --------------------------------------------------------------------------------------------------------------------
# The result as plain data
# --------------------------------------------------------------------------------------------------------------------


def flat(tree: dict, prefix: str = "") -> dict:
    """Nested settings as {"group.name": value}; the free-form `*_config` dictionaries stay whole."""
    leaves = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and not str(key).endswith("_config")
        leaves.update(flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return leaves


def change_texts(tree: Any, change: Callable[[str], str]) -> Any:
    """Nested settings with every text, keys of mappings too, changed; tuples become lists."""
    if isinstance(tree, dict):
        return {change_texts(key, change): change_texts(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [change_texts(value, change) for value in tree]
    return change(tree) if isinstance(tree, str) else tree


def config_dict(config: Any) -> dict:
    """The config as plain YAML types, and without credentials: it is written, shown and published."""
    return change_texts(asdict(config), scrub)


def with_settings(config: Any, values: dict) -> Any:
    """A copy of the config with other values, {"group.name": value}."""
    for key, value in values.items():
        group, _, name = key.partition(".")
        inner = replace(getattr(config, group), **{name: value})
        config = replace(config, **{group: inner})
    return config


def config_yaml(config: Any) -> str:
    """The resolved config as YAML text, itself a valid `--config`."""
    return dump(config_dict(config))
