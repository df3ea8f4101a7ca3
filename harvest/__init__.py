"""Text to tokens, the language model up to the hook, an activation store. Called: `tcsae.harvest`."""

from tcsae.shared.base.callable_room import callable_room

callable_room(__name__, "tcsae.api.stages:harvest")
