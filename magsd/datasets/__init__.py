"""Public collections, as they lie on a disk after downloading, become manifests.

    rows.py          what all of them share: a row, tables with their columns checked, images found by name
    collections.py   one function a collection: cohen, figure1, actualmed, nih, kermany, rsna, v7
    composing.py     data sets A, B and C of the paper's Table 1 out of such manifests

docs/datasets.md says where each is from, under what terms, and what it cannot give.
"""
