"""The parts of sanitize.py, for the driver, which must not need torch."""

PARTS = ("selection", "points", "encoding", "refinement")
DTYPES = ("float32", "bfloat16", "float16")
