"""Reads settings from flags, environment and a TOML file, with one-line errors.

pydantic-settings parses the command line, and pydantic the values. Added here: an error names
the flag (`--axon.port`), variable (`HIVEMINER_AXON__PORT`) or key that the operator wrote, and
an unknown name is refused with a suggestion.
"""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, TypeVar, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import CliSettingsSource

from hiveminer.__version__ import __version__
from hiveminer.config import files
from hiveminer.config.settings import PROGRAMS, ProgramSettings
from hiveminer.errors import OperatorError, one_line

PREFIX = "HIVEMINER_"
"""Every variable with this prefix must be a known one."""

CONFIG = "config"
"""The setting that names the TOML file."""

EPILOG = (
    f"A flag takes precedence over its variable ({PREFIX}AXON__PORT for --axon.port), a variable "
    "over the file of --config ([axon] and under it port = 8091), the file over the default."
)

Tree = TypeVar("Tree", bound=ProgramSettings)


def parse(
    argv: Sequence[str] | None = None,
    *,
    cls: type[Tree],
    prog: str,
    description: str = "",
    env: Mapping[str, str] | None = None,
) -> Tree:
    """Read the settings of a program: flags over environment over the TOML file over defaults.

    argv, env: this process's by default. One file and one environment may serve all programs:
    the settings of another are ignored there. Raises OperatorError with one line that names the
    flag, variable or key; SystemExit(0) after `--help` and `--version`.
    """
    argv = sys.argv[1:] if argv is None else argv
    env = os.environ if env is None else env
    mine = options(cls)
    trees: list[type[BaseModel]] = [cls, *PROGRAMS]
    known = {key: None for each in trees for key in options(each)}
    parser = _Parser(known, prog=prog, description=description, epilog=EPILOG)
    version = f"hiveminer {__version__}"
    parser.add_argument("--version", action="version", version=version, help="show the version")
    # Of each source its values by key, and what it calls a key.
    sources = [
        (_from_flags(cls, parser, _spelled_out(argv, mine)), "--{}".format),
        (_from_environment(env, known), variable),
    ]
    if named := [(v[CONFIG], name(CONFIG)) for v, name in sources if CONFIG in v]:
        path, source = named[0]
        sources.append((_from_file(path, source, known), f"{path}: {{}}".format))
    values = ChainMap(*(values for values, _ in sources))
    try:
        return cls.model_validate(_nested(values, mine))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"]))
        key = next((key for key in mine if f"{place}.".startswith(f"{key}.")), "")
        words = _reason(first, mine.get(key))
        if key in values:
            name = next(name for given, name in sources if key in given)
            words = f"{name(key)}: {words}, not {_shown(first['input'])}"
        elif key:  # a check across several settings names them itself
            words = f"--{key}: {words}"
        raise OperatorError(one_line(words)) from None


def options(tree: type[BaseModel], place: str = "") -> dict[str, FieldInfo]:
    """Every setting of a tree by its key (`axon.port`), in order of definition."""
    found: dict[str, FieldInfo] = {}
    for name, field in tree.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found |= options(kind, f"{place}{name}.")
        else:
            found[f"{place}{name}"] = field
    return found


def variable(key: str) -> str:
    return PREFIX + key.replace(".", "__").upper()


# --- flags ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """Raises OperatorError instead of exiting. known: the keys of all programs."""

    def __init__(self, known: Collection[str], **words: Any):
        super().__init__(usage="%(prog)s [--flag value ...]", allow_abbrev=False, **words)
        self._known = known

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            self._refuse(str(rest[0]))
        return found

    def _refuse(self, word: str) -> NoReturn:
        if not word.startswith("--"):
            self.error(f"{_shown(word)} is not understood: settings are given as --flag value")
        flag = word.partition("=")[0]
        if flag.removeprefix("--").removeprefix("no-") in self._known:
            self.error(f"{flag}: not a flag of {self.prog}")
        flags = [each for each in self._option_string_actions if each.startswith("--")]
        name = flag if flag.isprintable() else repr(flag)
        self.error(f"{name}: no such flag{did_you_mean(flag, flags)}")

    def _print_message(self, message: str, file: Any = None) -> None:
        print(message, end="", file=file)  # argparse ignores it when this fails

    def error(self, message: str) -> NoReturn:
        if message.startswith("argument "):  # --a/--b: expected one argument
            flags, _, words = message.removeprefix("argument ").partition(": ")
            message = f"{flags.split('/')[0]}: {words.replace('argument', 'value')}"
        raise OperatorError(one_line(message))


