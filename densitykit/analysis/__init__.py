"""Structure and dynamics of densities and nuclei."""
