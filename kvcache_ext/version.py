"""The version, where every module can import it; the same stands in pyproject.toml."""

__version__ = "0.1.0"
