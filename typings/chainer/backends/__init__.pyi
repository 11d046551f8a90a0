from chainer.backends import cuda as cuda
