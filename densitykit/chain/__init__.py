"""The one-dimensional world: Kohn-Sham, response, dynamics, Deep Density."""
