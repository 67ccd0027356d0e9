"""ONNX: the operators in its terms (``ops``), and its files (``files``)."""
