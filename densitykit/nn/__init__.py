"""Layers of networks on periodic grids."""
