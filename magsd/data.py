"""Manifests and class folders: which images, of which class, of which patient; read once, kept as uint8.

    manifest = read_manifest(path, lenient=True)      text only; no image is opened
    prepared = prepare(manifest, spec)                every image decoded once: standardized, hashed, judged
    prepared.check(n_folds=5).raise_if_errors()       one report of all that is wrong, text and images
    folds = make_folds(manifest, 5, seed)
    prepared.check(folds=folds).raise_if_errors()     near duplicates across folds

A manifest is CSV (UTF-8) with ``path,label,patient`` and optional ``source,x,y,w,h,mask``.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from magsd_runtime.errors import DataError, ImageError
from magsd_runtime.images import find_images, has_contrast, read_radiograph
from magsd_runtime.preprocessing import PreprocessingSpec, standardize

from .data_checks import (
    DataReport,
    Inspection,
    Issue,
    Pairs,
    Problem,
    comparable_pairs,
    counted,
    difference_hash,
    make_issue,
    report_on,
)

if False:  # pragma: no cover
    pass

REQUIRED = ("path", "label", "patient")
OPTIONAL = ("source", "x", "y", "w", "h", "mask")
_BOX = ("x", "y", "w", "h")

Progress = Callable[[int, int], None]
