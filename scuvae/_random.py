"""Random numbers of a call: from its own generator, in which no other call or thread has a part.

A verb sets the generator of its thread (:func:`scuvae.runtime.random_state`); everything below asks
here. On a GPU, whose recorded steps have their numbers from the device's own generator, and outside
a verb, numbers come from torch's, as ``torch.manual_seed`` has set it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_current: ContextVar[torch.Generator | None] = ContextVar("scuvae_generator", default=None)


@contextmanager
def using(generator: torch.Generator) -> Iterator[None]:
    """Inside, and in this thread alone, random numbers of the CPU come from ``generator``."""
    token = _current.set(generator)
    try:
        yield
    finally:
        _current.reset(token)


def generator_on(device: torch.device) -> torch.Generator | None:
    """What torch's functions take as ``generator`` on a device."""
    return _current.get() if device.type == "cpu" else None


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The states of all generators that a call's numbers come from, on the host."""
    own = _current.get()
    states = {"cpu": torch.get_rng_state() if own is None else own.get_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    elif device.type == "mps":
        states["mps"] = torch.mps.get_rng_state()
    return states


def set_random_state(states: dict[str, Tensor], device: torch.device) -> None:
    """Go on with the numbers that followed :func:`random_state`; of another device's, as it is."""
    own = _current.get()
    if own is None:
        torch.set_rng_state(states["cpu"])
    else:
        own.set_state(states["cpu"])
    if device.type in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
    elif device.type in states and device.type == "mps":
        torch.mps.set_rng_state(states["mps"])


def go_apart(number: int, device: torch.device) -> None:
    """Go on with other numbers than processes of another ``number``, which had the same so far."""
    own = _current.get()
    seed = int(torch.randint(2**62, (), generator=own)) + number
    if own is None:
        torch.manual_seed(seed)
    else:
        own.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def uniform_like(values: Tensor) -> Tensor:
    """U(0, 1) of the shape, dtype and device of ``values``."""
    return torch.empty_like(values).uniform_(generator=generator_on(values.device))


def normal_like(values: Tensor, shape: tuple[int, ...] = ()) -> Tensor:
    """N(0, 1) with the dtype and device of ``values``, (\\*shape, \\*values.shape)."""
    out = values.new_empty(*shape, *values.shape)
    return out.normal_(generator=generator_on(values.device))


def poisson(rate: Tensor) -> Tensor:
    """Draws of Poisson distributions."""
    return torch.poisson(rate, generator=generator_on(rate.device))


def binomial(count: Tensor, chance: Tensor) -> Tensor:
    """Draws of binomial distributions."""
    return torch.binomial(count, chance, generator=generator_on(count.device))


def gamma(shape: Tensor) -> Tensor:
    """Draws of gamma distributions of rate 1; none is zero."""
    drawn = torch._standard_gamma(shape, generator=generator_on(shape.device))
    return drawn.clamp_min(torch.finfo(drawn.dtype).tiny)


def permutation(n: int) -> Tensor:
    """A random order of n things, on the host."""
    return torch.randperm(n, generator=_current.get())


def linear(n_in: int, n_out: int, *, bias: bool = True) -> nn.Linear:
    """A linear layer with torch's own initial distribution: U(±1/√n_in)."""
    where = torch.get_default_device()  # "meta" where only its shape is asked for
    layer: nn.Linear = nn.utils.skip_init(nn.Linear, n_in, n_out, bias=bias, device=where)
    width = 1 / math.sqrt(n_in) if n_in else 0.0
    for parameter in layer.parameters():
        with torch.no_grad():
            parameter.uniform_(-width, width, generator=_current.get())
    return layer
