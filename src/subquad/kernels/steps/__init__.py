"""One token through a whole mixer on a CPU in one numba kernel, for decoding.

At width 256 a layer's arithmetic takes some 30 us and the calls around it ten times that. :mod:`.plan` says, without
numba, when a layer may go this way and keeps its weights as arrays; :mod:`.families` holds a kernel per kind of mixer,
composed of :mod:`.pieces` and of the step of the shared recurrence.
"""
