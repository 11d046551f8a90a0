"""ChainerRL: its agents update an optimizer, so the optimizer is what accumulates."""

from __future__ import annotations

import chainer_accum
import chainer
import chainer.functions as F
import chainer.links as L
import chainerrl
import numpy
import pytest
from chainer.optimizers import SGD, Adam

from helpers import assert_same_parameters, seed

STEPS = 4
N_OBSERVED = 3
N_ACTIONS = 2


class Corridor:
    """Five places in a row, with a reward at the right end."""

    def reset(self):
        self.place = 0
        return self.observe()

    def step(self, action):
        self.place = max(0, self.place + (1 if action else -1))
        return self.observe(), float(self.place == 4), self.place == 4

    def observe(self):
        return numpy.array([self.place, self.place**2 / 4, 1], numpy.float32)


def train(agent, n_steps):
    corridor = Corridor()
    observed, reward = corridor.reset(), 0.0
    for _ in range(n_steps):
        observed, reward, done = corridor.step(int(agent.act_and_train(observed, reward)))
        if done:
            agent.stop_episode_and_train(observed, reward, done)
            observed, reward = corridor.reset(), 0.0


def make_experiences(n, action):
    """Returns random transitions, as the agents take them from a replay buffer."""
    random = numpy.random.RandomState(1)
    return [
        [
            {
                "state": random.standard_normal(N_OBSERVED).astype(numpy.float32),
                "action": action(random),
                "reward": random.standard_normal(),
                "next_state": random.standard_normal(N_OBSERVED).astype(numpy.float32),
                "next_action": None,
                "is_state_terminal": bool(i % 3 == 0),
            }
        ]
        for i in range(n)
    ]


def accumulating(optimizer):
    return chainer_accum.create_accumulating_optimizer(optimizer, STEPS)


def unchanged(optimizer):
    return optimizer


def make_dqn(wrap, minibatch_size):
    seed(0)
    q_function = chainerrl.q_functions.FCStateQFunctionWithDiscreteAction(N_OBSERVED, N_ACTIONS, 8, 1)
    optimizer = wrap(Adam())
    optimizer.setup(q_function)
    return chainerrl.agents.DQN(
        q_function,
        optimizer,
        chainerrl.replay_buffer.ReplayBuffer(1000),
        gamma=0.9,
        explorer=chainerrl.explorers.ConstantEpsilonGreedy(0.5, lambda: numpy.random.randint(N_ACTIONS)),
        replay_start_size=32,
        minibatch_size=minibatch_size,
        n_times_update=32 // minibatch_size,
        target_update_interval=20,
    )


def test_dqn_makes_the_update_of_the_large_minibatch():
    experiences = make_experiences(32, lambda random: random.randint(N_ACTIONS))
    whole, actual = make_dqn(unchanged, 32), make_dqn(accumulating, 8)
    for _ in range(3):
        whole.update(experiences)
        for start in range(0, 32, 8):
            actual.update(experiences[start : start + 8])
    assert (whole.optimizer.t, actual.optimizer.t) == (3, 3)
    assert_same_parameters(actual.model, whole.model, tolerance=1e-5)


def test_dqn_trains_with_as_many_updates_as_with_the_large_minibatch():
    agent = make_dqn(accumulating, 8)
    train(agent, 200)
    whole = make_dqn(unchanged, 32)
    train(whole, 200)
    assert agent.optimizer.t == whole.optimizer.t > 100
    assert dict(agent.get_statistics())["average_loss"] > 0


class RecurrentModel(chainer.Chain, chainerrl.agents.a3c.A3CModel, chainerrl.recurrent.RecurrentChainMixin):
    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.hidden = L.LSTM(N_OBSERVED, 8)
            self.pi = chainerrl.policies.SoftmaxPolicy(L.Linear(8, N_ACTIONS))
            self.v = L.Linear(8, 1)

    def pi_and_v(self, observed):
        h = self.hidden(observed)
        return self.pi(h), self.v(h)


def test_a3c_trains_a_recurrent_model():
    model = RecurrentModel()
    optimizer = accumulating(SGD(0.01))
    optimizer.setup(model)
    agent = chainerrl.agents.A3C(model, optimizer, t_max=5, gamma=0.9)
    initial = model.v.W.array.copy()
    observed = Corridor().reset()
    for _ in range(60):  # one episode that does not end
        agent.act_and_train(observed, 0.1)
    assert optimizer.t == 11 // STEPS
    assert not numpy.array_equal(model.v.W.array, initial)


