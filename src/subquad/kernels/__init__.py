"""How each core is computed: chunked (plain torch), cpu (numba), gpu (Triton). What is computed is said in :mod:`subquad.ops`."""
