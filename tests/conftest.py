"""The fixtures of `test_dinoreg.py`. As this folder is a package, pytest puts the one above it on
the path, also in a clone that is not installed."""

from test_dinoreg import folder, hub, seed  # noqa: F401