def _from_flags(tree: Any, parser: _Parser, words: Sequence[str]) -> dict[str, Any]:
    source: CliSettingsSource[Any] = CliSettingsSource(
        tree,
        root_parser=parser,
        parse_args_method=_Parser.parse_args,
        cli_parse_args=list(words),
        cli_implicit_flags=True,
        cli_avoid_json=True,
        cli_hide_none_type=True,
        cli_parse_none_str="chosen by the program",
        cli_use_class_docs_for_groups=True,
        formatter_class=argparse.HelpFormatter,
    )
    return dict(_flat(source()))


def _spelled_out(argv: Sequence[str], mine: Mapping[str, FieldInfo]) -> list[str]:
    """The arguments as pydantic-settings takes them: a list's `--x a b` becomes `--x=a --x=b`, a
    boolean's `--x false` becomes `--no-x`."""
    words: list[str] = []
    for flag, *values in _by_flag(argv):
        field = mine.get(flag[2:]) if flag.startswith("--") else None
        if field is None or not values:
            words += [flag, *values]
        elif field.annotation is bool and values[0] in ("true", "false"):
            words += [flag if values[0] == "true" else f"--no-{flag[2:]}", *values[1:]]
        elif get_origin(field.annotation) is list:
            words += [f"{flag}={value}" for value in values]
        else:
            words += [f"{flag}={values[0]}", *values[1:]]
    return words


def _by_flag(argv: Sequence[str]) -> list[list[str]]:
    """Each flag with the arguments that follow it."""
    groups: list[list[str]] = []
    for word in argv:
        if word.startswith("--") or not groups:
            groups.append(word.split("=", 1) if word.startswith("--") else [word])
        else:
            groups[-1].append(word)
    return groups


# --- environment and file --------------------------------------------------------------------


def _from_environment(env: Mapping[str, str], known: Iterable[str]) -> dict[str, Any]:
    variables = {variable(key): key for key in known}
    for name in env:
        if name.upper().startswith(PREFIX) and name not in variables:
            hint = did_you_mean(name, variables)
            raise OperatorError(f"{name}: nothing reads this variable{hint}")
    # An empty variable counts as not set: that is how a unit file or a compose file clears one.
    return {key: env[name] for name, key in variables.items() if env.get(name)}


def _from_file(path: str, source: str, known: Iterable[str]) -> dict[str, Any]:
    try:
        file = files.expanded(path)
    except ValueError as error:
        raise OperatorError(f"{source}: {error}") from None
    try:
        values = dict(_flat(files.read_toml(file)))
    except FileNotFoundError:
        raise OperatorError(f"{source}: there is no file {_shown(path)}") from None
    except OSError as error:
        reason = error.strerror or "an error"
        raise OperatorError(f"{source}: cannot read {_shown(path)}: {reason}") from None
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        raise OperatorError(f"{path}: not a TOML file: {one_line(error)}") from None
    allowed = [key for key in known if key != CONFIG]
    for key in values:
        if any(each.startswith(f"{key}.") for each in allowed):
            raise OperatorError(
                f"{path}: {key} is a table: write [{key}] and its settings under it"
            )
        if key not in allowed:
            name = key if key.isprintable() else repr(key)
            hint = did_you_mean(key, allowed)
            raise OperatorError(f"{path}: nothing reads the key {name}{hint}")
    return values


def _flat(table: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _nested(values: Mapping[str, Any], mine: Iterable[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key in mine:
        *groups, name = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        if key in values:
            place[name] = values[key]
    return tree


# --- words -----------------------------------------------------------------------------------


def _reason(error: Mapping[str, Any], field: FieldInfo | None) -> str:
    """What a value must be, with the bounds of a number."""
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    words = str(error["msg"]).replace("Input should be", "must be").partition(", unable")[0]
    extra = field.json_schema_extra if field is not None else None
    if not isinstance(extra, dict):
        return words
    in_bounds = error["type"] not in ("greater_than_equal", "less_than_equal")
    return f"{words if in_bounds else 'must be'} {extra['bounds']}"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A suggestion to append to an error; empty if nothing is spelled similarly."""
    keys = {_key(name): name for name in known}
    word = _key(word)
    near = [key for key in keys if key.endswith(f".{word}")]  # "--port" for "--axon.port"
    near = near or difflib.get_close_matches(word, keys, n=1)
    return f"; did you mean {' or '.join(keys[key] for key in near)}?" if near else ""


def _key(name: str) -> str:
    return name.lower().removeprefix("--").removeprefix(PREFIX.lower()).replace("__", ".")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ...'"
