"""Updates whose examples are cut by length or by a function take the step of the whole effective batch."""

from __future__ import annotations

import copy
import functools
import itertools
import warnings

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import numpy
import pytest
from chainer_accum import AccumulatingUpdater, CachedGradientUpdater, TokenBudget
from chainer.serializers import load_npz, save_npz
from chainer.training.updaters import StandardUpdater
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import assert_same_optimizer_state, assert_same_parameters, run, serial, to_host
from thread_ranks import make_multi_node, run_ranks

N_WORDS, N_TAGS, N_UNITS, LONGEST = 12, 3, 4, 9
EXACT = 1e-12
adam = functools.partial(chainer.optimizers.Adam, 0.01, eps=1e-3)  # a small eps would magnify rounding


class Tagger(chainer.Chain):
    """A masked LSTM in float64, the same at every call, with memory for passes of so many tokens only.

    Args:
        room (int): The most tokens of a pass, with padding, or ``None``.

    """

    def __init__(self, room=None):
        super().__init__()
        random = numpy.random.RandomState(0)
        initial = [chainer.initializers.LeCunNormal(rng=random) for _ in range(4)]
        with self.init_scope(), chainer.using_config("dtype", numpy.float64):
            self.embed = L.EmbedID(N_WORDS, N_UNITS, initialW=initial[0], ignore_label=-1)
            self.lstm = L.StatelessLSTM(N_UNITS, N_UNITS, lateral_init=initial[1], upward_init=initial[2])
            self.out = L.Linear(N_UNITS, N_TAGS, initialW=initial[3])
        self.room = room
        self.shapes = []

    def encode(self, words):
        self.shapes.append(words.shape)
        if self.room is not None and words.size > self.room:
            raise MemoryError(f"no room for {words.size} tokens")
        states, hidden = (None, None), []
        for step in F.transpose_sequence(list(self.embed(words))):
            states = self.lstm(*states, step)
            hidden.append(states[1])
        return F.stack(hidden, axis=1)

    def forward(self, words, tags):
        scores = self.out(F.reshape(self.encode(words), (-1, N_UNITS)))
        tags = tags.reshape(-1)
        # F.softmax_cross_entropy divides by 1 if there is no valid label.
        loss = F.softmax_cross_entropy(scores, tags, ignore_label=-1)
        chainer.report({"loss": loss}, self)
        return loss


def convert(batch, device=None):
    """Returns words and tags, padded with -1 to the longest."""
    longest = max(1, *(len(words) for words, _ in batch))
    padded = numpy.full((2, len(batch), longest), -1, numpy.int32)
    for row, example in enumerate(batch):
        padded[:, row, : len(example[0])] = example
    return tuple(padded)


def valid_labels(batch):
    return sum(int((tags >= 0).sum()) for _, tags in batch)


def num_words(example):
    return len(example[0])


def make_corpus(lengths, seed=0):
    random = numpy.random.RandomState(seed)
    draws = [(random.randint(N_WORDS, size=length), random.randint(-1, N_TAGS, size=length)) for length in lengths]
    return [(words.astype(numpy.int32), tags.astype(numpy.int32)) for words, tags in draws]


CORPUS = make_corpus(numpy.random.RandomState(1).randint(1, LONGEST + 1, size=40).tolist())


class Windows(chainer.dataset.Iterator):
    """An iterator over whole effective batches."""

    epoch, is_new_epoch, epoch_detail, previous_epoch_detail = 0, False, 0.0, 0.0

    def __init__(self, windows):
        self._windows = iter(windows)

    def next(self):
        return next(self._windows)


def windows_of(iterator, steps=1, tokens=None, is_flushed=False):
    """Returns an iterator over the effective batches that are gathered from an iterator."""
    while True:
        window = []
        for number in itertools.count(1):
            try:
                window += iterator.next()
            except StopIteration:
                break
            has_enough = number == steps if tokens is None else sum(max(num_words(e), 1) for e in window) >= tokens
            if has_enough or is_flushed and iterator.is_new_epoch:
                break
        if not window:
            return
        yield window


