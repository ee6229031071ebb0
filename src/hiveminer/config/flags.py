"""From flags, environment and a TOML file to a tree of settings, or to one line of error.

The tree (`settings.py`) says what there is; this module finds the values and keeps in mind
where each came from, so that a mistake is told by the name the operator wrote: a flag
(`--axon.port`), a variable (`HIVEMINER_AXON__PORT`) or a key in a file. pydantic-settings
merges the three and validates; its own readers are not used, because they report a mistake
as usage text or a traceback and pass over names that nobody reads.
"""

from __future__ import annotations

import argparse
import difflib
import functools
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import annotated_types
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, InitSettingsSource

from hiveminer.errors import OperatorError

PREFIX = "HIVEMINER_"
"""Variables that begin so are ours, and each must be one that is read."""

CONFIG_FLAG = "--config"
CONFIG_VARIABLE = PREFIX + "CONFIG"

Tree = TypeVar("Tree", bound=BaseSettings)


@dataclass(frozen=True)
class Option:
    """One setting: its place in the tree (`axon.port`) and its field."""

    key: str
    field: FieldInfo

    @property
    def flag(self) -> str:
        return f"--{self.key}"

    @property
    def negative(self) -> str:
        return f"--no-{self.key}"

    @property
    def variable(self) -> str:
        return PREFIX + self.key.replace(".", "__").upper()

    @functools.cached_property
    def kinds(self) -> tuple[Any, ...]:
        """The types that a value may have, without None: (int,) for `int | None`."""
        return tuple(_kinds(self.field.annotation))

    @property
    def is_bool(self) -> bool:
        return self.kinds == (bool,)

    @property
    def is_list(self) -> bool:
        return any(get_origin(kind) is list for kind in self.kinds)

    def expected(self) -> str:
        """What a value has to be, in words: "a whole number from 0 to 65535"."""
        kind = self.kinds[0]
        if get_origin(kind) is Literal:
            *most, last = (str(choice) for choice in get_args(kind))
            return f"{', '.join(most)} or {last}"
        words = {bool: "true or false", int: "a whole number", float: "a number", Path: "a path"}
        bounds = self.bounds()
        comma = "," if bounds.endswith("or more") else ""
        return f"{words.get(kind, 'text')}{comma} {bounds}".rstrip(", ")

    def bounds(self) -> str:
        """The bounds in words: "from 0 to 65535", "above 0, at most 3600", or nothing."""
        limits: dict[str, str] = {}
        for bound in self.field.metadata:
            match bound:
                case annotated_types.Ge(ge=least):
                    limits["from"] = f"{least:.12g}"
                case annotated_types.Gt(gt=least):
                    limits["above"] = f"{least:.12g}"
                case annotated_types.Le(le=most):
                    limits["at most"] = f"{most:.12g}"
        if set(limits) == {"from", "at most"}:
            return f"from {limits['from']} to {limits['at most']}"
        if set(limits) == {"from"}:
            return f"{limits['from']} or more"
        return ", ".join(f"{word} {limit}" for word, limit in limits.items())


@dataclass(frozen=True)
class Layer:
    """Values of one source, by key, and what the source calls a key."""

    values: Mapping[str, Any]
    names: Mapping[str, str]


def read(
    tree: type[Tree],
    argv: Sequence[str],
    *,
    env: Mapping[str, str],
    prog: str,
    description: str,
    version: str,
    others: Iterable[type[BaseSettings]] = (),
) -> Tree:
    """Read the settings of `tree`: flags over environment over the TOML file over defaults.

    `others` are the trees of the sibling programs: one file and one environment may serve
    them all, so what belongs to a sibling is passed over there, and refused as a flag.
    Raises OperatorError with one line; SystemExit(0) after `--help` and `--version`.
    """
    mine = options(tree)
    everyones = {key: option for other in others for key, option in options(other).items()}
    everyones |= mine
    parser = _parser(tree, mine, prog=prog, description=description, version=version)
    flags = _from_flags(parser, argv, mine=mine, everyones=everyones)
    variables = _from_environment(env, everyones=everyones)
    file = _file_name(flags.values, env)
    layers = [flags, variables]
    if file is not None:
        layers.append(_from_file(file, everyones=everyones))
    return _validated(tree, mine, layers)


