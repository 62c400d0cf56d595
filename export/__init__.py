"""The scoring graph and its way to ONNX and TensorRT."""
