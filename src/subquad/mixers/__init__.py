"""Token mixers by name.

``available()`` lists them, ``build(name, dim, ...)`` makes one; the names stand in :mod:`subquad.catalog`.
"""

from subquad.mixers.bidirectional import Bidirectional
from subquad.mixers.contract import Mixer, MixerOutput, Pattern
from subquad.mixers.names import available, build, mixer_class

__all__ = ["Bidirectional", "Mixer", "MixerOutput", "Pattern", "available", "build", "mixer_class"]
