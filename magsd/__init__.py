"""magsd: training and evaluation of MAG-SD on chest X-rays, and the command line. Research use only."""

from magsd_runtime._version import __version__

__all__ = ["__version__"]
