"""The linear recurrence with a matrix state, cut once for every family that has its form (Yang et al. 2024).

For token t, log decay g, update (w, d) and query q::

    S_t = diag(exp(g_t)) S_{t-1} + w_t d_t^T        o_t = scale * S_t^T q_t

Without erasure ``w = k, d = v``; with the delta rule ``w = beta k, d = v - (diag(exp(g)) S_{t-1})^T k``.
"""
