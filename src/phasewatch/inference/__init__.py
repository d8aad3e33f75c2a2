"""From a trained checkpoint to what runs without us: an ONNX file, or an edge bundle for `phasewatch watch`."""
