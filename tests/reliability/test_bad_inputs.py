"""Bad input is refused with an error that names the argument, the value and the remedy: here is all of it."""

from __future__ import annotations

import types

import chainer_accum
import chainer
import chainer.functions as F
import numpy
import pytest
from chainer_accum import (
    AccumulatingUpdater,
    CachedGradientUpdater,
    TokenBudget,
    accumulate,
    check_equivalence,
    create_accumulating_optimizer,
    load_snapshot,
    setup_trainer_with_accumulation,
    train_model,
)
from chainer import optimizers
from chainer.training import Trainer
from chainer.training.updaters import StandardUpdater
from chainer_accum.extensions import (
    Accumulate,
    ExampleMean,
    ExponentialMovingAverage,
    GradientNoiseScale,
    LearningRateSurvey,
    TensorBoardReport,
)

from helpers import make_dataset, make_model, serial

STEPS = "must be an int of 1 or more, got {}; use 1 to disable accumulation"
SIZE = "must be an int of 1 or more, got {}; use None to leave batches whole, 'auto' to find the fastest, a "
SIZE += "TokenBudget, or a function"
NUMBER = "must be a number, got {}; give the number of examples, tokens or valid labels"
FINITE = "must be finite and not negative, got {}; use 0 to leave a micro-batch out"
TOKENS = "max_tokens must be an int of 1 or more, got {}; use 'auto' to find the fastest"
LENGTH = "the value of length_func must be an int of 0 or more, got {}; return a length, or a tuple of lengths"
CUT = "micro_batch_size must return each example once, in lists that are not empty, got {} from <function "
BYTES = "memory_limit must be an int of 1 or more, got {}; give bytes, or a share such as '80%'"
SHARE = "memory_limit must be between '0%' and '100%', got {}; give bytes, or a share such as '80%'"
NOT_SET_UP = "must be set up with a model, got {} without one; call optimizer.setup(model) first"
LOSS = "the loss function must return a chainer.Variable, got {}; return the loss as one scalar Variable"
SCALAR = "the loss must be a scalar, got a Variable of shape {}; reduce it, for example with F.mean(loss)"
SCALE = "loss_scale must be a positive number, got {}; for dynamic scaling, call optimizer.loss_scaling()"
PAIRS = (
    "the loss function must return the loss, a pair (loss, weight) whose weight is a number or an array, or a list of "
    "such pairs, got {}; report other values with chainer.report, and return the array of a Variable as the weight"
)
EPOCHS = "num_epochs must be an int of 1 or more, got {}; give the number of epochs to train for"


def iterator(batch_size=6):
    return serial(make_dataset(), batch_size)


def optimizer():
    return optimizers.SGD(0.1).setup(make_model())


def updater(**kwargs):
    return AccumulatingUpdater(iterator(), optimizer(), **kwargs)


def update(**kwargs):
    """Makes an update, in which bad input is found that cannot be known before."""
    updater(**{"accumulation_steps": 2, **kwargs}).update()


def report_rows(rule):
    """Makes an update whose micro-batches report arrays that differ in their second axis."""
    model, widths = make_model(), iter([1, 2])

    def loss_func(x, t):
        chainer.report({"rows": numpy.zeros((len(x), next(widths)))})
        return model(x, t)

    set_up = optimizers.SGD(0.1).setup(model)
    accumulating = AccumulatingUpdater(
        iterator(), set_up, loss_func=loss_func, accumulation_steps=2, observation_rules={"rows": rule}
    )
    with chainer.Reporter().scope({}):
        chainer.get_current_reporter().add_observer("main", model)
        accumulating.update()


def update_with(next_batch, **kwargs):
    batches = iterator()
    batches.next = next_batch
    AccumulatingUpdater(batches, optimizer(), **kwargs).update()


def add(lossfun=None, **kwargs):
    with accumulate(optimizer()) as window:
        lossfun = lossfun or window._optimizer.target
        window.add(lossfun, *chainer.dataset.concat_examples(make_dataset(4)), **kwargs)


def enter(*args, **kwargs):
    with accumulate(*args, **kwargs):
        pass


def skip(answer):
    with accumulate(optimizer(), skip_update=lambda window: answer) as window:
        window.add(window._optimizer.target, *chainer.dataset.concat_examples(make_dataset(4)))


def multi_node():
    from chainermn.optimizers import _MultiNodeOptimizer  # without create_multi_node_optimizer, which asks for MPI

    return _MultiNodeOptimizer(optimizer(), types.SimpleNamespace(size=2), True)


def loss_and(*others):
    """Returns a loss function that returns the loss and something else."""
    return lambda x, t: (F.sum(chainer.Variable(x)), *others)


def add_to_a_window_that_is_over():
    with accumulate(optimizer()) as window:
        pass
    window.update()
    window.add_gradients()


def train(model=None, optimizer=None, train_iter=None, loss_func=None, accumulation_steps=2, num_epochs=1, **options):
    model, optimizer, train_iter = model or make_model(), optimizer or optimizers.SGD(), train_iter or iterator()
    train_model(model, optimizer, train_iter, loss_func, accumulation_steps, num_epochs, **options)


