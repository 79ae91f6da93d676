"""One language model per mixer, alike in everything else: trained on your text, measured, compared in plain words."""
