from chainer.training import extension as extension
from chainer.training import extensions as extensions
from chainer.training import trigger as trigger
from chainer.training import updaters as updaters
from chainer.training.trainer import Trainer as Trainer
from chainer.training.updater import Updater as Updater
