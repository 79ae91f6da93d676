"""How each core is computed: chunked (plain torch), cpu (numba), gpu (Triton); :mod:`subquad.ops` says what."""
