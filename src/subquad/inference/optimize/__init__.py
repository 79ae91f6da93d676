"""``subquad.optimize``: our operations in transformers' recurrent and hybrid models, as they are and exactly.

The functions that transformers' layers call are replaced per layer of one model (:mod:`.seam`), where they are known by
their source (:mod:`.families`); projections, norms, caches and everything else stay the model's own.
"""

from subquad.inference.optimize.report import Layer, Optimization, optimize, undo

__all__ = ["Layer", "Optimization", "optimize", "undo"]
