"""The version of this package, for manifests and reports."""

__version__ = "0.1.0"