def set_up(updater_class, iterator, make_optimizer=adam, model=None, **kwargs):
    optimizer = make_optimizer().setup(Tagger() if model is None else model)
    return updater_class(iterator, optimizer, converter=convert, **kwargs)


def by_length(iterator, micro_batch_size, **kwargs):
    return set_up(
        AccumulatingUpdater, iterator, micro_batch_size=micro_batch_size, **{"weight_func": valid_labels, **kwargs}
    )


def whole(windows, **kwargs):
    return set_up(StandardUpdater, Windows(windows), **kwargs)


def assert_same_run(updater, expected, updates):
    """Asserts that each update takes the same step and reports the same loss. Returns what it reports."""
    observations = []
    for _ in range(updates):
        (step,), (expected_step,) = run(updater, 1), run(expected, 1)
        optimizer, expected_optimizer = (each.get_optimizer("main") for each in (updater, expected))
        assert_same_parameters(optimizer.target, expected_optimizer.target, EXACT)
        losses = [to_host(each.observation["main/loss"]) for each in (step, expected_step)]
        numpy.testing.assert_allclose(*losses, rtol=EXACT, atol=EXACT)
        observations.append(step.observation)
    return observations


@pytest.mark.parametrize("across_window", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("options", [{}, {"prefetch": True}, {"lockstep": "memory"}, {"nonfinite": "raise"}])
@pytest.mark.parametrize("max_tokens", [LONGEST, 25, 10**6, "auto"])
def test_a_step_by_tokens_is_that_of_the_whole_batch(max_tokens, options, steps, across_window):
    budget = TokenBudget(max_tokens, num_words, across_window=across_window)
    updater = by_length(serial(CORPUS, 10), budget, accumulation_steps=steps, **options)
    assert_same_run(updater, whole(windows_of(serial(CORPUS, 10), steps)), 4)
    assert updater.effective_batch_size == 10 * steps


@pytest.mark.parametrize("options", [{}, {"prefetch": True}, {"lockstep": "memory"}, {"accumulation_steps": 2}])
def test_a_step_by_groups_is_that_of_the_whole_batch(options):
    def by_first_word(examples):
        groups = {}
        for example in examples:
            groups.setdefault(int(example[0][0]), []).append(example)
        return groups.values()

    updater = by_length(serial(CORPUS, 10), by_first_word, **options)
    assert updater.micro_batch_size is None
    assert_same_run(updater, whole(windows_of(serial(CORPUS, 10), options.get("accumulation_steps", 1))), 4)
    assert len(updater.get_optimizer("main").target.shapes) > 4 * options.get("accumulation_steps", 1)


LENGTHS = [num_words, lambda example: numpy.int64(len(example[0])), lambda example: (1, len(example[1]))]


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=25),
    batch_size=st.integers(1, 12),
    steps=st.integers(1, 3),
    tokens=st.one_of(st.none(), st.integers(1, 60)),
    slack=st.integers(0, 30),
    length_func=st.sampled_from(LENGTHS),
    across_window=st.booleans(),
    is_repeated=st.booleans(),
    is_flushed=st.booleans(),
    options=st.sampled_from([{}, {"prefetch": True}, {"nonfinite": "skip"}, {"lockstep": "host"}]),
    room=st.one_of(st.none(), st.integers(0, 20)),
)
def test_whatever_the_lengths_and_the_options_a_step_is_exact(
    lengths, batch_size, steps, tokens, slack, length_func, across_window, is_repeated, is_flushed, options, room
):
    corpus = make_corpus(lengths)
    if len(corpus) > 3:
        corpus[1] = corpus[0]  # the same example twice
    longest = max(1, *lengths)
    gathering = (
        {"accumulation_steps": steps} if tokens is None else {"effective_batch_size": TokenBudget(tokens, num_words)}
    )
    model = Tagger(None if room is None else longest + room)
    updater = by_length(
        serial(corpus, batch_size, repeat=is_repeated),
        TokenBudget(longest + slack, length_func, across_window=across_window),
        model=model,
        epoch_boundary="flush" if is_flushed else "carry",
        split_when_out_of_memory=True,
        **gathering,
        **options,
    )
    windows = windows_of(serial(corpus, batch_size, repeat=is_repeated), steps, tokens, is_flushed)
    windows = list(itertools.islice(windows, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # memory runs out
        assert_same_run(updater, whole(windows), len(windows))
    assert all(rows * columns <= longest + slack for rows, columns in model.shapes)


def test_the_state_of_the_optimizer_is_that_of_the_whole_batch():
    updater = by_length(serial(CORPUS, 10), TokenBudget(20, num_words), accumulation_steps=2)
    expected = whole(windows_of(serial(CORPUS, 10), 2))
    run(updater, 4), run(expected, 4)
    expected.get_optimizer("main").epoch = 2
    assert_same_optimizer_state(updater.get_optimizer("main"), expected.get_optimizer("main"), 1e-10)


@settings(max_examples=15, deadline=None)
@given(
    num_ranks=st.integers(2, 3),
    steps=st.integers(1, 2),
    max_tokens=st.sampled_from([LONGEST, 20, "auto"]),
    gathers_tokens=st.booleans(),
    across_window=st.booleans(),
)
def test_several_ranks_take_the_step_of_all_their_examples(num_ranks, steps, max_tokens, gathers_tokens, across_window):
    num_tokens = 45 * num_ranks
    gathering = {"accumulation_steps": steps}
    if gathers_tokens:
        gathering = {"effective_batch_size": TokenBudget(num_tokens, num_words)}
    shares = [CORPUS[rank::num_ranks] for rank in range(num_ranks)]

    def train(communicator):
        updater = by_length(
            serial(shares[communicator.rank], 5),
            TokenBudget(max_tokens, num_words, across_window=across_window),
            make_optimizer=lambda: make_multi_node(chainer.optimizers.MomentumSGD(0.1), communicator),
            **gathering,
        )
        for _ in range(3):
            updater.update()
        return updater.get_optimizer("main").target

    models = run_ranks(num_ranks, train)
    gathered = [windows_of(serial(share, 5), steps, 45 if gathers_tokens else None) for share in shares]
    expected = whole(
        map(lambda *parts: sum(parts, []), *gathered), make_optimizer=lambda: chainer.optimizers.MomentumSGD(0.1)
    )
    run(expected, 3)
    for model in models:
        assert_same_parameters(model, expected.get_optimizer("main").target, EXACT)


def test_a_rank_whose_data_has_ended_takes_part_without_examples():
    shares = [CORPUS[:6], CORPUS[6:]]

    def train(communicator):
        updater = by_length(
            serial(shares[communicator.rank], 4, repeat=False),
            TokenBudget(20, num_words),
            make_optimizer=lambda: make_multi_node(adam(), communicator),
            effective_batch_size=TokenBudget(80, num_words),
        )
        sizes = []
        with pytest.raises(StopIteration):
            while True:
                updater.update()
                sizes.append(updater.effective_batch_size)
        return sizes, updater.get_optimizer("main").target

    gathered = [windows_of(serial(share, 4, repeat=False), None, 40) for share in shares]
    windows = [sum(parts, []) for parts in itertools.zip_longest(*gathered, fillvalue=[])]
    expected = whole(windows)
    run(expected, len(windows))
    results = run_ranks(2, train)
    assert [sum(sizes) for sizes in zip(*(sizes for sizes, _ in results))] == list(map(len, windows))
    assert results[0][0][-1] == 0
    for _, model in results:
        assert_same_parameters(model, expected.get_optimizer("main").target, EXACT)


@pytest.mark.parametrize("max_tokens", [60, "auto"])
@pytest.mark.parametrize("options", [{}, {"prefetch": True}, {"lockstep": "memory"}])
def test_without_memory_the_budget_is_halved_and_the_run_is_the_same(options, max_tokens):
    model = Tagger(room=20)
    updater = by_length(serial(CORPUS, 20), TokenBudget(max_tokens, num_words), model=model, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_same_run(updater, whole(windows_of(serial(CORPUS, 20))), 10)
    messages = [str(each.message) for each in caught if "memory ran out" in str(each.message)]
    tried = [rows * columns for rows, columns in model.shapes]
    assert updater.micro_batch_size <= 20
    assert len([tokens for tokens in tried if tokens > 20]) == len(messages) >= 1
    assert all("from now on a micro-batch has at most " in message for message in messages)


def test_the_warning_says_what_did_not_fit_and_what_may_fit():
    model = Tagger(room=20)
    updater = by_length(serial(CORPUS, 20), TokenBudget(60, num_words), model=model)
    with pytest.warns(RuntimeWarning) as caught:
        run(updater, 1)
    assert [str(warning.message) for warning in caught] == [
        f"memory ran out for a micro-batch of {size} examples and {tokens} tokens (no room for {tokens} tokens); the "
        f"update restarts, and from now on a micro-batch has at most {fewer} tokens"
        for size, tokens, fewer in ((6, 54, 27), (3, 27, 14))
    ]
    assert updater.micro_batch_size == 14


def test_the_budget_is_halved_down_to_one_example():
    corpus = make_corpus([8, 1, 8, 2, 8])
    model = Tagger(room=8)
    updater = by_length(serial(corpus, 5), TokenBudget(1000, num_words), model=model)
    with pytest.warns(RuntimeWarning, match="memory ran out for a micro-batch of . examples and .. tokens") as caught:
        assert_same_run(updater, whole(windows_of(serial(corpus, 5))), 2)
    assert [shape for shape in model.shapes if shape[0] * shape[1] > 8] == [(5, 8), (2, 8)]
    assert len(caught) == 2
    assert model.shapes[-4:] == [(1, 8), (1, 8), (1, 8), (2, 2)]


def test_in_lockstep_a_long_example_does_not_keep_others_from_being_split():
    corpus = make_corpus([9, 1, 2, 1, 2, 1])
    model, sizes = Tagger(), []

    def with_room_for_three(words, tags):
        sizes.append(len(words))
        if len(words) > 3:
            raise MemoryError("no room")
        return model(words, tags)

    budget, batches = TokenBudget(9, num_words), serial(corpus, 6)
    updater = by_length(batches, budget, model=model, loss_func=with_room_for_three, lockstep="memory")
    with pytest.warns(RuntimeWarning, match="a micro-batch of 4 examples and 8 tokens .*has at most 4 tokens"):
        assert_same_run(updater, whole(windows_of(serial(corpus, 6))), 2)
    assert sizes == [1, 4, 1, 2, 3, 1, 2, 3]


def state_of(updater):
    """Returns what an update that raises must leave as it was."""
    saved = chainer.serializers.DictionarySerializer()
    updater.get_optimizer("main").serialize(saved["optimizer"])
    updater.get_optimizer("main").target.serialize(saved["model"])
    counters = [updater.iteration, updater.effective_batch_size, updater.micro_batch_size]
    return {key: numpy.copy(value).tolist() for key, value in saved.target.items()}, counters


def assert_raises_and_goes_on(updater, error, message, next_window):
    """Asserts that an update raises and changes nothing, and that the next takes the step of its examples."""
    before = state_of(updater)
    observation = {}
    reporter = chainer.Reporter()
    reporter.add_observer("main", updater.get_optimizer("main").target)
    with reporter.scope(observation), pytest.raises(error, match=message):
        updater.update()
    assert observation == {}
    assert state_of(updater) == before
    optimizer = copy.deepcopy(updater.get_optimizer("main"))
    optimizer.target.room = None
    optimizer.update(optimizer.target, *convert(next_window))
    updater.update()
    assert_same_parameters(updater.get_optimizer("main").target, optimizer.target, EXACT)


@pytest.mark.parametrize("options", [{}, {"prefetch": True}, {"lockstep": "memory"}])
@pytest.mark.parametrize("across_window", [False, True])
def test_an_example_that_is_too_long_is_an_error_that_changes_nothing(across_window, options):
    corpus = make_corpus([3] * 8 + [3, 3, 3, 7] + [3] * 4)
    budget = TokenBudget(6, num_words, across_window=across_window)
    updater = by_length(serial(corpus, 2), budget, accumulation_steps=2, **options)
    run(updater, 2)
    message = (
        "max_tokens must be at least the length of the longest example, got 6 for an example of 7 tokens; increase"
    )
    assert_raises_and_goes_on(updater, ValueError, message, corpus[12:16])


@pytest.mark.parametrize(
    "options", [{"micro_batch_size": TokenBudget(12, num_words)}, {"micro_batch_size": TokenBudget("auto", num_words)}]
)
def test_one_example_that_does_not_fit_is_an_error_that_changes_nothing(options):
    corpus = make_corpus([3] * 8 + [3, 3, 3, 7] + [3] * 4)
    updater = by_length(serial(corpus, 4), model=Tagger(room=6), **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        run(updater, 2)
        message = "one example does not fit in memory: no room for 7 tokens; use a smaller model or smaller examples"
        before = updater.micro_batch_size
        assert_raises_and_goes_on(updater, MemoryError, message, corpus[12:16])
    assert updater.micro_batch_size <= before


def broken_once(breaks):
    """Returns a function that makes one group of all examples, but breaks in its third call."""
    calls = itertools.count(1)
    return lambda examples: breaks(examples) if next(calls) == 3 else [examples]


def raise_key_error(examples):
    raise KeyError("bucket")


def raise_late(examples):
    yield examples[:1]
    raise StopIteration


@pytest.mark.parametrize(
    "breaks, error, message",
    [
        (lambda examples: [examples[1:]], ValueError, "got 1 missing"),
        (lambda examples: [examples, examples], ValueError, "got 4 too many"),
        (lambda examples: [copy.deepcopy(examples)], ValueError, "got 4 too many and 4 missing"),
        (lambda examples: [examples, []], ValueError, "got an empty list"),
        (lambda examples: None, TypeError, "must return lists of examples, got None"),
        (lambda examples: next(iter([])), RuntimeError, "micro_batch_size must not raise StopIteration"),
        (raise_late, RuntimeError, "generator raised StopIteration"),
        (raise_key_error, KeyError, "bucket"),
    ],
)
@pytest.mark.parametrize("options", [{}, {"prefetch": True}])
def test_a_function_that_cuts_wrongly_is_an_error_that_changes_nothing(breaks, error, message, options):
    updater = by_length(serial(CORPUS, 4), broken_once(breaks), **options)
    run(updater, 2)
    assert_raises_and_goes_on(updater, error, message, CORPUS[12:16])


@pytest.mark.parametrize("length", [-1, 2.0, True, (), None])
@pytest.mark.parametrize("argument", ["micro_batch_size", "effective_batch_size"])
def test_a_length_that_is_none_is_an_error_that_changes_nothing(argument, length):
    corpus = make_corpus([1] * 16)
    wrong = corpus[9]
    budget = TokenBudget(4, lambda example: length if example is wrong else 1)
    updater = set_up(AccumulatingUpdater, serial(corpus, 4), weight_func=valid_labels, **{argument: budget})
    run(updater, 2)
    assert_raises_and_goes_on(updater, (TypeError, ValueError), "the value of length_func must", corpus[12:16])


def test_padding_is_the_share_of_positions_that_hold_no_token():
    corpus = make_corpus([1, 4, 1, 4])
    (step,) = run(by_length(serial(corpus, 4), TokenBudget(16, num_words)), 1)
    assert step.observation["padding"] == 1 - 10 / 16
    (step,) = run(by_length(serial(corpus, 4), TokenBudget(8, num_words)), 1)
    assert step.observation["padding"] == 0
    (step,) = run(by_length(serial(corpus, 4), TokenBudget(16, lambda example: (len(example[0]), 1))), 1)
    assert step.observation["padding"] == 1 - 14 / 20


def test_a_window_that_restarts_does_not_count_its_padding_twice():
    updater = by_length(serial(make_corpus([1, 4, 1, 4]), 4), TokenBudget(16, num_words), model=Tagger(room=8))
    with pytest.warns(RuntimeWarning, match="memory ran out"):
        (step,) = run(updater, 1)
    assert step.observation["padding"] == 0


def test_a_window_across_iterator_batches_needs_less_padding():
    paddings = []
    for across_window in (False, True):
        budget = TokenBudget(20, num_words, across_window=across_window)
        steps = run(by_length(serial(CORPUS, 5), budget, accumulation_steps=8), 1)
        paddings.append(steps[0].observation["padding"])
    assert paddings[1] < paddings[0]


def test_micro_batches_that_are_not_finite_are_skipped():
    corpus = make_corpus([2, 4, 3, 5, 3, 2, 1, 4])
    spoilt = corpus[:4], corpus[5:]
    words = corpus[4][0]

    class Spoilt(Tagger):
        def forward(self, x, tags):
            loss = super().forward(x, tags)
            return loss * numpy.nan if x.shape == (1, 3) and (x == words).all() else loss

    updater = by_length(serial(corpus, 8), TokenBudget(5, num_words), nonfinite="skip", model=Spoilt())
    expected = whole([spoilt[0] + spoilt[1]])
    (step,), _ = run(updater, 1), run(expected, 1)
    assert step.observation["skipped_micro_batches"] == 1
    assert updater.effective_batch_size == 7
    assert_same_parameters(updater.get_optimizer("main").target, expected.get_optimizer("main").target, EXACT)


def test_a_gathered_window_keeps_its_examples_only_if_asked_to():
    gathered = TokenBudget(60, num_words)
    for options, is_refused in (({}, True), ({"split_when_out_of_memory": True}, False)):
        updater = set_up(
            AccumulatingUpdater, serial(CORPUS, 8), model=Tagger(room=12), effective_batch_size=gathered, **options
        )
        if is_refused:
            with pytest.raises(MemoryError, match="^no room for"):
                updater.update()
        else:
            with pytest.warns(RuntimeWarning, match="memory ran out"):
                updater.update()


class Arrays(chainer.iterators.SerialIterator):
    """An iterator whose batches are arrays with a row for each example."""

    def next(self):
        return numpy.array(super().next())


def test_iterator_batches_may_be_arrays():
    rows = numpy.random.RandomState(0).randint(1, 9, size=(12, 5)).astype(numpy.int32)

    def make(updater_class, **kwargs):
        model = Tagger()
        return updater_class(
            Arrays(rows, 6, shuffle=False),
            adam().setup(model),
            converter=lambda batch, device: numpy.asarray(batch),
            loss_func=lambda x: F.mean(model.encode(x) ** 2),
            **kwargs,
        )

    expected = make(StandardUpdater)
    run(expected, 2)
    for size in (TokenBudget(15, len), lambda examples: [examples[::2], examples[1::2]]):
        updater = make(AccumulatingUpdater, micro_batch_size=size)
        run(updater, 2)
        assert len(updater.get_optimizer("main").target.shapes) == 4
        assert_same_parameters(updater.get_optimizer("main").target, expected.get_optimizer("main").target, EXACT)


class Normalized(Tagger):
    """A tagger whose last states are normalized over the batch."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.normalization = L.BatchNormalization(N_UNITS, dtype=numpy.float64)

    def forward(self, words, tags):
        is_last = numpy.arange(words.shape[1]) == (words >= 0).sum(axis=1, keepdims=True) - 1
        last = F.sum(self.encode(words) * is_last[..., None], axis=1)
        loss = F.mean(self.normalization(last)[:, 0] ** 3)
        chainer.report({"loss": loss}, self)
        return loss


def test_in_lockstep_batch_normalization_sees_the_batch_that_was_cut_by_length():
    updater = by_length(
        serial(CORPUS, 10), TokenBudget(20, num_words), model=Normalized(), lockstep="memory", weight_func=None
    )
    expected = whole(windows_of(serial(CORPUS, 10)), model=Normalized())
    assert_same_run(updater, expected, 3)
    actual, expected = (each.get_optimizer("main").target.normalization for each in (updater, expected))
    numpy.testing.assert_allclose(actual.avg_mean, expected.avg_mean, rtol=1e-12)
    numpy.testing.assert_allclose(actual.avg_var, expected.avg_var, rtol=1e-12)


class Pairs(Tagger):
    """An encoder, and a loss that compares each example with the one that follows it in the batch."""

    def forward(self, words, tags):
        is_last = numpy.arange(words.shape[1]) == (words >= 0).sum(axis=1, keepdims=True) - 1
        return F.sum(self.encode(words) * is_last[..., None], axis=1), words[:, 0]

    def loss(self, vectors, first_words):
        distances = F.sum((vectors[::2] - vectors[1::2]) ** 2, axis=1)
        loss = F.sum(distances * (first_words[::2] + 1)) / len(distances)
        chainer.report({"loss": loss}, self)
        return loss


def halves_by_length(examples):
    ordered = sorted(examples, key=num_words)
    return [ordered[len(ordered) // 2 :], ordered[: len(ordered) // 2]]


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("room", [None, 20])
@pytest.mark.parametrize(
    "micro_batch_size",
    [
        TokenBudget(30, num_words),
        TokenBudget(30, num_words, across_window=True),
        TokenBudget("auto", num_words),
        halves_by_length,
    ],
)
def test_a_loss_that_compares_examples_gets_them_in_their_order(micro_batch_size, room, steps):
    model, expected_model = Pairs(room=room), Pairs()
    updater = set_up(
        CachedGradientUpdater,
        serial(CORPUS, 10),
        model=model,
        loss_func=model.loss,
        accumulation_steps=steps,
        micro_batch_size=micro_batch_size,
        split_when_out_of_memory=True,
    )
    expected = whole(
        windows_of(serial(CORPUS, 10), steps),
        model=expected_model,
        loss_func=lambda *batch: expected_model.loss(*expected_model(*batch)),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        observations = assert_same_run(updater, expected, 4)
    assert len(set(model.shapes)) > 1
    assert halves_by_length is micro_batch_size or all("padding" in observation for observation in observations)


def test_an_encoder_of_sorted_examples_returns_a_row_for_each():
    model = Tagger()
    updater = set_up(
        CachedGradientUpdater,
        serial(CORPUS, 10),
        model=model,
        encoder=lambda words, tags: F.reshape(model.encode(words), (-1, N_UNITS)),
        loss_func=F.sum,
        micro_batch_size=TokenBudget(30, num_words),
    )
    with pytest.raises(
        ValueError, match="encoder must return one row per example if the examples are sorted or grouped"
    ):
        updater.update()


def test_the_fastest_budget_is_searched_for_and_reported():
    updater = by_length(serial(CORPUS, 20), TokenBudget("auto", num_words))
    assert (updater.micro_batch_size, updater.micro_batch_timings) == (1, {})
    observations = assert_same_run(updater, whole(windows_of(serial(CORPUS, 20))), 10)
    timed = [each for each in observations if "seconds_per_token" in each]
    assert 1 <= len(timed) <= 8
    assert set(updater.micro_batch_timings) <= {each["max_tokens"] for each in observations}
    assert updater.micro_batch_size == min(updater.micro_batch_timings, key=updater.micro_batch_timings.get)
    assert observations[-1].keys() == {"main/loss", "max_tokens", "padding"}
    assert observations[-1]["max_tokens"] == updater.micro_batch_size


@pytest.mark.parametrize("micro_batch_size", ["auto", TokenBudget("auto", num_words)])
def test_with_a_limit_that_leaves_no_room_a_micro_batch_has_one_example(micro_batch_size):
    updater = by_length(serial(CORPUS, 10), micro_batch_size, memory_limit=1)
    assert_same_run(updater, whole(windows_of(serial(CORPUS, 10))), 3)
    model = updater.get_optimizer("main").target
    budget = updater.micro_batch_size if micro_batch_size != "auto" else LONGEST
    assert all(rows == 1 or rows * columns <= budget for rows, columns in model.shapes)
    assert budget <= LONGEST


@pytest.mark.parametrize("max_tokens", [20, "auto"])
@pytest.mark.parametrize("load", [load_npz, chainer_accum.load_snapshot])
def test_snapshots_load_both_ways(load, max_tokens, tmp_path):
    makers = [
        functools.partial(by_length, micro_batch_size=TokenBudget(max_tokens, num_words)),
        functools.partial(set_up, StandardUpdater),
    ]
    for make, make_other in (makers, makers[::-1]):
        updater, resumed = make(serial(CORPUS, 10)), make_other(serial(CORPUS, 10))
        run(updater, 3)
        save_npz(tmp_path / "snapshot.npz", updater)
        run(resumed, 1)  # so that the optimizer has a state to load
        load(tmp_path / "snapshot.npz", resumed)
        assert_same_run(resumed, updater, 2)
        assert (resumed.iteration, resumed.epoch) == (updater.iteration, updater.epoch) == (5, 1)


@pytest.mark.parametrize("load", [load_npz, chainer_accum.load_snapshot])
def test_a_resumed_run_does_not_search_again(load, tmp_path):
    updater, resumed = (by_length(serial(CORPUS, 10), TokenBudget("auto", num_words)) for _ in range(2))
    run(updater, 10)
    save_npz(tmp_path / "snapshot.npz", updater)
    run(resumed, 1)
    load(tmp_path / "snapshot.npz", resumed)
    assert resumed.micro_batch_size == updater.micro_batch_size
    assert resumed.micro_batch_timings == updater.micro_batch_timings
    assert all("seconds_per_token" not in observation for observation in assert_same_run(resumed, updater, 3))


@pytest.mark.parametrize("num_updates", [1, 3, 10])
@pytest.mark.parametrize("max_tokens", [20, "auto"])
def test_a_copy_of_an_updater_goes_on_alike(max_tokens, num_updates):
    budget = TokenBudget(max_tokens, num_words)
    updater = by_length(serial(CORPUS, 10), budget, effective_batch_size=TokenBudget(60, num_words))
    run(updater, num_updates)
    duplicate = copy.deepcopy(updater)
    assert duplicate.micro_batch_size == updater.micro_batch_size
    assert_same_run(duplicate, updater, 3)
    assert updater.iteration == num_updates + 3


def test_training_in_one_call_takes_a_budget():
    history = chainer_accum.train_model(
        Tagger(),
        adam(),
        serial(CORPUS, 10),
        None,
        1,
        2,
        converter=convert,
        weight_func=valid_labels,
        micro_batch_size=TokenBudget(20, num_words),
    )
    assert [entry["epoch"] for entry in history] == [1, 2]
    assert all(0 <= entry["padding"] < 0.5 for entry in history)


def test_a_step_by_tokens_is_found_to_be_equivalent():
    updater = by_length(serial(CORPUS, 10), TokenBudget(20, num_words))
    run(updater, 1)
    assert chainer_accum.check_equivalence(updater, CORPUS[:10])
