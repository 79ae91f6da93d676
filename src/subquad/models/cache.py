"""The cache of a language model: per layer, the state of its mixer, whatever that is."""

import os
from collections.abc import Callable, Iterable
from typing import cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from subquad.mixers.contract import Mixer, State, map_state, named_leaves


class StateLayer(CacheLayerMixin):
    """One layer's cache: the mixer's state (None before the first token) and how many columns it has taken in."""

    supports_early_init = False

    def __init__(self) -> None:
        super().__init__()
        self.state: State | None = None
        self.length = 0

    def store(self, state: State, columns: int) -> None:
        self.state, self.is_initialized = state, True
        self.length += columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise TypeError("this cache holds mixer states; keys and values are stored by the mixer itself")

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        raise TypeError("this cache holds mixer states; keys and values are stored by the mixer itself")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        return self.length

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.state, self.length, self.is_initialized = None, 0, False

    def apply(self, function: Callable[[Tensor], Tensor]) -> None:
        if self.state is not None:
            self.state = map_state(function, self.state)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.apply(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_select_indices(self, indices: Tensor) -> None:
        self.apply(lambda x: x[indices.to(x.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.apply(lambda x: x.repeat_interleave(repeats, dim=0))

    def offload(self) -> None:
        self.apply(lambda x: x.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        raise RuntimeError("a cache of mixer states is small: it is not offloaded layer by layer")

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a recurrent state cannot be taken back by some tokens: keep a copy of the cache (copy.deepcopy)"
            )


class SubquadCache(Cache):
    """The states of all layers of one model. ``copy.deepcopy`` keeps a copy; ``save`` and ``load`` keep it on disk.

    Args:
        num_layers: of the model.
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__(layers=[StateLayer() for _ in range(num_layers)])

    @property
    def states(self) -> list[StateLayer]:
        """The layers, in order."""
        return cast(list[StateLayer], self.layers)

    @property
    def batch_size(self) -> int:
        """Rows of the stored states, -1 before the first token."""
        states = [layer.state for layer in self.states if layer.state is not None]
        return next((leaf.shape[0] for state in states for _, leaf in named_leaves(state)), -1)

    def number_of_bytes(self) -> int:
        """Bytes of all states."""
        states = [layer.state for layer in self.states if layer.state is not None]
        return sum(leaf.numel() * leaf.element_size() for state in states for _, leaf in named_leaves(state))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the states to a safetensors file, whole or not at all."""
        tensors = {
            f"{i}.{name}": leaf.contiguous()
            for i, layer in enumerate(self.states)
            if layer.state is not None
            for name, leaf in named_leaves(layer.state)
        }
        lengths = {str(i): str(layer.length) for i, layer in enumerate(self.states)}
        save_file(tensors, f"{path}.partial", metadata=lengths)
        os.replace(f"{path}.partial", path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], mixers: Iterable[Mixer]) -> "SubquadCache":
        """The cache saved at ``path`` by a model with these mixers, in layer order (``model.mixers()``).

        Raises:
            ValueError: states of another model.
        """
        mixers = list(mixers)
        cache = cls(len(mixers))
        with safe_open(path, framework="pt") as file:
            lengths, names = file.metadata(), set(file.keys())
            if set(lengths) != {str(i) for i in range(len(mixers))}:
                raise ValueError(f"{path} holds the states of {len(lengths)} layers; the model has {len(mixers)}")
            for i, (mixer, layer) in enumerate(zip(mixers, cache.states)):
                template = mixer.init_state(1, torch.float32, "cpu")
                wanted = {f"{i}.{name}" for name, _ in named_leaves(template)}
                present = {name for name in names if name.startswith(f"{i}.")}
                if present and present != wanted:
                    raise ValueError(
                        f"{path} holds a state of layer {i} with {sorted(present)}; "
                        f"the model's {type(mixer).__name__} has {sorted(wanted)}"
                    )
                if present:
                    leaves = iter([file.get_tensor(f"{i}.{name}") for name, _ in named_leaves(template)])
                    layer.store(map_state(lambda _, leaves=leaves: next(leaves), template), int(lengths[str(i)]))
        return cache
