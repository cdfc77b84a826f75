"""magsd_runtime: a scan becomes a class, probabilities and a localized finding. Research use only.

The lowest layer: numpy, OpenCV and Pillow; a backend's library is imported when it is opened.
"""

from ._version import __version__

__all__ = ["__version__"]
