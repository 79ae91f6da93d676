"""Scans: recurrences whose transition is diagonal, on one file per backend.

The selective scan of state space models (h_t = e^{delta A} h_{t-1} + delta B u, read by C), the plain diagonal scan
(h_t = a_t h_{t-1} + x_t) and the doors to both, :mod:`.dispatch` and :mod:`.diagonal`.
"""
