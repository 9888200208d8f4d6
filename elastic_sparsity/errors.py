"""Every error a user can cause, under one root.

A message says, in this order: where (file, recipe field or fully qualified module name), what was found,
what was expected, and what to do. `assert` is kept for our own bugs.
"""


class ElasticSparsityError(ValueError):
    """Root of all errors this package raises on bad input."""


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


class CheckpointError(ElasticSparsityError):
    """An elastic checkpoint is missing, damaged, or does not hold what was asked."""


class LevelError(ElasticSparsityError):
    """A level outside the ladder."""


class ProfileError(ElasticSparsityError):
    """A device profile is missing, damaged, or of a version this release does not read."""


class OutputError(ElasticSparsityError):
    """The output folder is in use, or the disk is full."""
