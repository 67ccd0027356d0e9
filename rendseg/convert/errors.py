"""The error of everything in this package."""


class ConversionError(ValueError):
    """A file of weights cannot be read, or does not fit; one line: which file, what, and the remedy."""
