"""SAEs and a store to figures and a report, without the language model. Called: `tcsae.evaluate`."""

from tcsae.shared.base.callable_room import callable_room

callable_room(__name__, "tcsae.api.stages:evaluate")