def set_up(optimizer=None, accumulation_steps=2, num_epochs=1, **options):
    setup_trainer_with_accumulation(
        make_model(), iterator(), optimizer or optimizers.SGD(), None, accumulation_steps, num_epochs, **options
    )


def run(extension, updater):
    trainer = Trainer(updater, (1, "iteration"), out="unused")
    extension.initialize(trainer)
    trainer.observation = {"main/loss": 1.0}
    extension(trainer)


class WithoutBatchSize(chainer.dataset.Iterator):
    """An iterator that does not say how large its batches are."""


def average_of_a_growing_model():
    model = chainer.Chain(a=chainer.links.Linear(2, 2))
    average = ExponentialMovingAverage(model)
    model.add_link("b", chainer.links.Linear(2, 2))
    average(None)


class Readable:
    """A name that is of no use, with a short representation."""

    def __repr__(self):
        return "Readable()"


BAD_INPUTS = {
    # AccumulatingUpdater, as it is made
    "no iterator": (
        lambda: AccumulatingUpdater(None, optimizer()),
        TypeError,
        "iterator must be an iterator or a dict of them, got None; create a SerialIterator for the dataset",
    ),
    "a dataset for an iterator": (
        lambda: AccumulatingUpdater([1, 2], optimizer()),
        TypeError,
        "iterator must be an iterator or a dict of them, got [1, 2]; create a SerialIterator for the dataset",
    ),
    "no iterator among iterators": (
        lambda: AccumulatingUpdater({}, optimizer()),
        ValueError,
        "iterator must have the key 'main', got the keys []; name one of them 'main'",
    ),
    "iterators without a main one": (
        lambda: AccumulatingUpdater({"train": iterator()}, optimizer()),
        ValueError,
        "iterator must have the key 'main', got the keys ['train']; name one of them 'main'",
    ),
    "no optimizer": (
        lambda: AccumulatingUpdater(iterator(), None),
        TypeError,
        "optimizer must be an optimizer or a dict of them, got None; pass the optimizer as the second argument",
    ),
    "optimizers without a main one": (
        lambda: AccumulatingUpdater(iterator(), {"generator": optimizer()}),
        ValueError,
        "optimizer must have the key 'main', got the keys ['generator']; name one of them 'main'",
    ),
    "the class of an optimizer": (
        lambda: AccumulatingUpdater(iterator(), optimizers.Adam),
        TypeError,
        "optimizer 'main' must be an instance, got the class Adam; write Adam()",
    ),
    "an optimizer without a model": (
        lambda: AccumulatingUpdater(iterator(), optimizers.SGD()),
        ValueError,
        "optimizer 'main' " + NOT_SET_UP.format("SGD"),
    ),
    "a second optimizer without a model": (
        lambda: AccumulatingUpdater(iterator(), {"main": optimizer(), "other": optimizers.Adam()}),
        ValueError,
        "optimizer 'other' " + NOT_SET_UP.format("Adam"),
    ),
    "an int for a converter": (
        lambda: AccumulatingUpdater(iterator(), optimizer(), 4),
        TypeError,
        "converter must be callable, got 4; to accumulate, pass accumulation_steps or micro_batch_size by keyword",
    ),
    "no converter": (lambda: updater(converter=None), TypeError, "converter must be callable, got None; to accumulate"),
    "a name for a loss function": (
        lambda: updater(loss_func="mse"),
        TypeError,
        "loss_func must be callable, got 'mse'; pass a function",
    ),
    "a weight for a weight function": (
        lambda: updater(weight_func=0.5),
        TypeError,
        "weight_func must be callable, got 0.5; pass a function",
    ),
    "a weight function of two arguments": (
        lambda: updater(weight_func=lambda batch, scale: len(batch)),
        TypeError,
        "weight_func must take one list of examples, or nothing, got <function ",
    ),
    "no steps": (lambda: updater(accumulation_steps=0), ValueError, "accumulation_steps " + STEPS.format("0")),
    "negative steps": (lambda: updater(accumulation_steps=-2), ValueError, "accumulation_steps " + STEPS.format("-2")),
    "steps in floating point": (
        lambda: updater(accumulation_steps=2.0),
        TypeError,
        "accumulation_steps " + STEPS.format("2.0"),
    ),
    "steps that are True": (
        lambda: updater(accumulation_steps=True),
        TypeError,
        "accumulation_steps " + STEPS.format("True"),
    ),
    "steps that are None": (
        lambda: updater(accumulation_steps=None),
        TypeError,
        "accumulation_steps " + STEPS.format("None"),
    ),
    "an empty schedule": (
        lambda: updater(accumulation_steps={}),
        ValueError,
        "accumulation_steps must map epochs to numbers, got {}; give at least one epoch and its number",
    ),
    "a schedule from before the first epoch": (
        lambda: updater(accumulation_steps={-1: 2}),
        ValueError,
        "an epoch in accumulation_steps must be an int of 0 or more, got -1; count epochs from 0",
    ),
    "a schedule by name": (
        lambda: updater(accumulation_steps={"late": 2}),
        TypeError,
        "an epoch in accumulation_steps must be an int of 0 or more, got 'late'; count epochs from 0",
    ),
    "a schedule with no steps": (
        lambda: updater(accumulation_steps={0: 1, 5: 0}),
        ValueError,
        "accumulation_steps[5] " + STEPS.format("0"),
    ),
    "a schedule that returns nothing": (
        lambda: update(accumulation_steps=lambda updater: None),
        TypeError,
        "the value of accumulation_steps " + STEPS.format("None"),
    ),
    "no steps later": (
        lambda: setattr(updater(), "accumulation_steps", 0),
        ValueError,
        "accumulation_steps " + STEPS.format("0"),
    ),
    "an effective batch that is no number of iterator batches": (
        lambda: updater(effective_batch_size=100),
        ValueError,
        "effective_batch_size must be a multiple of 6 (iterator batches of 6 on 1 rank), got 100; use 96 or 102, or "
        "another batch size of the iterator",
    ),
    "an effective batch that is smaller than an iterator batch": (
        lambda: updater(effective_batch_size=4),
        ValueError,
        "effective_batch_size must be a multiple of 6 (iterator batches of 6 on 1 rank), got 4; use 6, or another",
    ),
    "an effective batch that does not divide in a later epoch": (
        lambda: updater(effective_batch_size={0: 12, 5: 20}),
        ValueError,
        "effective_batch_size[5] must be a multiple of 6 (iterator batches of 6 on 1 rank), got 20; use 18 or 24, or",
    ),
    "a function that returns an effective batch that does not divide": (
        lambda: updater(effective_batch_size=lambda updater: 20).update(),
        ValueError,
        "the value of effective_batch_size must be a multiple of 6 (iterator batches of 6 on 1 rank), got 20; use 18",
    ),
    "an effective batch of no examples": (
        lambda: updater(effective_batch_size=0),
        ValueError,
        "effective_batch_size must be an int of 1 or more, got 0; give the number of examples per update",
    ),
    "an effective batch by name": (
        lambda: updater(effective_batch_size="auto"),
        TypeError,
        "effective_batch_size must be an int of 1 or more, got 'auto'; give the number of examples per update",
    ),
    "an empty schedule of effective batches": (
        lambda: updater(effective_batch_size={}),
        ValueError,
        "effective_batch_size must map epochs to numbers, got {}; give at least one epoch and its number",
    ),
    "an effective batch as well as steps": (
        lambda: updater(effective_batch_size=12, accumulation_steps=2),
        ValueError,
        "effective_batch_size must be None with accumulation_steps, got effective_batch_size=12 and "
        "accumulation_steps=2; give one of them",
    ),
    "an effective batch of batches of unknown size": (
        lambda: AccumulatingUpdater(WithoutBatchSize(), optimizer(), effective_batch_size=12),
        TypeError,
        "iterator must have a batch_size of 1 or more for effective_batch_size, got WithoutBatchSize with None; use "
        "accumulation_steps instead",
    ),
    "an effective batch that is set later": (
        lambda: setattr(updater(), "effective_batch_size", 12),
        AttributeError,
        "effective_batch_size cannot be set, got 12; pass it when the updater is created: AccumulatingUpdater(..., e",
    ),
    "no examples in a micro-batch": (
        lambda: updater(micro_batch_size=0),
        ValueError,
        "micro_batch_size " + SIZE.format("0"),
    ),
    "a size by another name": (
        lambda: updater(micro_batch_size="fast"),
        TypeError,
        "micro_batch_size " + SIZE.format("'fast'"),
    ),
    "no tokens in a micro-batch": (lambda: TokenBudget(0, len), ValueError, TOKENS.format("0")),
    "tokens in floating point": (lambda: TokenBudget(4096.0, len), TypeError, TOKENS.format("4096.0")),
    "a budget by another name": (lambda: TokenBudget("fast", len), TypeError, TOKENS.format("'fast'")),
    "a length for a length function": (
        lambda: TokenBudget(4096, 12),
        TypeError,
        "length_func must be callable, got 12; pass a function that returns the length of an example",
    ),
    "a number of batches to sort": (
        lambda: TokenBudget(4096, len, across_window=4),
        TypeError,
        "across_window must be True or False, got 4; use True to sort the examples of a whole update",
    ),
    "a budget for the number of iterator batches": (
        lambda: updater(accumulation_steps=TokenBudget(4096, abs)),
        TypeError,
        "accumulation_steps must be an int of 1 or more, got TokenBudget(4096, <built-in function abs>, across_window=",
    ),
    "an effective batch whose tokens are to be found": (
        lambda: updater(effective_batch_size=TokenBudget("auto", len)),
        ValueError,
        "effective_batch_size must have a number of tokens and nothing else, got TokenBudget('auto', <built-in",
    ),
    "an effective batch that sorts": (
        lambda: updater(effective_batch_size=TokenBudget(64, len, across_window=True)),
        ValueError,
        "effective_batch_size must have a number of tokens and nothing else, got TokenBudget(64, <built-in function",
    ),
    "the class of a budget": (
        lambda: updater(micro_batch_size=TokenBudget),
        TypeError,
        "micro_batch_size must be an int of 1 or more, got <class 'chainer_accum.batches.token_budget.TokenBudget'>",
    ),
    "a search that may not restart": (
        lambda: updater(micro_batch_size=TokenBudget("auto", len), split_when_out_of_memory=False),
        ValueError,
        "split_when_out_of_memory must not be False with micro_batch_size='auto', got False; a size that is",
    ),
    "a memory limit that is a fraction": (
        lambda: updater(micro_batch_size="auto", memory_limit=0.8),
        TypeError,
        BYTES.format("0.8"),
    ),
    "no memory": (lambda: updater(micro_batch_size="auto", memory_limit=0), ValueError, BYTES.format("0")),
    "a memory limit in another unit": (
        lambda: updater(micro_batch_size="auto", memory_limit="8 GB"),
        ValueError,
        SHARE.format("'8 GB'"),
    ),
    "more memory than there is": (
        lambda: updater(micro_batch_size="auto", memory_limit="120%"),
        ValueError,
        SHARE.format("'120%'"),
    ),
    "a memory limit without a search": (
        lambda: updater(micro_batch_size=4, memory_limit="80%"),
        ValueError,
        "memory_limit must be None unless the size of micro-batches is searched for, got '80%'; set micro_batch_size=",
    ),
    "splitting that is no choice": (
        lambda: updater(split_when_out_of_memory=1),
        TypeError,
        "split_when_out_of_memory must be True or False, got 1; use None for the default",
    ),
    "an unknown reduction": (
        lambda: updater(loss_reduction="max"),
        ValueError,
        "loss_reduction must be one of 'mean', 'sum', got 'max'",
    ),
    "an unknown boundary": (
        lambda: updater(epoch_boundary=None),
        ValueError,
        "epoch_boundary must be one of 'carry', 'flush', got None",
    ),
    "an unknown way with what is not finite": (
        lambda: updater(nonfinite="ignore"),
        ValueError,
        "nonfinite must be one of 'keep', 'skip', 'raise', got 'ignore'",
    ),
    "an unknown time for batch statistics": (
        lambda: updater(running_statistics="epoch"),
        ValueError,
        "running_statistics must be one of 'micro_batch', 'update', got 'epoch'",
    ),
    "an unknown store": (
        lambda: updater(lockstep="disk"),
        ValueError,
        "lockstep must be None, 'memory', 'host', 'file' or an existing folder, got 'disk'; create the folder first, "
        "or use lockstep='file' for the system's folder for temporary files",
    ),
    "a store that is True": (
        lambda: updater(lockstep=True),
        TypeError,
        "lockstep must be None, 'memory', 'host', 'file' or a folder, got bool; use lockstep='memory' to keep what is "
        "needed in memory",
    ),
    "lockstep that is to skip": (
        lambda: updater(lockstep="memory", nonfinite="skip"),
        ValueError,
        "nonfinite must not be 'skip' with lockstep, got 'skip': a micro-batch cannot be taken out of the statistics "
        "of the whole batch; use 'keep' or 'raise', or lockstep=None",
    ),
    "lockstep with buffers that are used again": (
        lambda: updater(lockstep="memory", converter=chainer.dataset.ConcatWithAsyncTransfer()),
        ValueError,
        "converter must not be ConcatWithAsyncTransfer with lockstep, got both; it would overwrite a buffer of a "
        "micro-batch that waits; use concat_examples",
    ),
    "an unknown rule": (
        lambda: updater(observation_rules={"main/loss": "median"}),
        ValueError,
        "observation_rules['main/loss'] must be one of 'mean', 'sum', 'last', 'max', 'min', 'concat', got 'median'",
    ),
    "a rule that is no function": (
        lambda: updater(observation_rules={"main/loss": 2}),
        TypeError,
        "observation_rules['main/loss'] must be callable, got 2; pass a function of values and weights, or one of ",
    ),
    "a rule that takes no weights": (
        lambda: updater(observation_rules={"main/loss": max}),
        TypeError,
        "observation_rules['main/loss'] must be a function of a list of values and a list of weights, got <built-in",
    ),
    "a rule that takes axes for the weights": (
        lambda: updater(observation_rules={"main/loss": numpy.mean}),
        TypeError,
        "observation_rules['main/loss'] must be a function of a list of values and a list of weights, got <function m",
    ),
    "values that cannot be concatenated": (
        lambda: report_rows("concat"),
        ValueError,
        "'rows' must have the same shape in all micro-batches, except along axis 0, for the rule 'concat', got (6, 1), "
        "(6, 2); report an array whose other axes do not depend on the micro-batch, or give this key a function",
    ),
    "values that have no largest one": (
        lambda: report_rows("max"),
        ValueError,
        "'rows' must have the same shape in all micro-batches for the rule 'max', got (6, 1) and (6, 2); report",
    ),
    "a rule that says that the data has ended": (
        lambda: report_rows(lambda values, weights: next(iter([]))),
        RuntimeError,
        "observation_rules['rows'] must not raise StopIteration, got it from <function ",
    ),
    "rules that are no dict": (
        lambda: updater(observation_rules="sum"),
        TypeError,
        "observation_rules must be a dict, got 'sum'; map keys such as 'main/loss' to a rule",
    ),
    "a loss scale of zero": (lambda: updater(loss_scale=0), ValueError, SCALE.format("0")),
    "a loss scale that is NaN": (lambda: updater(loss_scale=numpy.nan), ValueError, SCALE.format("nan")),
    "a loss scale by name": (lambda: updater(loss_scale="dynamic"), ValueError, SCALE.format("'dynamic'")),
    # AccumulatingUpdater, as it updates
    "a weight that is None": (
        lambda: update(weight_func=lambda batch: None),
        TypeError,
        "the value of weight_func " + NUMBER.format("None"),
    ),
    "a weight that is infinite": (
        lambda: update(weight_func=lambda batch: numpy.inf),
        ValueError,
        "the value of weight_func " + FINITE.format("inf"),
    ),
    "a weight that is negative": (
        lambda: update(weight_func=lambda batch: -1),
        ValueError,
        "the value of weight_func " + FINITE.format("-1.0"),
    ),
    "a loss that is None": (lambda: update(loss_func=lambda x, t: None), TypeError, LOSS.format("NoneType")),
    "a loss that is a float": (lambda: update(loss_func=lambda x, t: 3.0), TypeError, LOSS.format("float")),
    "a loss for each example": (
        lambda: update(loss_func=lambda x, t: F.sum(chainer.Variable(x), axis=1)),
        ValueError,
        SCALAR.format("(6,)"),
    ),
    "a loss without a parameter": (
        lambda: update(loss_func=lambda x, t: F.sum(x)),
        RuntimeError,
        "a loss must depend on the parameters of the optimizer's target, got none that depends on Classifier; compute",
    ),
    "a loss and an accuracy": (
        lambda: update(loss_func=loss_and(chainer.Variable(numpy.ones((), "f")))),
        TypeError,
        PAIRS.format("(Variable, Variable)"),
    ),
    "a loss, a weight and something else": (
        lambda: update(loss_func=loss_and(3, 0.5)),
        TypeError,
        PAIRS.format("(Variable, int, float)"),
    ),
    "a list of losses": (
        lambda: update(loss_func=lambda x, t: [F.sum(chainer.Variable(x))] * 2),
        TypeError,
        PAIRS.format("[Variable, Variable]"),
    ),
    "no loss at all": (lambda: update(loss_func=lambda x, t: []), TypeError, PAIRS.format("[]")),
    "a returned weight that is negative": (
        lambda: update(loss_func=loss_and(-1)),
        ValueError,
        "a weight that the loss function returns " + FINITE.format("-1.0"),
    ),
    "a returned weight that is negative without accumulation": (
        lambda: update(loss_func=loss_and(-1), accumulation_steps=1),
        ValueError,
        "a weight that the loss function returns " + FINITE.format("-1.0"),
    ),
    "a returned weight by name": (
        lambda: update(loss_func=loss_and("all")),
        TypeError,
        "a weight that the loss function returns " + NUMBER.format("'all'"),
    ),
    "a loss in a pair for each example": (
        lambda: update(loss_func=lambda x, t: (F.sum(chainer.Variable(x), axis=1), 6)),
        ValueError,
        SCALAR.format("(6,)"),
    ),
    "a late weight that is None": (
        lambda: update(weight_func=lambda: None),
        TypeError,
        "the value of weight_func " + NUMBER.format("None"),
    ),
    "a number to skip updates by": (
        lambda: updater(skip_update=5.0),
        TypeError,
        "skip_update must be callable, got 5.0; pass a function of the window, or None",
    ),
    "an answer that is None": (
        lambda: update(skip_update=lambda window: None),
        TypeError,
        "skip_update must return True or False, got None; return True to skip the update",
    ),
    "an example that is longer than the budget": (
        lambda: updater(micro_batch_size=TokenBudget(4, lambda example: 5)).update(),
        ValueError,
        "max_tokens must be at least the length of the longest example, got 4 for an example of 5 tokens; increase it",
    ),
    "a length in floating point": (
        lambda: updater(micro_batch_size=TokenBudget(4, lambda example: 2.0)).update(),
        TypeError,
        LENGTH.format("2.0"),
    ),
    "a negative length": (
        lambda: updater(effective_batch_size=TokenBudget(4, lambda example: -1)).update(),
        ValueError,
        LENGTH.format("-1"),
    ),
    "no lengths": (
        lambda: updater(micro_batch_size=TokenBudget(4, lambda example: ())).update(),
        ValueError,
        "the value of length_func must have at least one length, got (); return a length, or a tuple of lengths",
    ),
    "a cut that loses examples": (
        lambda: updater(micro_batch_size=lambda examples: [examples[1:]]).update(),
        ValueError,
        CUT.format("1 missing"),
    ),
    "a cut that repeats examples": (
        lambda: updater(micro_batch_size=lambda examples: [examples, examples[:2]]).update(),
        ValueError,
        CUT.format("2 too many"),
    ),
    "a cut that copies examples": (
        lambda: updater(micro_batch_size=lambda examples: [[tuple([*example]) for example in examples]]).update(),
        ValueError,
        CUT.format("6 too many and 6 missing"),
    ),
    "a cut with an empty list": (
        lambda: updater(micro_batch_size=lambda examples: [examples, []]).update(),
        ValueError,
        CUT.format("an empty list"),
    ),
    "a cut without lists": (
        lambda: updater(micro_batch_size=len).update(),
        TypeError,
        "micro_batch_size must return lists of examples, got 6 from <built-in function len>; return a list for each",
    ),
    "a batch to be gathered by its tokens that is no list": (
        lambda: update_with(tuple, accumulation_steps=1, effective_batch_size=TokenBudget(4, len)),
        TypeError,
        "to be counted by its tokens, a batch must be a list of examples, got a tuple from the iterator; use accumula",
    ),
    "an empty batch": (
        lambda: update_with(list, accumulation_steps=2),
        ValueError,
        "the iterator returned an empty batch, got []; check that the dataset is not empty",
    ),
    "a batch to be split that is no list": (
        lambda: update_with(dict, micro_batch_size=2),
        TypeError,
        "to be split, a batch must be a list of examples, got a dict from the iterator; use accumulation_steps and no",
    ),
    "a batch to be weighted that is no list": (
        lambda: update_with(tuple, accumulation_steps=2),
        TypeError,
        "to be weighted by its examples, a batch must be a list of examples, got a tuple from the iterator; pass a w",
    ),
    # accumulate
    "no optimizer for a window": (
        lambda: enter(None),
        TypeError,
        "optimizer must be an optimizer, got None; pass one such as chainer.optimizers.Adam()",
    ),
    "the class of an optimizer for a window": (
        lambda: enter(optimizers.SGD),
        TypeError,
        "optimizer must be an instance, got the class SGD; write SGD()",
    ),
    "an optimizer without a model for a window": (
        lambda: enter(optimizers.SGD()),
        ValueError,
        "optimizer " + NOT_SET_UP.format("SGD"),
    ),
    "an unknown reduction for a window": (
        lambda: enter(optimizer(), loss_reduction="max"),
        ValueError,
        "loss_reduction must be one of 'mean', 'sum', got 'max'",
    ),
    "an unknown way with what is not finite in a window": (
        lambda: enter(optimizer(), nonfinite=True),
        ValueError,
        "nonfinite must be one of 'keep', 'skip', 'raise', got True",
    ),
    "an unknown time for the running statistics to move": (
        lambda: enter(optimizer(), running_statistics="epoch"),
        ValueError,
        "running_statistics must be one of 'micro_batch', 'update', got 'epoch'",
    ),
    "a negative weight in a window": (lambda: add(weight=-1), ValueError, "weight " + FINITE.format("-1.0")),
    "a weight by name in a window": (lambda: add(weight="all"), TypeError, "weight " + NUMBER.format("'all'")),
    "a loss that is no Variable in a window": (lambda: add(lambda x, t: x), TypeError, LOSS.format("ndarray")),
    "a weight that is a function of something": (
        lambda: add(weight=lambda examples: 1),
        TypeError,
        "weight must be a number or a function without arguments, got ",
    ),
    "a weight that is a function that returns nothing": (
        lambda: add(weight=lambda: None),
        TypeError,
        "the value of weight " + NUMBER.format("None"),
    ),
    "a norm for an answer": (
        lambda: skip(numpy.ones(2)),
        TypeError,
        "skip_update must return True or False, got array([1., 1.]); return True to skip the update",
    ),
    "an answer for each parameter": (
        lambda: skip(numpy.array([True])),
        TypeError,
        "skip_update must return True or False, got array([ True]); return True to skip the update",
    ),
    "a word for an update": (
        lambda: enter(optimizer(), update="no"),
        TypeError,
        "update must be True or False, got 'no'; use False to update with the gradients yourself",
    ),
    "skipping an update that is left out": (
        lambda: enter(optimizer(), update=False, skip_update=bool),
        ValueError,
        "skip_update must be None with update=False, got both; decide before you call the optimizer",
    ),
    "a window that is over": (
        add_to_a_window_that_is_over,
        RuntimeError,
        "this window was updated or one of its backward passes failed; begin a new window",
    ),
    # create_accumulating_optimizer
    "no steps of an optimizer": (
        lambda: create_accumulating_optimizer(optimizer(), 0),
        ValueError,
        "accumulation_steps " + STEPS.format("0"),
    ),
    "a schedule of an optimizer": (
        lambda: create_accumulating_optimizer(optimizer(), {0: 1}),
        TypeError,
        "accumulation_steps " + STEPS.format("{0: 1}"),
    ),
    "an unknown reduction of an optimizer": (
        lambda: create_accumulating_optimizer(optimizer(), 2, loss_reduction="avg"),
        ValueError,
        "loss_reduction must be one of 'mean', 'sum', got 'avg'",
    ),
    "an unknown way of an optimizer with what is not finite": (
        lambda: create_accumulating_optimizer(optimizer(), 2, nonfinite="ignore"),
        ValueError,
        "nonfinite must be one of 'keep', 'skip', 'raise', got 'ignore'",
    ),
    "a threshold for an optimizer": (
        lambda: create_accumulating_optimizer(optimizer(), 2, skip_update=1),
        TypeError,
        "skip_update must be callable, got 1; pass a function of the window, or None",
    ),
    "an update without a model": (
        lambda: create_accumulating_optimizer(optimizers.SGD(), 2).update(),
        ValueError,
        "optimizer " + NOT_SET_UP.format("SGD"),
    ),
    "a weight of a call that is NaN": (
        lambda: create_accumulating_optimizer(optimizer(), 2).update_weighted(numpy.nan),
        ValueError,
        "weight " + FINITE.format("nan"),
    ),
    # train_model and setup_trainer_with_accumulation
    "no epochs": (lambda: train(num_epochs=0), ValueError, EPOCHS.format("0")),
    "epochs in floating point": (lambda: set_up(num_epochs=1.5), TypeError, EPOCHS.format("1.5")),
    "no steps to train with": (
        lambda: train(accumulation_steps=0),
        ValueError,
        "accumulation_steps " + STEPS.format("0"),
    ),
    "no steps to set up with": (
        lambda: set_up(accumulation_steps=0),
        ValueError,
        "accumulation_steps " + STEPS.format("0"),
    ),
    "the class of an optimizer to train with": (
        lambda: train(optimizer=optimizers.Adam),
        TypeError,
        "optimizer must be an instance, got the class Adam; write Adam()",
    ),
    "something else for an optimizer": (
        lambda: set_up(optimizer=Readable()),
        TypeError,
        "optimizer must have the method setup, got Readable(); check the order of the arguments",
    ),
    "something else for an iterator": (
        lambda: train(train_iter=Readable()),
        TypeError,
        "train_iter must have the method next, got Readable(); check the order of the arguments",
    ),
    "the optimizer of another model": (
        lambda: train(optimizer=optimizer()),
        ValueError,
        "optimizer must be set up with the model, got one set up with a different Classifier; call optimizer.setup",
    ),
    "a name for a loss function to train with": (
        lambda: train(loss_func="mse"),
        TypeError,
        "loss_func must be callable, got 'mse'; pass a function, or None if the model returns the loss",
    ),
    "an unknown option to train with": (
        lambda: train(microbatch_size=4),
        TypeError,
        "train_model takes no option 'microbatch_size'; did you mean 'micro_batch_size'? It takes the keyword",
    ),
    "an unknown option to set up with": (
        lambda: set_up(outdir="result"),
        TypeError,
        "setup_trainer_with_accumulation takes no option 'outdir'; did you mean 'out'? It takes the keyword arguments",
    ),
    "an option to train with that has a wrong value": (
        lambda: train(micro_batch_size=0),
        ValueError,
        "micro_batch_size " + SIZE.format("0"),
    ),
    # load_snapshot
    "something that has no values": (
        lambda: load_snapshot("snapshot", "model"),
        TypeError,
        "target must be an object that Chainer can serialize, got 'model'; pass a Trainer, an updater, an optimizer or",
    ),
    "a snapshot that is none": (
        lambda: load_snapshot(__file__, make_model()),
        ValueError,
        f"{__file__} cannot be read as a snapshot, ",
    ),
    # Extensions
    "no steps of the extension": (lambda: Accumulate(0), ValueError, "accumulation_steps " + STEPS.format("0")),
    "an updater that cannot accumulate": (
        lambda: run(Accumulate(2), StandardUpdater(iterator(), optimizer())),
        TypeError,
        "the Trainer's updater must be able to accumulate gradients, got StandardUpdater; use chainer_accum",
    ),
    "a key that is no text": (
        lambda: ExampleMean(3),
        TypeError,
        "key must be a str, got 3; give the key of an observed value, such as 'main/loss'",
    ),
    "an updater that does not count examples": (
        lambda: run(ExampleMean("main/loss"), StandardUpdater(iterator(), optimizer())),
        TypeError,
        "the Trainer's updater must count examples, got StandardUpdater; use chainer_accum",
    ),
    "a mean over examples that are not counted": (
        lambda: run(ExampleMean("main/loss"), updater()),
        ValueError,
        "effective_batch_size must be known, got None; let the iterator return lists of examples, or report the value",
    ),
    "one key for keys": (
        lambda: TensorBoardReport(keys="main/loss"),
        TypeError,
        "keys must be a sequence of str, got 'main/loss'; pass a list: ['main/loss']",
    ),
    "something else for a model to average": (
        lambda: ExponentialMovingAverage(Readable()),
        TypeError,
        "target must be a Link, got Readable(); pass the model that the updater trains",
    ),
    "an average that never moves": (
        lambda: ExponentialMovingAverage(make_model(), 1.0),
        ValueError,
        "decay must be a number from 0 to less than 1, got 1.0; use a larger one for a longer average, such as 0.999",
    ),
    "a decay by name": (
        lambda: ExponentialMovingAverage(make_model(), "slow"),
        TypeError,
        "decay must be a number from 0 to less than 1, got 'slow'; use a larger one for a longer average, such as",
    ),
    "a number for a warm-up": (
        lambda: ExponentialMovingAverage(make_model(), warmup=10),
        TypeError,
        "warmup must be True or False, got 10; use True to forget the first updates sooner",
    ),
    "an average of a model that grows": (
        average_of_a_growing_model,
        RuntimeError,
        "target must keep the parameters that it had when the extension was created, got a difference in ['/b/W', ",
    ),
    "an interval of none": (
        lambda: GradientNoiseScale(0),
        ValueError,
        "interval must be an int of 1 or more, got 0; use 1 to measure every update",
    ),
    "smoothing that never learns": (
        lambda: GradientNoiseScale(smoothing=1.0),
        ValueError,
        "smoothing must be a number from 0 to less than 1, got 1.0; use 0 for none",
    ),
    "a limit of one step": (
        lambda: GradientNoiseScale(adapt_up_to=1),
        ValueError,
        "adapt_up_to must be an int of 2 or more, got 1; use None to leave accumulation_steps alone",
    ),
    "the noise scale of an updater that cannot accumulate": (
        lambda: run(GradientNoiseScale(), StandardUpdater(iterator(), optimizer())),
        TypeError,
        "the Trainer's updater must be able to accumulate gradients, got StandardUpdater; use chainer_accum",
    ),
    "a learning rate of zero": (
        lambda: LearningRateSurvey(0, 1),
        ValueError,
        "start must be a positive number, got 0; start with a small rate",
    ),
    "a learning rate that shrinks": (
        lambda: LearningRateSurvey(1, 0.1),
        ValueError,
        "stop must be larger than 1, got 0.1; the rate must grow",
    ),
    "a survey of one update": (
        lambda: LearningRateSurvey(0.1, 1, 1),
        ValueError,
        "updates must be an int of 2 or more, got 1; each update has a learning rate of its own",
    ),
    # Cached gradients, check_equivalence
    "no loss over representations": (
        lambda: CachedGradientUpdater(iterator(), optimizer()),
        TypeError,
        "loss_func must be callable, got None; pass a function of what the encoder returns",
    ),
    "an encoder that is none": (
        lambda: CachedGradientUpdater(iterator(), optimizer(), loss_func=F.sum, encoder="encoder"),
        TypeError,
        "encoder must be callable, got 'encoder'; pass a function of the converted examples, or None for the model",
    ),
    "one example to be split": (
        lambda: check_equivalence(make_model(), make_dataset(1)),
        ValueError,
        "batch must have two or more examples, got 1; pass as many as in an effective batch",
    ),
    "arrays for examples": (
        lambda: check_equivalence(make_model(), (1, 2)),
        TypeError,
        "batch must be a list of examples, got (1, 2); pass what iterator.next() returns",
    ),
    "no model to check": (
        lambda: check_equivalence(None, make_dataset(4)),
        TypeError,
        "model_or_updater must be a Link or an AccumulatingUpdater, got None; pass the model, and the loss function as",
    ),
    # What is added to a window, and what is wrapped
    "a number for a loss function": (
        lambda: add(3),
        TypeError,
        "lossfun must be callable, got 3; pass a function that returns the loss, or the model",
    ),
    "an expected weight of zero": (
        lambda: enter(optimizer(), expected_weight=0),
        ValueError,
        "expected_weight must be positive, got 0; use None if it is not known",
    ),
    "an expected weight below zero": (
        lambda: enter(optimizer(), expected_weight=-1),
        ValueError,
        "expected_weight must be finite and not negative, got -1.0; use 0 to leave a micro-batch out",
    ),
    "a model to be wrapped": (
        lambda: create_accumulating_optimizer(Readable(), 2),
        TypeError,
        "optimizer must be an optimizer that does not accumulate yet, got Readable(); pass the optimizer to be",
    ),
    "an infinite loss scale": (lambda: updater(loss_scale=float("inf")), ValueError, SCALE.format("inf")),
    "a word for new epochs": (
        lambda: updater(auto_new_epoch="no"),
        TypeError,
        "auto_new_epoch must be True or False, got 'no'; use False to call optimizer.new_epoch() yourself",
    ),
    "a number for reading ahead": (
        lambda: updater(prefetch=2),
        TypeError,
        "prefetch must be True or False, got 2; use True to convert the next micro-batch in a thread",
    ),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_input_is_refused(name, record_property):
    call, error, message = BAD_INPUTS[name]
    with pytest.raises(error) as caught:
        call()
    assert type(caught.value) is error
    assert str(caught.value).startswith(message)
    record_property("bad inputs", 1)


def test_every_public_name_is_here():
    source = " ".join(str(call.__code__.co_names) for call, _, _ in BAD_INPUTS.values())
    source += " ".join(str(function.__code__.co_names) for function in (enter, train, set_up, updater))
    public = {*chainer_accum.__all__, *chainer_accum.extensions.__all__}
    public -= {"KeepRandomState", "restore_removed_names"}  # which take no input
    assert not [name for name in public if name not in source]
