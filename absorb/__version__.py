"""The version, for everything that names it; the build reads it here."""

__version__ = "0.1.0"
