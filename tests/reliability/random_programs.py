"""Random training programs: a model, an optimizer and options, drawn from one seed, and made smaller if they fail."""

from __future__ import annotations

import random
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import chainer_accum  # noqa: F401
from chainer import optimizer_hooks as hooks
from chainer import optimizers
from model_modifiers import MODIFIERS
from model_pieces import NOT_TWICE, PIECES
from model_watchers import WATCHERS
from random_models import NORMALIZATIONS, REPORTS, TWISTS, Task

WAYS = ("updater", "block", "wrapped optimizer", "wrapped optimizer, own backward pass", "cached")
# A small eps: where a gradient is nearly zero, these would else make large steps of its rounding.
OPTIMIZERS: Dict[str, Callable[[], Any]] = {
    "SGD": lambda: optimizers.SGD(0.1),
    "MomentumSGD": lambda: optimizers.MomentumSGD(0.1),
    "CorrectedMomentumSGD": lambda: optimizers.CorrectedMomentumSGD(0.1),
    "NesterovAG": lambda: optimizers.NesterovAG(0.1),
    "Adam": lambda: optimizers.Adam(eps=1e-3),
    "AdamW": lambda: optimizers.AdamW(eps=1e-3, weight_decay_rate=0.1),
    "AMSGrad": lambda: optimizers.AMSGrad(eps=1e-3),
    "AdaGrad": lambda: optimizers.AdaGrad(0.1, eps=1e-3),
    "AdaDelta": lambda: optimizers.AdaDelta(eps=1e-3),
    "RMSprop": lambda: optimizers.RMSprop(eps=1e-3),
    "RMSpropGraves": lambda: optimizers.RMSpropGraves(eps=1e-3),
    "SMORMS3": lambda: optimizers.SMORMS3(eps=1e-3),
    "MSVAG": lambda: optimizers.MSVAG(0.01),
}


def _noise(xp: Any, shape: Any, dtype: Any, hook: Any, optimizer: Any) -> Any:
    return xp.full(shape, 0.01, dtype)


HOOKS: Dict[str, Callable[[], Any]] = {
    "WeightDecay": lambda: hooks.WeightDecay(0.01),
    "Lasso": lambda: hooks.Lasso(0.01),
    "GradientClipping": lambda: hooks.GradientClipping(0.5),
    "GradientHardClipping": lambda: hooks.GradientHardClipping(-0.05, 0.05),
    "GradientLARS": lambda: hooks.GradientLARS(),
    "GradientNoise": lambda: hooks.GradientNoise(0.1, noise_func=_noise),
}


class Window(NamedTuple):
    """The micro-batches of a window, as lists of numbers of examples, and how many epochs end in it."""

    parts: List[List[int]]
    epochs: int


