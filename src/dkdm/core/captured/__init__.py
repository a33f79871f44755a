"""A whole step with fixed shapes, which a CUDA graph can hold."""