def make_ppo(wrap, minibatch_size):
    seed(0)
    model = chainerrl.agents.a3c.A3CSeparateModel(
        chainerrl.policies.FCSoftmaxPolicy(N_OBSERVED, N_ACTIONS, 1, 8),
        chainerrl.v_functions.FCVFunction(N_OBSERVED, 1, 8),
    )
    optimizer = wrap(SGD(0.001))
    optimizer.setup(model)
    return chainerrl.agents.PPO(model, optimizer, update_interval=32, minibatch_size=minibatch_size, epochs=2)


def test_ppo_makes_the_updates_of_the_large_minibatch():
    whole, actual = make_ppo(unchanged, 16), make_ppo(accumulating, 4)
    for agent in (whole, actual):
        seed(1)
        observed = numpy.random.RandomState(2).standard_normal((65, N_OBSERVED)).astype(numpy.float32)
        for i, x in enumerate(observed):
            agent.act_and_train(x, float(i % 3))
    assert whole.optimizer.t == actual.optimizer.t == 8
    assert_same_parameters(actual.model, whole.model, tolerance=1e-5)


class Policy(chainer.Chain):
    """A deterministic policy, which DDPG trains."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.layer = L.Linear(N_OBSERVED, 1)

    def forward(self, x):
        return chainerrl.distribution.ContinuousDeterministicDistribution(F.tanh(self.layer(x)))


def make_ddpg(wrap):
    seed(0)
    model = chainerrl.agents.ddpg.DDPGModel(
        policy=Policy(), q_func=chainerrl.q_functions.FCSAQFunction(N_OBSERVED, 1, 8, 1)
    )
    actor, critic = wrap(SGD(0.1)), wrap(SGD(0.1))
    actor.setup(model["policy"])
    critic.setup(model["q_function"])
    return chainerrl.agents.DDPG(
        model, actor, critic, chainerrl.replay_buffer.ReplayBuffer(100), gamma=0.9, explorer=None
    )


def test_the_actor_of_ddpg_is_not_that_of_the_large_batch():
    experiences = make_experiences(32, lambda random: random.uniform(-1, 1, 1).astype(numpy.float32))
    whole, actual = make_ddpg(unchanged), make_ddpg(accumulating)
    whole.update(experiences)
    for start in range(0, 32, 8):
        actual.update(experiences[start : start + 8])
    assert_same_parameters(actual.q_function, whole.q_function, tolerance=1e-5)
    # Three of the four micro-batches went through the critic as it was before its update.
    with pytest.raises(AssertionError):
        assert_same_parameters(actual.policy, whole.policy, tolerance=1e-5)
    assert_same_parameters(actual.policy, whole.policy, tolerance=0.1)


class GaussianPolicy(chainer.Chain):
    """A policy that SAC trains."""

    def __init__(self):
        super().__init__()
        with self.init_scope():
            self.mean = L.Linear(N_OBSERVED, 1)

    def forward(self, x):
        mean = self.mean(x)
        return chainerrl.distribution.SquashedGaussianDistribution(mean, var=mean * 0 + 1e-8)  # hardly random


def make_sac(wrap):
    seed(0)
    policy = GaussianPolicy()
    q1, q2 = (chainerrl.q_functions.FCSAQFunction(N_OBSERVED, 1, 8, 1) for _ in range(2))
    optimizers = [wrap(SGD(0.1)) for _ in range(3)]
    for optimizer, link in zip(optimizers, (policy, q1, q2)):
        optimizer.setup(link)
    return chainerrl.agents.SoftActorCritic(
        policy, q1, q2, *optimizers, chainerrl.replay_buffer.ReplayBuffer(100), gamma=0.9
    )


def test_the_policy_of_sac_is_not_that_of_the_large_batch():
    experiences = make_experiences(32, lambda random: random.uniform(-0.9, 0.9, 1).astype(numpy.float32))
    whole, actual = make_sac(unchanged), make_sac(accumulating)
    whole.update(experiences)
    for start in range(0, 32, 8):
        actual.update(experiences[start : start + 8])
    with pytest.raises(AssertionError):
        assert_same_parameters(actual.policy, whole.policy, tolerance=1e-5)
    assert actual.policy_optimizer.t == whole.policy_optimizer.t == 1
