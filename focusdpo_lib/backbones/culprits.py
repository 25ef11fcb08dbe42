"""Which setting is to blame when a backbone of several parts cannot be loaded."""

from contextlib import contextmanager

from safetensors import SafetensorError

# The last two: a configuration or a vocabulary may hold anything in any place.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError, ImportError, SafetensorError, TypeError, AttributeError)


class PartError(ValueError):
    """A part of a backbone that cannot be loaded; `setting` is the one of `backbone` that names it."""

    def __init__(self, setting: str, reason: Exception):
        super().__init__(str(reason))
        self.setting = setting


@contextmanager
def blaming(setting: str):
    """Blames a setting for whatever fails within."""
    try:
        yield
    except LOADING_ERRORS as error:
        raise PartError(setting, error) from error
