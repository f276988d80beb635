"""Windows of a trajectory, transforms and symmetry: what models learn from."""
