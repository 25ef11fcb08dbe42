"""Which setting is to blame when a backbone of several parts cannot be loaded."""

from contextlib import contextmanager

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

# A damaged file may hold anything in any place, and its library may fail on that in any way.
LOADING_ERRORS = (OSError, ValueError, RuntimeError, LookupError, ArithmeticError, TypeError, AttributeError)
LOADING_ERRORS += (ImportError, SafetensorError, StrictDataclassError)


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