def options(tree: type[BaseModel], place: str = "") -> dict[str, Option]:
    """Every setting of a tree, by key, in the order in which they are written."""
    found: dict[str, Option] = {}
    for name, field in tree.model_fields.items():
        key = f"{place}{name}"
        if (group := _group(field)) is None:
            found[key] = Option(key, field)
        else:
            found |= options(group, f"{key}.")
    return found


def _group(field: FieldInfo) -> type[BaseModel] | None:
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _kinds(annotation: Any) -> Iterable[Any]:
    if get_origin(annotation) in (list, Literal) or not get_args(annotation):
        if annotation is not type(None):
            yield annotation
        return
    if hasattr(annotation, "__metadata__"):  # Annotated: what follows the type is no type
        yield from _kinds(get_args(annotation)[0])
        return
    for part in get_args(annotation):
        yield from _kinds(part)


# --- flags ---------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        message = message.removeprefix("argument ").replace("argument", "value")
        flags, found, rest = message.partition(": ")
        raise OperatorError(f"{flags.split('/')[0].split(',')[0]}{found}{rest}")


def _parser(
    tree: type[BaseSettings],
    mine: Mapping[str, Option],
    *,
    prog: str,
    description: str,
    version: str,
) -> _Parser:
    parser = _Parser(
        prog=prog,
        description=description,
        usage="%(prog)s [--flag value ...]",
        allow_abbrev=False,
        add_help=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
        epilog=f"A flag goes over its variable ({PREFIX}AXON__PORT for --axon.port), a variable "
        f"over the file of {CONFIG_FLAG}, the file over the default.",
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this and leave")
    general.add_argument("--version", action="version", version=version, help="show the version")
    general.add_argument(
        CONFIG_FLAG,
        metavar="FILE",
        default=argparse.SUPPRESS,
        help="a TOML file of settings: [axon] and under it port = 8091",
    )
    groups = {
        name: parser.add_argument_group(f"{name}: {_title(group)}")
        for name, field in tree.model_fields.items()
        if (group := _group(field)) is not None
    }
    for key, option in mine.items():
        _add(groups.get(key.partition(".")[0], general), option)
    return parser


def _title(group: type[BaseModel]) -> str:
    sentence = " ".join((group.__doc__ or "").split()).partition(".")[0]
    return sentence[:1].lower() + sentence[1:]


def _add(group: argparse._ArgumentGroup, option: Option) -> None:
    text = _help(option)
    add = functools.partial(group.add_argument, dest=option.key, default=argparse.SUPPRESS)
    if option.is_bool:
        add(option.flag, nargs="?", const="true", metavar="true|false", help=text)
        add(option.negative, action="store_const", const="false", help="the same as false")
    elif option.is_list:
        add(option.flag, nargs="+", action="extend", metavar=_metavar(option), help=text)
    else:
        add(option.flag, metavar=_metavar(option), help=text)


def _metavar(option: Option) -> str:
    kind = option.kinds[0]
    if get_origin(kind) is Literal:
        return "|".join(str(choice) for choice in get_args(kind))
    return {int: "N", float: "X", Path: "PATH"}.get(kind, "TEXT")


def _help(option: Option) -> str:
    default = option.field.get_default(call_default_factory=False)
    text = option.field.description or ""
    if bounds := option.bounds():
        text += f"; {bounds}"
    if default is True or default is False:
        text += f" (default: {str(default).lower()})"
    elif default not in (None, "", []):
        text += f" (default: {_default(default)})"
    return text.replace("%", "%%")


def _default(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _from_flags(
    parser: _Parser,
    argv: Sequence[str],
    *,
    mine: Mapping[str, Option],
    everyones: Mapping[str, Option],
) -> Layer:
    found, rest = parser.parse_known_args(list(argv))
    if rest:
        raise OperatorError(_unknown_flag(rest[0], parser.prog, mine=mine, everyones=everyones))
    names = {key: option.flag for key, option in mine.items()}
    return Layer(vars(found), names | {"config": CONFIG_FLAG})


def _unknown_flag(
    word: str, prog: str, *, mine: Mapping[str, Option], everyones: Mapping[str, Option]
) -> str:
    if not word.startswith("--"):
        return f"{_shown(word)} is not understood: settings are given as --flag value"
    flag = word.partition("=")[0]
    if flag.removeprefix("--").removeprefix("no-") in everyones:
        return f"{flag}: not a flag of {prog}"
    known = [option.flag for option in mine.values()] + [CONFIG_FLAG, "--help", "--version"]
    return f"{flag if flag.isprintable() else repr(flag)}: no such flag{did_you_mean(flag, known)}"


# --- environment and file --------------------------------------------------------------------


def _from_environment(env: Mapping[str, str], *, everyones: Mapping[str, Option]) -> Layer:
    names = {key: option.variable for key, option in everyones.items()}
    known = [*names.values(), CONFIG_VARIABLE]
    for variable in env:
        if variable.upper().startswith(PREFIX) and variable not in known:
            hint = did_you_mean(variable, known)
            raise OperatorError(f"{variable}: nothing reads this variable{hint}")
    # An empty variable counts as not set: that is how a unit file or a compose file clears one.
    return Layer({key: env[name] for key, name in names.items() if env.get(name)}, names)


def _file_name(flags: Mapping[str, Any], env: Mapping[str, str]) -> tuple[str, Path] | None:
    if "config" in flags:
        return CONFIG_FLAG, Path(flags["config"])
    if env.get(CONFIG_VARIABLE):
        return CONFIG_VARIABLE, Path(env[CONFIG_VARIABLE])
    return None


def _from_file(file: tuple[str, Path], *, everyones: Mapping[str, Option]) -> Layer:
    source, path = file
    try:
        table = tomllib.loads(path.expanduser().read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise OperatorError(f"{source}: there is no file {_shown(str(path))}") from None
    except OSError as error:
        reason = error.strerror or "an error"
        raise OperatorError(f"{source}: cannot read {_shown(str(path))}: {reason}") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise OperatorError(f"{path}: not a TOML file: {_one_line(str(error))}") from None
    values = dict(_flat(table))
    for key in values:
        if key not in everyones:
            raise OperatorError(f"{path}: {_unknown_key(key, everyones)}")
    return Layer(values, {key: f"{path}: {key}" for key in everyones})


def _flat(table: Mapping[str, Any], place: str = "") -> Iterable[tuple[str, Any]]:
    for name, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{place}{name}.")
        else:
            yield f"{place}{name}", value


def _unknown_key(key: str, everyones: Mapping[str, Option]) -> str:
    if any(known.startswith(f"{key}.") for known in everyones):
        return f"{key} is a table: write [{key}] and its settings under it"
    key = key if key.isprintable() else repr(key)
    return f"nothing reads the key {key}{did_you_mean(key, everyones)}"


# --- validation and words ------------------------------------------------------------------


def _validated(tree: type[Tree], mine: Mapping[str, Option], layers: Sequence[Layer]) -> Tree:
    sources = tuple(
        InitSettingsSource(tree, _nested({k: v for k, v in layer.values.items() if k in mine}))
        for layer in layers
    )
    try:
        return tree(_build_sources=(sources, {}))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise OperatorError(_explain(first, mine, layers)) from None


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *groups, name = key.split(".")
        place = tree
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return tree


def _explain(error: Mapping[str, Any], mine: Mapping[str, Option], layers: Sequence[Layer]) -> str:
    place = [str(part) for part in error["loc"]]
    key = next((key for key in _prefixes(place) if key in mine), ".".join(place))
    own_words = str(error["ctx"]["error"]) if error["type"] == "value_error" else ""
    if key not in mine:  # a check across several settings, which names them itself
        return _one_line(own_words or str(error["msg"]))
    words = own_words or f"must be {mine[key].expected()}"
    for layer in layers:
        if key in layer.values:
            return _one_line(f"{layer.names[key]}: {words}, not {_shown(layer.values[key])}")
    return _one_line(f"{mine[key].flag}: {words}")


def _prefixes(place: Sequence[str]) -> Iterable[str]:
    for end in range(len(place), 0, -1):
        yield ".".join(place[:end])


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The end of a sentence that names what is spelled nearly so, or nothing."""
    keys = {_key(name): name for name in known}
    word = _key(word)
    near = [key for key in keys if key.endswith(f".{word}")]  # "--port" for "--axon.port"
    near = near or difflib.get_close_matches(word, keys, n=1)
    return f"; did you mean {' or '.join(keys[key] for key in near)}?" if near else ""


def _key(name: str) -> str:
    return name.lower().removeprefix("--").removeprefix(PREFIX.lower()).replace("__", ".")


def _shown(value: object) -> str:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:76]} ...'"


def _one_line(text: str) -> str:
    return " ".join(text.split())
