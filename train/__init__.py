"""An activation store to trained SAEs. Called: `tcsae.train`."""

from tcsae.shared.base.callable_room import callable_room

callable_room(__name__, "tcsae.api.stages:train")
