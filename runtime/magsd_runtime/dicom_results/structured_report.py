"""What the network said, as a Comprehensive 3D SR by TID 1500 (PS3.16): unverified, preliminary.

    Imaging Measurement Report
      observer: device (magsd, the model, its hash), procedure: plain chest X-ray
      Imaging Measurements
        group (TID 1501)  finding = the label; Certainty of Finding in %; each class's probability in %;
                          status, decision, reasons, intended use; algorithm; source image
        group (TID 1410)  one a region: its box, peak attention, share of the image; algorithm

A region is where the network attended, not a finding: its finding type is a private code that says so.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .._version import __version__
from ..prediction import Finding
from . import concepts
from .case import (
    MANUFACTURER,
    Case,
    coding_schemes,
    finish,
    identity,
    observer_uid,
    region_name,
    region_uid,
)
from .concepts import class_code, class_probability_code, code, long_string, private
from .source import stand_in


def structured_report(case: Case) -> Any:
    """The report of a judged film.

    Raises
    ------
    ValueError
        If the film was not judged: there is nothing to report.
    """
    if case.prediction.label is None:
        raise ValueError("a film that was not judged has no report")
    from highdicom import sr
    from pydicom.uid import ExplicitVRLittleEndian

    model = case.prediction.model
    observer = sr.ObserverContext(
        observer_type=sr.CodedConcept.from_code(code(concepts.DEVICE)),
        observer_identifying_attributes=sr.DeviceObserverIdentifyingAttributes(
            uid=observer_uid(case),
            name="magsd",
            manufacturer_name=MANUFACTURER,
            model_name=long_string(str(model.get("name") or "magsd")),
            serial_number=case.origin.model_sha256[:64],
        ),
    )
    groups = [_whole_image(case)]
    groups += [_region(case, number, finding) for number, finding in enumerate(case.prediction.findings, 1)]
    report = sr.MeasurementReport(
        observation_context=sr.ObservationContext(observer_device_context=observer),
        procedure_reported=code(concepts.PLAIN_CHEST_XRAY),
        imaging_measurements=groups,
    )
    dataset = sr.Comprehensive3DSR(
        evidence=[stand_in(case.source)],
        content=report,
        is_complete=True,
        is_final=False,
        is_verified=False,
        transfer_syntax_uid=ExplicitVRLittleEndian,
        coding_schemes=coding_schemes(),
        **identity(case, "structured-report"),
    )
    return finish(case, dataset)


def _whole_image(case: Case) -> Any:
    """TID 1501: label, probabilities and status. One group only, so that no reader takes a class for a finding."""
    from highdicom import sr

    prediction = case.prediction
    assert prediction.label is not None
    assert prediction.probability is not None
    measurements = [_number(code(concepts.CERTAINTY_OF_FINDING), _percent(prediction.probability), concepts.PERCENT)]
    measurements += [
        _number(class_probability_code(name), _percent(value), concepts.PERCENT)
        for name, value in (prediction.probabilities or {}).items()
    ]
    evaluations = [
        sr.QualitativeEvaluation(private("intended-use"), private("research-use")),
        sr.QualitativeEvaluation(private("status"), private(f"status-{prediction.status}")),
    ]
    evaluations += [
        sr.QualitativeEvaluation(private("review-reason"), concepts.reason_code(reason.code, reason.message))
        for reason in prediction.reasons
    ]
    if prediction.decision is not None:
        answer = "positive" if prediction.decision.positive else "negative"
        evaluations.append(sr.QualitativeEvaluation(private("decision"), private(answer)))
    return sr.MeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(case.origin.uid("image"), "magsd image"),
        finding_type=class_code(prediction.label),
        algorithm_id=_algorithm(case),
        measurements=measurements,
        qualitative_evaluations=evaluations,
        source_images=[
            sr.SourceImageForMeasurementGroup(case.source.sop_class_uid, case.source.sop_instance_uid),
        ],
    )


def _region(case: Case, number: int, finding: Finding) -> Any:
    """TID 1410: one region. Its corners count from the top left corner of the film's first pixel, which is 0, 0
    (PS3.3, C.18.6.1.2): the half-open box as it is."""
    from highdicom import sr

    box = finding.box
    corners = [(box.x0, box.y0), (box.x1, box.y0), (box.x1, box.y1), (box.x0, box.y1), (box.x0, box.y0)]
    return sr.PlanarROIMeasurementsAndQualitativeEvaluations(
        tracking_identifier=sr.TrackingIdentifier(region_uid(case, number), region_name(number)),
        referenced_region=sr.ImageRegion(
            graphic_type="POLYLINE",
            graphic_data=np.array(corners, np.float64),
            source_image=sr.SourceImageForRegion(case.source.sop_class_uid, case.source.sop_instance_uid),
        ),
        finding_type=private("attended-region"),
        geometric_purpose=code(concepts.BOUNDED_BY),
        algorithm_id=_algorithm(case),
        measurements=[
            _number(private("peak-attention"), round(finding.score, 6), concepts.NO_UNITS),
            _number(private("image-share"), _percent(finding.area_fraction), concepts.PERCENT),
        ],
    )


def _algorithm(case: Case) -> Any:
    """TID 4019: enough to find the very model and settings again."""
    from highdicom import sr

    origin, backend = case.origin, case.prediction.backend
    return sr.AlgorithmIdentification(
        name=long_string(str(case.prediction.model.get("name") or "magsd")),
        version=long_string(f"{case.prediction.model.get('version')} (magsd {__version__})"),
        parameters=[
            f"model sha256 {origin.model_sha256}",
            f"preprocessing sha256 {origin.preprocessing_sha256}",
            f"backend {backend.get('name')} {backend.get('device')} {backend.get('precision')}",
            f"regions: {case.map_name} above {case.threshold:g}"
            + (f", peak at least {case.minimum_score:g}" if case.minimum_score else ""),
        ],
        manufacturer=MANUFACTURER,
    )


def _number(name: Any, value: float, unit: tuple[str, str, str]) -> Any:
    from highdicom import sr

    return sr.Measurement(name=name, value=value, unit=code(unit))


def _percent(fraction: float) -> float:
    return round(100 * fraction, 4)
