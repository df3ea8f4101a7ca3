"""Frozen settings: from and to plain dictionaries, `key=value` overrides with nested keys, unknown keys refused.

A config is a frozen dataclass of numbers, strings, booleans, tuples and other configs: no I/O, no defaults that
depend on the machine.
"""

import dataclasses
import json
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, TypeVar

from tcsae.shared.base.errors import ConfigError, unknown

C = TypeVar("C")

_COUNT = re.compile(r"(\d+(?:\.\d+)?|\d*\.\d+)([KMG]?)", re.IGNORECASE)
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_count(text: str) -> int:
    """A count with an optional suffix: "300", "40K", "1.5M", "2G" (powers of 1000).

    Raises ConfigError if it is not a whole, non-negative number.
    """
    match = _COUNT.fullmatch(text.strip().replace("_", ""))
    if match:
        value = Decimal(match[1]) * _SCALE[match[2].upper()]
        if value == int(value):
            return int(value)
    raise ConfigError(f"{text!r} is not a count. Write a whole number, or one with K, M or G: 300, 40K, 1.5M, 2G.")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as JSON-ready dictionaries and lists."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(kind: type[C], values: Mapping[str, Any], where: str = "") -> C:
    """Rebuild a config of type `kind`; `where` is the dotted path that messages name.

    Raises ConfigError for an unknown key (with the nearest name), a missing one, or a value of a wrong type.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    hints = typing.get_type_hints(kind)
    made = {}
    for key, value in values.items():
        if key not in fields:
            raise ConfigError(unknown("setting", f"{where}{key}", [f"{where}{name}" for name in fields]))
        made[key] = _convert(hints[key], value, f"{where}{key}")
    missing = [name for name, field in fields.items() if name not in made and _is_required(field)]
    if missing:
        raise ConfigError(
            f"{kind.__name__} lacks {', '.join(where + name for name in missing)}. Give a value for each."
        )
    return kind(**made)


def with_settings(config: C, settings: Iterable[str]) -> C:
    """`config` with each "dotted.key=value" applied; several at once are checked together.

    Raises ConfigError for an unknown key (with the nearest of all dotted names) or a value that does not fit.
    """
    values = to_dict(config)
    known = list(_dotted(values))
    for setting in settings:
        key, sign, text = setting.partition("=")
        if not sign:
            raise ConfigError(f"{setting!r} has no value. Write key=value, for example sae.k=16.")
        if key not in known:
            raise ConfigError(_unknown_setting(key, known))
        *parents, last = key.split(".")
        inner = values
        for parent in parents:
            inner = inner[parent]
        inner[last] = text
    return from_dict(type(config), values)


def _unknown_setting(key: str, known: list[str]) -> str:
    """As `unknown`; a name without its group, such as k or lr, is the setting of that name."""
    if full := [name for name in known if name.rpartition(".")[2] == key]:
        return f"Unknown setting {key!r}. Did you mean {' or '.join(map(repr, full))}?"
    return unknown("setting", key, known)


def to_settings(config: Any) -> list[str]:
    """Every setting as "dotted.key=value", as `with_settings` takes them."""
    return [f"{key}={_as_text(value)}" for key, value in _flat(to_dict(config)).items()]


def _as_text(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(map(_as_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def differences(ours: Any, theirs: Any) -> list[str]:
    """What differs between two configs of one type, or two dictionaries, one "key: a, not b" each."""
    mine, other = (_flat(x if isinstance(x, Mapping) else to_dict(x)) for x in (ours, theirs))
    return [
        f"{key}: {mine.get(key)!r}, not {other.get(key)!r}"
        for key in sorted(mine.keys() | other.keys())
        if mine.get(key) != other.get(key)
    ]


def check_least(name: str, value: float, least: float) -> None:
    """Raises ConfigError for a setting below `least`, or no finite number."""
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be a finite number.")
    if not value >= least:
        raise ConfigError(f"{name}={value}: must be at least {least}.")


def check_most(name: str, value: float, most: float) -> None:
    """Raises ConfigError for a setting above `most`."""
    if not value <= most:
        raise ConfigError(f"{name}={value}: must be at most {most}.")


def check_positive(name: str, value: float) -> None:
    """Raises ConfigError for a setting that is not above 0, or no finite number."""
    if not math.isfinite(value):
        raise ConfigError(f"{name}={value}: must be a finite number.")
    if not value > 0:
        raise ConfigError(f"{name}={value}: must be above 0.")


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterable[str]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _dotted(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, list) and any(isinstance(item, Mapping) for item in value):
            value = {str(i): item for i, item in enumerate(value)}
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(kind: Any, value: Any, where: str) -> Any:
    """`value` (from JSON, TOML or a command line) as type `kind`."""
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r} is a group of settings. Set one of them: {where}.NAME=VALUE.")
        return from_dict(typing.cast(type, kind), value, f"{where}.")
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None or (isinstance(value, str) and value.lower() == "none"):
            return None
        return _convert(next(one for one in arguments if one is not type(None)), value, where)
    if origin is typing.Literal:
        if value not in arguments:
            raise ConfigError(f"{where}: " + unknown("value", str(value), [str(one) for one in arguments]))
        return value
    if origin is tuple:
        items = value.split(",") if isinstance(value, str) else value
        if arguments[0] is str and not value:  # as `to_settings` writes an empty one
            items = ()
        return tuple(_convert(arguments[0], item, where) for item in items)
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}={value!r} is no group of names and values. Give one.")
        inner = arguments[1]
        return {name: one if inner is Any else _convert(inner, one, f"{where}.{name}") for name, one in value.items()}
    return _scalar(kind, value, where)


def _scalar(kind: type, value: Any, where: str) -> Any:
    try:
        if kind is bool:
            return {"true": True, "false": False}[str(value).lower()]
        if kind is int:
            return _whole_text(value) if isinstance(value, str) else _whole(value)
        if kind is float:
            return float(value)
        if kind is str and isinstance(value, str):
            return value
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (KeyError, ValueError, TypeError, OverflowError):
        pass
    allowed = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]
    raise ConfigError(f"{where}={value!r} is not {allowed}.")


def _whole(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value:
        raise ValueError(value)
    return int(value)


def _whole_text(text: str) -> int:
    return int(text) if text.startswith("-") else parse_count(text)
