"""Runtimes that compute the scoring graph on the edge: one interface, implemented by ONNX Runtime and TensorRT."""
