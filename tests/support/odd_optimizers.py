"""Minimal optimizers and callbacks that change the weights outside of optimizer steps."""

from __future__ import annotations

import torch
from transformers import TrainerCallback


def trained(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free SGD (Defazio et al., arXiv 2405.15682): p is y in training and x in evaluation, y = (1 - β)z + βx.

    Args:
        state_name: name of z in the optimizer state.
    """

    def __init__(self, params, lr=0.05, beta=0.9, state_name="z"):
        super().__init__(list(params), {"lr": lr, "beta": beta, "training": False, "steps": 0})
        self.state_name = state_name

    @torch.no_grad()
    def _move(self, group, weight):
        for parameter in group["params"]:
            if self.state_name in self.state[parameter]:
                parameter.lerp_(self.state[parameter][self.state_name], weight)

    def eval(self):
        for group in self.param_groups:
            if group["training"]:
                self._move(group, 1 - 1 / group["beta"])
            group["training"] = False

    def train(self):
        for group in self.param_groups:
            if not group["training"]:
                self._move(group, 1 - group["beta"])
            group["training"] = True

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ARG002
        for group in self.param_groups:
            assert group["training"]
            group["steps"] += 1
            self._move(group, 1 - 1 / group["beta"])  # to x
            for parameter in group["params"]:
                z = self.state[parameter].setdefault(self.state_name, parameter.clone())
                z.sub_(parameter.grad, alpha=group["lr"])
                parameter.lerp_(z, 1 / group["steps"])
            self._move(group, 1 - group["beta"])


class InBackward(torch.optim.Optimizer):
    """Steps during backward, as LOMO does; its `step()` does nothing."""

    def __init__(self, params, lr=0.02):
        super().__init__(list(params), {"lr": lr})
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(self._update)

    def _update(self, parameter):
        parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])
        parameter.grad = None

    def fused_backward(self, loss, lr):
        self.param_groups[0]["lr"] = lr
        loss.backward()

    def step(self, closure=None):
        """Do nothing: accelerate does not call LOMO's `step()`, and no hooks run here."""


class Lookahead(torch.optim.Optimizer):
    """A wrapper that mixes in slow weights after every second step. It does not run the step hooks of torch's class.

    Args:
        optimizer: the inner optimizer, which makes the steps.
    """

    def __init__(self, optimizer, alpha=0.5):
        self.optimizer, self.alpha, self.count = optimizer, alpha, 0
        self.param_groups, self.defaults = optimizer.param_groups, optimizer.defaults
        self.state = {p: {"slow_buffer": p.detach().clone()} for group in self.param_groups for p in group["params"]}

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure=None):  # noqa: ARG002
        self.optimizer.step()
        self.count += 1
        if self.count % 2 == 0:
            for parameter, state in self.state.items():
                state["slow_buffer"].lerp_(parameter, self.alpha)
                parameter.copy_(state["slow_buffer"])


class LayerWise(torch.optim.Optimizer):
    """Stub of layer-wise optimizers, which step in backward; it only has a dummy parameter."""

    def __init__(self):
        super().__init__([torch.zeros(1, 1)], {"lr": 0.1})

    def step(self, closure=None):
        """Do nothing: the steps were made in backward."""


class SwapsAtTheEnd(TrainerCallback):
    """Averages weights over the steps, and writes the averages into the model when training ends.

    Args:
        only: swap only parameters whose name contains this.
    """

    def __init__(self, only=""):
        self.only, self.sums, self.count = only, {}, 0

    def _parameters(self, model):
        return {n: p for n, p in model.named_parameters() if p.requires_grad and self.only in n}

    def on_step_end(self, *_args, model, **_kwargs):
        self.count += 1
        for name, parameter in self._parameters(model).items():
            self.sums[name] = self.sums.get(name, 0) + parameter.detach().clone()

    def on_train_end(self, *_args, model, **_kwargs):
        for name, parameter in self._parameters(model).items():
            parameter.data.copy_(self.sums[name] / self.count)
