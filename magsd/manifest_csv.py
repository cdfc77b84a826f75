"""The lines of a manifest CSV: read by the runtime too, and so kept there."""

from magsd_runtime.manifest_csv import Box, Line, read_lines

__all__ = ["Box", "Line", "read_lines"]
