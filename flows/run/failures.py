"""What failed, in words: the error of a run of which nothing came out."""

from __future__ import annotations

from collections.abc import Sequence

from lmq.errors import InputError, LmqError


def failure_of_all(errors: Sequence[Exception]) -> Exception:
    """The one error, or all of them as one: an InputError when the user can mend every one of them."""
    different = list({str(error): error for error in errors}.values())
    if len(different) == 1:
        return different[0]
    kind = InputError if all(isinstance(error, InputError) for error in different) else LmqError
    return kind("; ".join(str(error) for error in different))
