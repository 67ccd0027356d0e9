"""The one place that holds the version; ``setup.py`` reads it."""

__version__ = "0.1.0.dev0"
