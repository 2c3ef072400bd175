"""Four kernels, one lesson each: rms_norm, rotary_attention, cross_entropy, swiglu."""
