"""A causal language model as it really behaves: in which mode and layout what it computes is its own, and sampling from it."""