class Program(NamedTuple):
    """A training program. With the defaults, it is the smallest that there is."""

    way: str = "updater"
    pieces: Tuple[Tuple[str, str], ...] = ()
    watchers: Tuple[str, ...] = ()
    twists: Tuple[str, ...] = ()
    normalization: str = "examples"
    reports: str = "none"
    loss_func: str = "model"
    converter: str = "concat_examples"
    size: int = 24
    batch_size: int = 4
    steps: int = 2
    micro_batch_size: Optional[int] = None
    epoch_boundary: str = "carry"
    repeat: bool = True
    updates: int = 1
    optimizer: str = "SGD"
    hooks: Tuple[str, ...] = ()
    has_rule_hook: bool = False
    loss_scale: Any = None  # a number, or "dynamic"
    nonfinite: str = "keep"
    spoilt: Tuple[int, ...] = ()  # examples that are not finite
    prefetch: bool = False
    split_when_out_of_memory: Optional[bool] = None
    copy: str = ""
    debug: bool = False
    seed: int = 0  # of the initial parameters

    @property
    def task(self) -> Task:
        return Task(self.pieces, self.watchers, self.twists, self.normalization, self.reports)

    @property
    def is_own_pass(self) -> bool:
        return self.way.endswith("own backward pass")

    def windows(self) -> List[Window]:
        """Returns what its windows are, as the documentation has it."""
        windows = []
        position, is_over = 0, False
        while len(windows) < self.updates and not is_over:
            window = Window([], 0)
            for _ in range(self.steps):
                end = position + self.batch_size
                ends_epoch = end >= self.size
                batch = range(position, end if self.repeat else min(end, self.size))
                window = Window(
                    window.parts + self._split([number % self.size for number in batch]), window.epochs + ends_epoch
                )
                position = end % self.size
                is_over = ends_epoch and not self.repeat
                if is_over or (ends_epoch and self.epoch_boundary == "flush"):
                    break
            windows.append(window)
        return windows

    def is_finite(self, part: List[int]) -> bool:
        return not set(part) & set(self.spoilt)

    def _split(self, batch: List[int]) -> List[List[int]]:
        count = 1 if self.micro_batch_size is None else -(-len(batch) // self.micro_batch_size)
        ends = [len(batch) * (part + 1) // count for part in range(count)]
        return [batch[start:end] for start, end in zip([0, *ends], ends)]

    def __repr__(self) -> str:
        """Returns what is not as in the smallest program."""
        fields = [f"{name}={value!r}" for name, value in self._asdict().items() if value != self._field_defaults[name]]
        return f"Program({', '.join(fields)})"


def is_sensible(program: Program) -> bool:
    """Returns whether StandardUpdater can run it, and micro-batches are to give the same."""
    pieces, modifiers = [{piece[index] for piece in program.pieces} for index in (0, 1)]
    twists, watchers, is_cached = set(program.twists), set(program.watchers), program.way == "cached"
    windows = program.windows()
    kept = [sum(filter(program.is_finite, window.parts), []) for window in windows]
    conflicts = (
        len(windows) < program.updates,
        program.batch_size > program.size,
        not all(kept) or 0 not in kept[0],  # the first example has a label and a weight, so there is a gradient
        bool(program.spoilt) and program.nonfinite != "skip",
        program.nonfinite != "keep" and is_cached,
        # Chainer cannot do it.
        "gradient penalty" in twists
        and (pieces & NOT_TWICE or modifiers & {"forgotten", "without graph", "unchained"} or "in forget" in watchers),
        "adversarial examples" in twists and "unchained" in modifiers,
        program.loss_scale is not None and ("forgotten" in modifiers or "in forget" in watchers),  # it leaves it there
        # It depends on the batch.
        "constant loss" in twists and (program.normalization != "examples" or program.spoilt or program.watchers),
        program.normalization != "examples" and is_cached,
        bool(twists & {"adversarial examples", "window within the loss", "constant loss"}) and is_cached,
        # The pass of the loss function ends at the representations.
        {"own backward pass", "link outside the target"} <= twists and is_cached,
        # What the caller's own passes move is for the caller.
        program.is_own_pass and (program.spoilt or "link outside the target" in twists),
        bool(program.watchers) and program.way not in ("updater", "block"),
        program.prefetch and program.way != "updater",
        program.converter != "concat_examples" and program.way not in ("updater", "cached"),
        program.split_when_out_of_memory is not None and program.way not in ("updater", "cached"),
        program.loss_func != "model" and is_cached,
    )
    return not any(conflicts)


def draw(seed: int, way: str) -> Program:
    """Returns the random program of a seed."""
    generator = random.Random(f"{seed} {way}")
    while True:
        program = _draw(generator, way, seed)
        if is_sensible(program):
            return program


def _draw(generator: random.Random, way: str, seed: int) -> Program:
    def some(names: Any, most: int) -> Tuple[str, ...]:
        names = list(names)
        return tuple(generator.sample(names, min(generator.randint(0, most), len(names))))

    def often(default: Any, *others: Any) -> Any:
        return default if generator.random() < 0.6 else generator.choice(others)

    size = generator.randint(6, 40)
    spoilt = tuple(sorted(generator.sample(range(1, size), generator.randint(1, 2))))
    nonfinite = often("keep", "skip", "raise")
    return Program(
        way=way,
        pieces=tuple((name, often("", *MODIFIERS)) for name in some(PIECES, 3)),
        watchers=some(WATCHERS, 2) if generator.random() < 0.5 else (),
        twists=some(TWISTS, 2),
        normalization=often("examples", *NORMALIZATIONS),
        reports=often("none", *REPORTS),
        loss_func=often("model", "bound method", "partial"),
        converter=often("concat_examples", "one that reports and is configured"),
        size=size,
        batch_size=generator.randint(1, 12),
        steps=generator.randint(1, 4),
        micro_batch_size=often(None, 1, 2, 3, 5),
        epoch_boundary=often("carry", "flush"),
        repeat=often(True, False),
        updates=generator.randint(1, 3),
        optimizer=generator.choice(list(OPTIMIZERS)),
        hooks=some(HOOKS, 2),
        has_rule_hook=often(False, True),
        loss_scale=often(None, 128.0, "dynamic"),
        nonfinite=nonfinite,
        spoilt=often((), spoilt) if nonfinite == "skip" else (),
        prefetch=often(False, True),
        split_when_out_of_memory=often(None, False, True),
        copy=often("", "deepcopy", "pickle"),
        debug=often(False, True),
        seed=seed % 5,
    )


def smaller(program: Program) -> Iterator[Program]:
    """Returns an iterator over programs that are the same but for one thing, which is simpler."""
    for name, value in program._asdict().items():
        default = Program._field_defaults[name]
        candidates = [default] if value != default and name != "way" else []
        if name == "pieces":
            candidates += [(*value[:i], (piece, ""), *value[i + 1 :]) for i, (piece, _) in enumerate(value)]
        if isinstance(value, tuple) and len(value) > 1:
            candidates += [(*value[:i], *value[i + 1 :]) for i in range(len(value))]
        for candidate in candidates:
            simpler = program._replace(**{name: candidate})
            if simpler != program and is_sensible(simpler):
                yield simpler
