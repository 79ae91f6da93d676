"""Sums over the active neurons of a feed-forward layer, which read the weights of no other neuron."""
