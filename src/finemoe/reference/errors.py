"""The one error that the reference model raises."""

from finemoe.errors import FinemoeError


class ReferenceModelError(FinemoeError, RuntimeError):
    """The reference model cannot be had; the message is one line naming the culprit and the way out."""
