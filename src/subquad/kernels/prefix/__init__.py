"""Weighted means over all prefixes of a sequence, the weights one score per token and head (Feng et al. 2024).

For token t, score s and value v, with L the logarithm of the weights' sum::

    L_t = log sum_{j <= t} e^{s_j}        o_t = sum_{j <= t} e^{s_j - L_t} v_j

Every form keeps sums relative to the largest score so far: the triple (maximum, denominator, numerator).
"""
