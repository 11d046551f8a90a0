"""Accumulation as users of PyTorch have it: by hand, by Accelerate and by Lightning, each as its documentation shows.

Accelerate and Lightning are imported where they are used, so that either may be missing.
"""

from __future__ import annotations

import importlib.util
import itertools
import logging
import threading
import warnings
from typing import Any, Callable, Dict, Optional, Tuple

import chainer.functions as F
import chainer.links as L
import torch
from peers_in_chainer import Contestant, Job
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader
from workloads import pool

torch.set_num_threads(1)


def floor(job: Job) -> Contestant:
    """Bare passes, each cleared before its backward pass, and one update."""
    network, optimizer, loader = set_up(job)
    batches = iter(loader)

    def window() -> None:
        for x, t in itertools.islice(batches, job.k):
            loss = mean_loss(network(x), t)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()

    return _contestant(window, network)


def loss_over_k(job: Job) -> Contestant:
    """``loss / k``, and PyTorch adds to ``param.grad``."""
    network, optimizer, loader = set_up(job)
    batches = iter(loader)

    def window() -> None:
        for x, t in itertools.islice(batches, job.k):
            loss = mean_loss(network(x), t) / job.k
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return _contestant(window, network)


def accelerate_accumulate(job: Job) -> Contestant:
    """``accelerator.accumulate()``, which divides the loss and withholds the step."""
    accelerator, network, optimizer, loader = _set_up_accelerate(job)
    batches = iter(loader)

    def window() -> None:
        for x, t in itertools.islice(batches, job.k):
            with accelerator.accumulate(network):
                accelerator.backward(mean_loss(network(x), t))
                optimizer.step()
                optimizer.zero_grad()

    return _contestant(window, network)


def accelerate_count_ahead(job: Job) -> Contestant:
    """The recipe that Accelerate documents for samples of variable size.

    The micro-batches of a window are all loaded before the first pass, to count their labels, and the loss is a sum.

    """
    accelerator, network, optimizer, loader = _set_up_accelerate(job)
    batches = iter(loader)

    def window() -> None:
        micro_batches = list(itertools.islice(batches, job.k))
        labels = sum((t != -1).sum() for _, t in micro_batches).item()
        for x, t in micro_batches:
            loss = cross_entropy(network(x), t, ignore_index=-1, reduction="sum")
            accelerator.backward(loss * job.k / labels)  # which divides by k
        optimizer.step()
        optimizer.zero_grad()

    return _contestant(window, network)


def lightning(job: Job) -> Contestant:
    """``accumulate_grad_batches`` of the Trainer, without logger, checkpoints and progress bar."""
    import pytorch_lightning

    network, optimizer, loader = set_up(job)

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.network = network

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            x, t = batch
            return mean_loss(self.network(x), t)

        def configure_optimizers(self) -> Any:
            return optimizer

    class PauseBeforeWindow(pytorch_lightning.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx > 0 and batch_idx % job.k == 0:
                turns.pause()

    def fit() -> None:
        trainer = pytorch_lightning.Trainer(
            accelerator="cpu",
            accumulate_grad_batches=job.k,
            max_epochs=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[PauseBeforeWindow()],
        )
        trainer.fit(Module(), loader)

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    turns = _Turns(fit)
    return _contestant(turns.take, network)


CONTESTANTS: Dict[str, Callable[[Job], Contestant]] = {"PyTorch, loss / k": loss_over_k}
if importlib.util.find_spec("accelerate"):
    CONTESTANTS["Accelerate, accumulate()"] = accelerate_accumulate
    CONTESTANTS["Accelerate, labels counted ahead"] = accelerate_count_ahead
if importlib.util.find_spec("pytorch_lightning"):
    CONTESTANTS["Lightning, accumulate_grad_batches"] = lightning


class _Turns:
    """A loop that returns only when all is done, such as Lightning's, made to run one window at a time.

    It runs in a thread of its own and pauses before each window. To hand over twice takes some microseconds.

    """

    def __init__(self, loop: Callable[[], None]) -> None:
        self._loop = loop
        self._thread: Optional[threading.Thread] = None
        self._go = threading.Semaphore(0)
        self._paused = threading.Semaphore(0)
        self._error: Optional[BaseException] = None

    def take(self) -> None:
        """Lets the loop run to its next pause or to its end."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._paused.acquire()
        if self._error is not None:
            raise self._error

    def pause(self) -> None:
        """Is called by the loop, and returns as the next turn is taken."""
        self._paused.release()
        self._go.acquire()

    def _run(self) -> None:
        try:
            self._loop()
        except BaseException as error:
            self._error = error
        self._paused.release()


def set_up(job: Job) -> Tuple[nn.Module, torch.optim.Optimizer, DataLoader]:
    """Returns the network that Chainer's is, with the same parameters, an optimizer and a loader."""
    layers: list = []
    for layer in job.make_model().predictor:
        if isinstance(layer, L.Linear):
            n_out, n_in = layer.W.shape
            layers += [nn.Flatten(), _copy(layer, nn.Linear(n_in, n_out, bias=layer.b is not None))]
        elif isinstance(layer, L.BatchNormalization):
            layers.append(_copy_normalization(layer, nn.BatchNorm1d(len(layer.gamma), layer.eps, 1 - layer.decay)))
        elif isinstance(layer, L.Convolution2D):
            n_out, n_in, *ksize = layer.W.shape
            layers.append(_copy(layer, nn.Conv2d(n_in, n_out, tuple(ksize), layer.stride, layer.pad)))
        else:
            layers.append({F.relu: nn.ReLU(), pool: nn.MaxPool2d(2)}[layer])
    network = nn.Sequential(*layers)
    loader = DataLoader([(torch.from_numpy(x), int(t)) for x, t in job.dataset], job.micro_batch_size)
    return network, torch.optim.SGD(network.parameters(), job.learning_rate), loader


def _copy(link: Any, module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(link.W.array))
        if link.b is not None:
            module.bias.copy_(torch.from_numpy(link.b.array))
    return module


def _copy_normalization(link: Any, module: nn.Module) -> nn.Module:
    with torch.no_grad():
        module.weight.copy_(torch.from_numpy(link.gamma.array))
        module.bias.copy_(torch.from_numpy(link.beta.array))
    return module


def _set_up_accelerate(job: Job) -> Tuple[Any, nn.Module, Any, Any]:
    import accelerate

    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=job.k)
    return (accelerator, *accelerator.prepare(*set_up(job)))


def mean_loss(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return cross_entropy(outputs, labels, ignore_index=-1)


def _contestant(window: Callable[[], None], network: nn.Module) -> Contestant:
    return Contestant(window, lambda: [param.detach().numpy() for param in network.parameters()])
