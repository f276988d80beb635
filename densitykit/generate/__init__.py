"""Where densities come from: Kohn-Sham engines, dynamics, and the data sets made with them.

Everything here but the one-dimensional model needs the optional extra ``dft``.
Nothing else in the package imports this subpackage.
"""
