"""Draws: random numbers of passes in lockstep, in the order in which the whole batch would draw them.

In the whole batch, a function such as dropout draws for all examples at once. NumPy fills arrays in order, so the
micro-batches get the same numbers if they draw one after the other, and nothing else draws in between. So each function
that draws waits for its turn.

What a model draws outside of functions is drawn once in the whole batch, such as whether stochastic depth leaves out a
block. So each pass starts from the same state there, and must draw the same. If it draws as many numbers as there are
examples, they may be meant one for each, which cannot be told apart; this is refused.
"""

from __future__ import annotations

from typing import List, Optional

from chainer_accum.lockstep.generators import State, go_to, now, words_between
from chainer_accum.lockstep.visits import other_layers

_OUTSIDE = (
    "random numbers drawn outside of functions must be the same for all micro-batches of a lockstep window, got "
    "{what}; draw them for each example in the forward pass of a function, such as F.dropout, or before the pass, in "
    "the converter; initialize the model by calling it once before training; or set lockstep=None"
)
_ONE_EACH = (
    "so many that there may be one for each example; if they are decisions, use micro-batches of different sizes, such "
    "as micro_batch_size=31 for batches of 128"
)


class NeedsCare(RuntimeError):
    """Raised if passes draw outside of functions in a way that only careful draws can follow."""

    def __init__(self) -> None:
        super().__init__(_OUTSIDE.format(what=_ONE_EACH))


class Draws:
    """The generators during a window. Its methods are called in the order of the passes, between two meetings.

    Args:
        is_careful (bool): Whether all passes draw at a meeting before one of them goes on, and each draw outside of
            functions is looked at by itself. The first costs one more forward pass of the functions that draw, the
            second some time for each function.
        may_begin (bool): Whether a function may draw at once before the first meeting: nothing else draws meanwhile,
            such as a converter.
        may_initialize (bool): Whether the first pass may initialize parameters, which the others find initialized.

    Attributes:
        is_careful (bool): See the argument.

    """

    _start: Optional[State]  # where each pass starts
    _outside: Optional[State]  # where the first pass was after its draws outside of functions
    _turn: Optional[State]  # where the next pass draws in a function
    _after: Optional[State]  # where the current pass was after drawing in a function
    _last: Optional[State]  # where the current pass was when it was last looked at

    def __init__(self, is_careful: bool, may_begin: bool, may_initialize: bool = True) -> None:
        self.is_careful = is_careful
        self._may_initialize = may_initialize
        self._may_take_turns = may_begin and not is_careful
        self._end: Optional[State] = None  # where the last pass stopped
        self._reset()

    def end_segment(self) -> None:
        """Called when all passes have met or ended.

        Raises:
            NeedsCare: If careful draws may tell whether what was drawn outside of functions is the same for all.

        """
        if self._may_differ and not self._is_shared:
            if self.is_careful:
                raise RuntimeError(_OUTSIDE.format(what=_ONE_EACH))
            raise NeedsCare

    def begin_segment(self) -> None:
        """Called when all passes have met, before the first of them goes on."""
        self.end_segment()
        self._may_take_turns = not self.is_careful
        self._reset()

    def begin_pass(self) -> None:
        """Called before a pass goes on."""
        state = now()
        self._after = self._last = None
        self._label = ""
        self._has_many = False
        if self._start is None:
            self._start = state
        elif self._end is None or not state.is_same(self._end):
            self._was_interrupted = self._outside is not None and not self._outside.is_same(self._start)
            self._start, self._outside = state, None
        else:
            go_to(self._start)

    def end_pass(self, num_examples: Optional[int]) -> None:
        """Called when a pass waits or has ended.

        Raises:
            NeedsCare: If the pass has drawn outside of functions after it has drawn in one, or many numbers.

        """
        state = now()
        if self._after is None:
            self._check_outside(state, num_examples)
        elif not state.is_same(self._after):
            raise NeedsCare
        self._labels.append(self._label)
        if self._label != self._labels[0]:
            raise other_layers(_describe(self._labels[0]), _describe(self._label), len(self._labels))
        self._end = self._turn or self._outside
        assert self._end is not None
        go_to(self._end)

    @property
    def has_turn(self) -> bool:
        """Whether the current pass may draw in a function at once, or else must wait until all passes have met."""
        return self._may_take_turns and self._after is None

    def begin_turn(self, label: str, num_examples: Optional[int], is_shared: bool) -> None:
        """Called before a function draws.

        Args:
            label (str): What the function is.
            num_examples (int): Number of examples in the pass, if known.
            is_shared (bool): Whether all passes draw the same.

        """
        self._check_outside(now(), num_examples)
        self._label = label
        state = self._outside if is_shared else self._turn or self._outside
        assert state is not None
        go_to(state)

    def end_turn(self) -> None:
        """Called after a function has drawn."""
        if not self.is_careful:
            self._turn = self._after = now()
        elif self._start is not None:
            go_to(self._start)  # where all passes have drawn

    def look(self, num_examples: Optional[int]) -> None:
        """Called before each function and link, to tell single draws from one that gives a number to each example."""
        if self.is_careful:
            state, last = now(), self._last or self._start
            assert last is not None
            if not state.is_same(last):
                words = words_between(last, state)
                self._has_many = self._has_many or _may_be_one_each(words, num_examples)
                self._last = state

    def _reset(self) -> None:
        self._start = self._outside = self._turn = self._after = self._last = None
        self._has_many = False
        self._may_differ = False  # whether passes may have drawn a number for each example
        self._is_shared = False  # whether they certainly have not
        self._num_examples: Optional[int] = None  # in the first pass
        self._was_interrupted = False
        self._labels: List[str] = []  # of the functions in which the passes have drawn

    def _check_outside(self, state: State, num_examples: Optional[int]) -> None:
        """Checks what the current pass has drawn outside of functions."""
        start, first = self._start, self._outside
        assert start is not None
        self.look(num_examples)
        if first is None:
            self._outside, self._num_examples = state, num_examples
        has_drawn = not state.is_same(start)
        if (first is None and not self._was_interrupted) or not (has_drawn or self._outside_must_be_drawn(start)):
            return
        if first is None or not state.is_same(first):
            raise RuntimeError(_OUTSIDE.format(what="different ones, or a different number of them"))
        if num_examples is not None and num_examples != self._num_examples is not None:
            self._is_shared = True  # micro-batches of other sizes have drawn as many
        if self.is_careful:
            self._may_differ = self._may_differ or self._has_many
        else:
            self._may_differ = self._may_differ or _may_be_one_each(words_between(start, state), num_examples)

    def _outside_must_be_drawn(self, start: State) -> bool:
        """Returns whether a pass must have drawn outside of functions, because the first has, and not to initialize."""
        return not (self._may_initialize or self._outside is None or self._outside.is_same(start))


def _may_be_one_each(words: Optional[int], num_examples: Optional[int]) -> bool:
    """Returns whether there may have been one number for each example, of 32 bits or more, or a permutation."""
    return words is None or num_examples is None or words >= num_examples - 1


def _describe(label: str) -> str:
    return f"random numbers of {label}" if label else "none"
