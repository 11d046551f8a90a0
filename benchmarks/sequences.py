"""Sequences of different lengths, and networks that tag each of their tokens, which the benchmarks share."""

from __future__ import annotations

from typing import Any, Callable, Dict, List, NamedTuple, Tuple

import chainer_accum  # noqa: F401  (before chainer, which it makes importable)
import chainer
import chainer.functions as F
import chainer.links as L
import numpy

SHORTEST, LONGEST = 4, 200
VOCABULARY, TAGS = 1000, 10
PADDING = -1
Example = Tuple[numpy.ndarray, numpy.ndarray]


def lognormal(random: numpy.random.RandomState, size: int) -> numpy.ndarray:
    """Returns lengths around 24, most of them short and a few long."""
    return 24 * numpy.exp(0.8 * random.standard_normal(size))


def bimodal(random: numpy.random.RandomState, size: int) -> numpy.ndarray:
    """Returns lengths of which three in four are around 12 and the others around 150."""
    middle = numpy.where(random.uniform(size=size) < 0.75, 12, 150)
    return middle * numpy.exp(0.2 * random.standard_normal(size))


DISTRIBUTIONS: Dict[str, Callable[[numpy.random.RandomState, int], numpy.ndarray]] = {
    "lognormal": lognormal,
    "short and long": bimodal,
}


def make_dataset(distribution: str, size: int) -> List[Example]:
    """Returns ``size`` random examples: tokens and their tags."""
    random = numpy.random.RandomState(0)
    lengths = DISTRIBUTIONS[distribution](random, size).clip(SHORTEST, LONGEST).astype(int)
    return [
        (random.randint(VOCABULARY, size=length).astype("i"), random.randint(TAGS, size=length).astype("i"))
        for length in lengths
    ]


def length_of(example: Example) -> int:
    """Returns the number of tokens."""
    return len(example[0])


def count_tokens(examples: List[Example]) -> int:
    """Returns what the loss of a micro-batch is divided by."""
    return sum(map(length_of, examples))


def pad(examples: List[Example], device: Any) -> Tuple[numpy.ndarray, ...]:
    """Converts examples to arrays as long as the longest."""
    return chainer.dataset.concat_examples(examples, device, padding=PADDING)


class Recurrent(chainer.Chain):
    """An LSTM whose state stays as it is at padded positions."""

    def __init__(self, units: int = 128) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(VOCABULARY, 64, ignore_label=PADDING)
            self.lstm = L.StatelessLSTM(64, units)
            self.output = L.Linear(units, TAGS)

    def forward(self, tokens: numpy.ndarray) -> chainer.Variable:
        embedded = F.transpose(self.embed(tokens), (1, 0, 2))
        cell = state = None
        states = []
        for step, x in enumerate(F.separate(embedded)):
            is_token = tokens[:, step, None] != PADDING
            new = self.lstm(cell, state, x)
            if cell is None or is_token.all():
                cell, state = new
            else:
                is_token = is_token.repeat(state.shape[1], 1)
                cell, state = (F.where(is_token, *pair) for pair in zip(new, (cell, state)))
            states.append(state)
        return self.output(F.stack(states, 1), n_batch_axes=2)


class Attention(chainer.Chain):
    """Self-attention and a feed-forward layer, each with a way around it."""

    def __init__(self, units: int, heads: int) -> None:
        super().__init__()
        self._heads = heads
        with self.init_scope():
            self.all = L.Linear(units, 3 * units)
            self.merge = L.Linear(units, units)
            self.wide = L.Linear(units, 4 * units)
            self.narrow = L.Linear(4 * units, units)
            self.normalize_first = L.LayerNormalization(units)
            self.normalize_second = L.LayerNormalization(units)

    def forward(self, x: chainer.Variable, penalty: numpy.ndarray) -> chainer.Variable:
        size, length, units = x.shape
        by_head = F.reshape(self.all(x, n_batch_axes=2), (size, length, 3, self._heads, units // self._heads))
        query, key, value = F.separate(F.transpose(by_head, (2, 0, 3, 1, 4)))
        scores = F.matmul(query, key, transb=True) * (units // self._heads) ** -0.5
        attended = F.matmul(F.softmax(scores + F.broadcast_to(penalty, scores.shape), axis=3), value)
        attended = F.reshape(F.transpose(attended, (0, 2, 1, 3)), x.shape)
        x = self._normalize(self.normalize_first, x + self.merge(attended, n_batch_axes=2))
        return self._normalize(
            self.normalize_second, x + self.narrow(F.relu(self.wide(x, n_batch_axes=2)), n_batch_axes=2)
        )

    def _normalize(self, link: chainer.Link, x: chainer.Variable) -> chainer.Variable:
        return F.reshape(link(F.reshape(x, (-1, x.shape[2]))), x.shape)


class Encoder(chainer.Chain):
    """An encoder like that of a Transformer, which does not attend to padded positions."""

    def __init__(self, units: int = 64, heads: int = 4, layers: int = 2) -> None:
        super().__init__()
        with self.init_scope():
            self.embed = L.EmbedID(VOCABULARY, units, ignore_label=PADDING)
            self.position = L.EmbedID(LONGEST, units)
            self.layers = chainer.ChainList(*(Attention(units, heads) for _ in range(layers)))
            self.output = L.Linear(units, TAGS)

    def forward(self, tokens: numpy.ndarray) -> chainer.Variable:
        positions = numpy.broadcast_to(numpy.arange(tokens.shape[1], dtype="i"), tokens.shape)
        x = self.embed(tokens) + self.position(positions)
        penalty = numpy.where(tokens == PADDING, -1e9, 0)[:, None, None].astype(x.dtype)
        for layer in self.layers:
            x = layer(x, penalty)
        return self.output(x, n_batch_axes=2)


class Tagger(NamedTuple):
    """A network that tags tokens."""

    name: str
    network: Callable[[], chainer.Chain]

    def make_model(self) -> chainer.Chain:
        """Returns a model in the dtype of the configuration, with the same initial values at every call."""
        model = self._initialized()
        with chainer.using_config("dtype", numpy.float32):
            narrow = self._initialized()
        for param, other in zip(model.params(), narrow.params()):
            param.array[...] = other.array
        return model

    def _initialized(self) -> chainer.Chain:
        numpy.random.seed(0)
        model = L.Classifier(self.network(), lossfun=mean_over_tokens)
        model.compute_accuracy = False
        return model


def mean_over_tokens(scores: chainer.Variable, tags: numpy.ndarray) -> chainer.Variable:
    """Returns the loss, in which padded positions do not count."""
    return F.softmax_cross_entropy(F.reshape(scores, (-1, TAGS)), tags.reshape(-1), ignore_label=PADDING)


TAGGERS = [
    Tagger("LSTM of 128 units", Recurrent),
    Tagger("encoder of 2 layers with attention", Encoder),
]
