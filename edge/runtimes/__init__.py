"""What runs the scoring graph on the line: one interface, ONNX Runtime and TensorRT behind it."""
