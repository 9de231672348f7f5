"""The differentiable primitive, log p with its gradient direction, once per backend, and the bank update."""
