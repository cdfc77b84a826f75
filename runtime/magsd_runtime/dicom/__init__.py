"""A DICOM file becomes a radiograph, with facts about it and rules for what may be judged.

    parsing.py       bytes -> the attributes that are used, and nothing of the patient's identity
    pixels.py        what the header says of the pixels, limits, decoding
    codecs.py        which transfer syntaxes can be decoded here, what the others need
    codestreams.py   size of a compressed picture, read before it is decoded
    grayscale.py     stored values -> 8 bits, in the order of PS3.4, N.2
    tags.py          the facts that a prediction records
    rules.py         facts -> ok, review or rejected
    reading.py       all of it: file -> Radiograph

pydicom is imported inside functions: ``magsd infer film.png`` never pays for it.
"""
