"""Every error a user can cause, under one root.

A message says, in this order: where (file, recipe field or fully qualified module name), what was found,
what was expected, and what to do. `assert` is kept for our own bugs.
"""

MAX_CHARS, MAX_LINES = 2000, 20  # of a message: it is to be read, and may quote whatever a file holds


class ElasticSparsityError(ValueError):
    """Root of all errors this package raises on bad input. Of a message beyond reading the middle is left out."""

    def __init__(self, message: str = "") -> None:
        lines = message.split("\n")
        if len(lines) > MAX_LINES:
            lines[MAX_LINES - 2 : -1] = [f"  ... {len(lines) - MAX_LINES + 1} more ..."]
        text = "\n".join(lines)
        if len(text) > MAX_CHARS:
            text = f"{text[: MAX_CHARS - 500]} ... {text[-400:]}"
        super().__init__(text)


class ConfigError(ElasticSparsityError):
    """A recipe or an argument is wrong."""


class DataError(ElasticSparsityError):
    """Calibration or evaluation text is missing, unreadable or too short."""


class ShapeError(ElasticSparsityError):
    """Tensors do not fit together."""


class NumericsError(ElasticSparsityError):
    """NaN or infinity in weights, statistics or losses, or a matrix that does not factor."""


class UnsupportedModelError(ElasticSparsityError):
    """The model has no row in the architecture table, or does not look as its row says."""


class AbsorptionError(ElasticSparsityError):
    """A change of weights that would change the model's function, or did."""


class CheckpointError(ElasticSparsityError):
    """An elastic checkpoint is missing, damaged, or does not hold what was asked."""


class LevelError(ElasticSparsityError):
    """A level outside the ladder."""


class ProfileError(ElasticSparsityError):
    """A device profile is missing, damaged, or of a version this release does not read."""


class MemoryPlanError(ElasticSparsityError):
    """A run needs more memory or disk than there is."""


class OutputError(ElasticSparsityError):
    """The output folder is in use, or the disk is full."""


def brief(value: object, limit: int = 80) -> str:
    """`repr`, cut short; also of what has none, as whole numbers of thousands of digits."""
    try:
        text = repr(value)
    except Exception:  # whatever a caller's object or a nested file raises
        text = f"<{type(value).__name__}>"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."
