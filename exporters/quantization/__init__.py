"""int8: quantized weights, quantized activations, their calibration, and the gate that measures them."""
