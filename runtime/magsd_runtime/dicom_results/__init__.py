"""A prediction as DICOM objects beside the film it is about: ``magsd infer --dicom-out DIR``.

    source.py              the film's header, and what of it every result must repeat
    case.py                all that one film's results are made from
    identifiers.py         UIDs that a rerun gives again
    concepts.py            coded concepts: the standard's, SNOMED CT's, and private ones marked 99MAGSD
    secondary_capture.py   the overlay, as a colour picture any viewer shows
    structured_report.py   label, probability, regions: Comprehensive 3D SR, TID 1500
    presentation_state.py  the regions drawn over the untouched film
    parametric_map.py      the attention as numbers
    writing.py             build them all, then write them all

pydicom and highdicom are imported inside functions: ``magsd infer film.png`` never pays for them.
"""
