"""Python's keyword arguments as a command's options: same names, same defaults, same checks."""

import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar

import click

from tcsae.shared.base.errors import ConfigError, unknown

F = TypeVar("F", bound=Callable[..., Any])


def options_of(command: click.Command, settings: Mapping[str, Any], without: Collection[str] = ()) -> dict[str, Any]:
    """What the command would be called with: its defaults, and `settings` in their place.

    A setting is named as its option is, --init-from as init_from. Repeatable options take one value or several; those
    of the form KEY=VALUE a dictionary, too. Raises ConfigError for an unknown setting or a value that does not fit.
    """
    options = _options(command, without)
    with command.make_context(command.name, [], resilient_parsing=True) as ctx:
        values = dict(ctx.params)
        for name, value in settings.items():
            if name not in options:
                raise ConfigError(unknown("setting", name, options))
            option = options[name]
            try:
                values[str(option.name)] = option.type_cast_value(ctx, _as_given(option, value))
            except click.UsageError as error:
                raise ConfigError(f"{name}={value!r}: {error.message}") from error
    return values


def _options(command: click.Command, without: Collection[str] = ()) -> dict[str, click.Option]:
    options = {_name(one): one for one in command.params if isinstance(one, click.Option)}
    return {name: one for name, one in options.items() if name not in without}


def _name(option: click.Option) -> str:
    longest = next(one for one in option.opts if one.startswith("--"))
    return longest.removeprefix("--").replace("-", "_")


def _as_given(option: click.Option, value: Any) -> Any:
    """A Python value as click takes it."""
    if isinstance(value, Path):
        value = str(value)
    if not option.multiple:
        return value
    if isinstance(value, Mapping):
        return tuple(f"{key}={_text(one)}" for key, one in value.items())
    return (value,) if isinstance(value, str) else tuple(value)


def _text(value: Any) -> str:
    if isinstance(value, list | tuple | range):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def documented(command: click.Command, without: Collection[str] = ()) -> Callable[[F], F]:
    """Give a function that takes **settings the command's options: as its signature, and in its documentation."""

    def decorate(function: F) -> F:
        fixed = [one for one in inspect.signature(function).parameters.values() if one.kind is not one.VAR_KEYWORD]
        options = _options(command, without)
        with command.make_context(command.name, [], resilient_parsing=True) as ctx:
            defaults = dict(ctx.params)
        keywords = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=defaults[str(option.name)])
            for name, option in options.items()
            if name.isidentifier() and name not in {one.name for one in fixed}
        ]
        function.__signature__ = inspect.Signature([*fixed, *keywords])  # type: ignore[attr-defined]
        lines = [f"    {name}: {option.help}" for name, option in options.items()]
        function.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Settings:", *lines])
        return function

    return decorate
