"""Packages that can be called: `tcsae.train` is the package of the stage and, called, the stage itself."""

import importlib
import inspect
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def callable_room(name: str, function: str) -> None:
    """Make the package `name` call `function` ("module:name"), which is imported when it is called or asked about.

    A string keeps a stage free of imports of what stands on it.
    """
    module, _, attribute = function.partition(":")

    def target() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), attribute)

    class Room(ModuleType):
        def __call__(self, *arguments: Any, **settings: Any) -> Any:
            return target()(*arguments, **settings)

        @property
        def __signature__(self) -> inspect.Signature:
            return inspect.signature(target())

        @property
        def __wrapped__(self) -> Callable[..., Any]:
            """The function itself, with the documentation of every setting."""
            return target()

    sys.modules[name].__class__ = Room
