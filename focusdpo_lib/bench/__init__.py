"""Proof of speed: what a step of each objective costs, against a plain reading of the paper and a counted floor."""
