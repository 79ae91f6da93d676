"""A memory that is a small network, trained by gradient descent while it reads."""

from subquad.ops.neural_memory.api import NeuralMemoryState, neural_memory, neural_memory_read

__all__ = ["NeuralMemoryState", "neural_memory", "neural_memory_read"]
