"""The ways to run a random program: StandardUpdater, and each way to accumulate."""

from __future__ import annotations

import functools
from typing import Any, Dict, List, Optional, Tuple

import chainer_accum
import chainer
import numpy
from chainer import optimizer_hooks
from chainer.iterators import SerialIterator
from chainer.training.updaters import StandardUpdater
from random_models import NORMALIZATIONS, Batch, Model, make_examples
from random_programs import HOOKS, OPTIMIZERS, Program, Window


def make_optimizer(program: Program) -> Any:
    """Returns an optimizer that has been set up with the model of the program."""
    numpy.random.seed(program.seed)
    optimizer = OPTIMIZERS[program.optimizer]()
    optimizer.setup(Model(program.task))
    for name in program.hooks:
        optimizer.add_hook(HOOKS[name]())
    if program.has_rule_hook:
        for param in {id(param): param for param in optimizer.target.params()}.values():  # some are in two links
            param.update_rule.add_hook(optimizer_hooks.WeightDecay(0.02))
    if program.loss_scale == "dynamic":
        optimizer.loss_scaling(interval=2)
    elif program.loss_scale is not None:
        optimizer.loss_scaling(scale=program.loss_scale)
    return optimizer


def make_loss_func(program: Program, model: Model) -> Any:
    if program.way == "cached":
        return model.encode_and_compare
    ways = {"model": model, "bound method": model.forward, "partial": functools.partial(model)}
    return ways[program.loss_func]


def convert(batch: List[Any], device: Any) -> Tuple[Any, ...]:
    """A converter that depends on the configuration, which is one of each thread, and that reports."""
    x, *rest = chainer.dataset.concat_examples(batch, device)
    chainer.report({"converted": 1.0})
    return (x * chainer.config.scale_of_programs, *rest)


def converter_of(program: Program) -> Any:
    return chainer.dataset.concat_examples if program.converter == "concat_examples" else convert


def weight_of(program: Program, examples: List[Any]) -> Any:
    weigh = NORMALIZATIONS[program.normalization].weight
    return len(examples) if weigh is None else weigh(Batch(*chainer.dataset.concat_examples(examples)))


def rules_of(program: Program) -> Optional[Dict[str, str]]:
    """Returns the rules for what the loss of a program reports: a sum of examples is added up."""
    return {"main/loss": "sum"} if program.normalization == "sum" else None


class ListIterator(chainer.dataset.Iterator):
    """Gives batches that it has been given."""

    epoch, is_new_epoch, epoch_detail = 0, False, 0.0

    def __init__(self, batches: List[Any]) -> None:
        self._batches = batches

    def __next__(self) -> Any:
        return self._batches.pop(0)

    next = __next__


class Standard:
    """StandardUpdater with the examples of each window that are not to be skipped as one batch."""

    def __init__(self, program: Program) -> None:
        self.optimizer = make_optimizer(program)
        examples = make_examples(program.size, program.spoilt)
        batches = [
            [examples[number] for part in window.parts if program.is_finite(part) for number in part]
            for window in program.windows()
        ]
        loss_func = make_loss_func(program, self.optimizer.target)
        self._updater = StandardUpdater(
            ListIterator(batches), self.optimizer, converter_of(program), loss_func=loss_func
        )

    def calls(self, window: Window) -> List[Tuple[Any, ...]]:
        """Returns the arguments of each call that an update takes."""
        return [()]

    def call(self) -> None:
        self._updater.update()


class Updater:
    """One of the updaters that accumulate."""

    def __init__(self, program: Program) -> None:
        optimizer = make_optimizer(program)
        model = optimizer.target
        kwargs: Dict[str, Any] = {
            "accumulation_steps": program.steps,
            "micro_batch_size": program.micro_batch_size,
            "epoch_boundary": program.epoch_boundary,
            "split_when_out_of_memory": program.split_when_out_of_memory,
        }
        updater_class: Any = chainer_accum.CachedGradientUpdater
        if program.way == "cached":
            kwargs.update(encoder=model.encode, loss_func=model.compare)
        else:
            updater_class = chainer_accum.AccumulatingUpdater
            is_plain = program.normalization in ("examples", "sum")
            kwargs.update(
                loss_func=None if program.loss_func == "model" else make_loss_func(program, model),
                weight_func=None if is_plain else functools.partial(weight_of, program),
                loss_reduction="sum" if program.normalization == "sum" else "mean",
                observation_rules=rules_of(program),
                nonfinite=program.nonfinite,
                running_statistics="update" if program.watchers else "micro_batch",
                prefetch=program.prefetch,
            )
        examples = make_examples(program.size, program.spoilt)
        iterator = SerialIterator(examples, program.batch_size, repeat=program.repeat, shuffle=False)
        self._updater = updater_class(iterator, optimizer, converter_of(program), **kwargs)

    @property
    def optimizer(self) -> Any:
        return self._updater.get_optimizer("main")

    def calls(self, window: Window) -> List[Tuple[Any, ...]]:
        return [()]

    def call(self) -> None:
        self._updater.update()


class Block:
    """A loop with accumulate."""

    def __init__(self, program: Program) -> None:
        self.optimizer = make_optimizer(program)
        self._program = program
        self._examples = make_examples(program.size, program.spoilt)

    def calls(self, window: Window) -> List[Tuple[Any, ...]]:
        return [(window,)]

    def call(self, window: Window) -> None:
        program = self._program
        reduction = "sum" if program.normalization == "sum" else "mean"
        statistics = "update" if program.watchers else "micro_batch"
        loss_func = make_loss_func(program, self.optimizer.target)
        with chainer_accum.accumulate(
            self.optimizer,
            loss_reduction=reduction,
            nonfinite=program.nonfinite,
            running_statistics=statistics,
            observation_rules=rules_of(program),
        ) as block:
            for part in window.parts:
                examples = [self._examples[number] for number in part]
                weight = weight_of(program, examples)
                block.add(loss_func, *chainer.dataset.concat_examples(examples), weight=weight)


class Wrapped:
    """A loop with a wrapped optimizer, which may be copied within a window."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._examples = make_examples(program.size, program.spoilt)
        self._steps = max(len(window.parts) for window in program.windows())
        self._wrapped = chainer_accum.create_accumulating_optimizer(
            make_optimizer(program),
            self._steps,
            loss_reduction="sum" if program.normalization == "sum" else "mean",
            nonfinite=program.nonfinite,
        )

    @property
    def optimizer(self) -> Any:
        return getattr(self._wrapped, "actual_optimizer", self._wrapped)

    def calls(self, window: Window) -> List[Tuple[Any, ...]]:
        is_short = len(window.parts) < self._steps
        return [*((part,) for part in window.parts), *([()] if is_short else [])]

    def call(self, *parts: List[int]) -> None:
        if not parts:
            self._wrapped.flush()
        for part in parts:
            self._update([self._examples[number] for number in part])

    def _update(self, examples: List[Any]) -> None:
        weight = weight_of(self._program, examples)
        arrays = chainer.dataset.concat_examples(examples)
        model = self.optimizer.target
        loss_func = make_loss_func(self._program, model)
        if self._program.is_own_pass:
            loss = loss_func(*arrays)
            model.cleargrads()
            loss.backward(loss_scale=self.optimizer._loss_scale)
            loss_func, arrays = None, ()
        self._wrapped.update_weighted(weight, loss_func, *arrays)


RUNNERS: Dict[str, Any] = {
    "updater": Updater,
    "cached": Updater,
    "block": Block,
    "wrapped optimizer": Wrapped,
    "wrapped optimizer, own backward pass": Wrapped,
}
