"""Triton kernels of rendseg, imported as ``rendseg.kernels``; exports nothing."""

if not __name__.startswith("rendseg."):
    raise ImportError("import this folder as rendseg.kernels (another package on PyPI is called kernels)")
