"""Training feature maps to weigh as softmax does: the first stage of Hedgehog's conversion (Zhang et al. 2024)."""

from typing import Any

import torch
from torch import Tensor

from subquad.layers.mimicry import mimicry_loss
from subquad.mixers.linear import LinearAttention
from subquad.mixers.softmax import SoftmaxAttention
from subquad.models import SubquadForCausalLM

from .data import BatchLike


class Mimicry:
    """The objective that trains the feature maps of a student: the sum over layers and heads of the mimicry loss.

    The teacher is run as it is; what each of its softmax layers reads is given to the student's linear layer in the
    same place, whose projections make the queries and keys of both kinds of weights. Only the maps get a gradient.

    Args:
        teacher: a model with softmax attention, frozen here by being run without gradients.
        block_size: rows of weights held at once.

    Example:
        >>> from subquad.models import SubquadConfig
        >>> fields = {"vocab_size": 16, "hidden_size": 32, "num_hidden_layers": 1, "positions": "none"}
        >>> teacher = SubquadForCausalLM(SubquadConfig(mixers="softmax", **fields))
        >>> Mimicry(teacher).layers
        [0]
    """

    def __init__(self, teacher: SubquadForCausalLM, *, block_size: int = 256) -> None:
        self.teacher, self.block_size = teacher, block_size
        self.layers = [n for n, m in enumerate(teacher.model.mixers()) if isinstance(m, SoftmaxAttention)]
        if not self.layers:
            kinds = ", ".join(sorted({type(mixer).__name__ for mixer in teacher.model.mixers()}))
            raise ValueError(f"the teacher has no softmax attention to mimic; its mixers: {kinds}")
        for layer in self.layers:
            mixer = teacher.model.mixers()[layer]
            if mixer.rope_base is not None or mixer.window_size is not None:
                raise ValueError(
                    f"layer {layer} of the teacher turns its queries by their positions or sees a window only; a "
                    "linear layer does neither and cannot mimic it"
                )

    def __call__(self, model: Any, batch: BatchLike) -> tuple[Tensor, dict[str, Tensor | float]]:
        read = self.read(batch.inputs)
        students = model.model.mixers()
        losses = []
        for layer in self.layers:
            student = students[layer]
            if not isinstance(student, LinearAttention):
                raise ValueError(
                    f"layer {layer} of the student must be LinearAttention; it is {type(student).__name__}"
                )
            with torch.no_grad():
                q, k, _ = student.project(read[layer], read[layer])
            losses.append(mimicry_loss(student.phi, q, k, block_size=self.block_size))
        return torch.stack(losses).sum(), {}

    @torch.no_grad()
    def read(self, inputs: Tensor) -> dict[int, Tensor]:
        """What each softmax layer of the teacher reads, ``(B, T, D)`` by layer."""
        found: dict[int, Tensor] = {}
        mixers = self.teacher.model.mixers()
        hooks = [
            mixers[layer].register_forward_pre_hook(lambda _, args, layer=layer: found.__setitem__(layer, args[0]))
            for layer in self.layers
        ]
        try:
            self.teacher.model(input_ids=inputs, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
        return found
