"""A class in front of a module's own, which changes how it is called: copies and pickles of the module have it, too."""

from __future__ import annotations

from typing import Any


class Front:
    """What is put in front. Subclasses have a ``forward`` that calls ``super().forward``."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        front, own = next(_PARTS[cls] for cls in type(self).__mro__ if cls in _PARTS)
        rest: Any = super().__reduce_ex__(protocol)
        return (_made, (front, own), *rest[2:])


def put_in_front(front: Any, module: Any) -> None:
    """Give a module the class, unless it has it."""
    if not isinstance(module, front):
        module.__class__ = _joined(front, type(module))


# What was joined, both ways.
_JOINED: dict[tuple[Any, Any], Any] = {}
_PARTS: dict[Any, tuple[Any, Any]] = {}


def _joined(front: Any, own: Any) -> Any:
    if (front, own) not in _JOINED:
        made = type(own.__name__, (front, own), {"__module__": own.__module__})
        _JOINED[front, own], _PARTS[made] = made, (front, own)
    return _JOINED[front, own]


def _made(front: Any, own: Any) -> Any:
    cls = _joined(front, own)
    return cls.__new__(cls)
