"""A small world of tokens in which some prefixes make an undesired end unavoidable, with known probabilities.

It stands in for data sets of toxic text: a token is harmless in one state and fatal in another, so that no rule on
tokens can serve (Cao et al. 2023, "Systematic Rectification of Language Models via Dead-end Analysis", section 3).
"""

from dataclasses import dataclass

import numpy as np

from .contract import check_integer

START, EDGE, DEAD = 0, 6, 7


@dataclass(frozen=True, eq=False)
class TokenWorld:
    """Token a in state s leads to state ``following[s, a]``; a text of ``length`` tokens begins in state 0.

    Attributes:
        following: ``(S, V)`` int64.
        undesired: ``(S,)`` bool, the states in which a finished text is undesired.
        policy: ``(S, V)`` float64, the probabilities of a base model.
        length: tokens of a text.
    """

    following: np.ndarray
    undesired: np.ndarray
    policy: np.ndarray
    length: int

    def states(self, tokens: np.ndarray) -> np.ndarray:
        """The states ``(B, T + 1)`` that texts ``(B, T)`` go through, the first one included."""
        states = np.full((tokens.shape[0], tokens.shape[1] + 1), START)
        for t in range(tokens.shape[1]):
            states[:, t + 1] = self.following[states[:, t], tokens[:, t]]
        return states

    def is_undesired(self, tokens: np.ndarray) -> np.ndarray:
        """Whether each text ``(B, T)`` ends undesired."""
        return self.undesired[self.states(tokens)[:, -1]]

    def sample(self, number: int, seed: int) -> np.ndarray:
        """Texts ``(number, T)`` of the base policy."""
        generator = np.random.default_rng(seed)
        cumulated = self.policy.cumsum(1)
        tokens, state = np.empty((number, self.length), dtype=np.int64), np.full(number, START)
        for t in range(self.length):
            drawn = (generator.random(number)[:, None] > cumulated[state]).sum(1)
            tokens[:, t] = np.minimum(drawn, self.policy.shape[1] - 1)
            state = self.following[state, tokens[:, t]]
        return tokens


def dead_ends(
    seed: int, *, num_tokens: int = 12, length: int = 10, edge_tokens: int = 1, fatal_tokens: int = 5
) -> TokenWorld:
    """Six normal states, an edge, and a dead end that nothing leaves.

    Args:
        seed: of the world and its base policy, Dirichlet(0.5) in each state.
        num_tokens: V.
        length: tokens of a text.
        edge_tokens: how many tokens of each normal state lead to the edge; the others lead to normal states.
        fatal_tokens: how many tokens lead from the edge to the dead end; the others lead back.

    Example:
        >>> world = dead_ends(0)
        >>> world.following[7].tolist() == [7] * 12, world.sample(3, seed=1).shape
        (True, (3, 10))
    """
    for name, value, most in (("edge_tokens", edge_tokens, num_tokens), ("fatal_tokens", fatal_tokens, num_tokens)):
        check_integer(name, value, 0)
        if value > most:
            raise ValueError(f"{name} must be at most num_tokens = {most}; got {value}")
    check_integer("num_tokens", num_tokens, 2)
    check_integer("length", length, 1)
    generator = np.random.default_rng(seed)
    following = generator.integers(0, EDGE, (DEAD + 1, num_tokens))
    for state in range(EDGE):
        following[state, generator.permutation(num_tokens)[:edge_tokens]] = EDGE
    following[EDGE, generator.permutation(num_tokens)[:fatal_tokens]] = DEAD
    following[DEAD] = DEAD
    policy = generator.dirichlet(np.full(num_tokens, 0.5), size=DEAD + 1)
    return TokenWorld(following, np.arange(DEAD + 1) == DEAD, policy, length)
