"""Ctrl-C and SIGTERM, which end a command in a sentence."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# Seconds after which what was raised in vain is raised again.
_SOON = 0.01


class Terminated(BaseException):
    """SIGTERM. Raised like Ctrl-C's, so that temporary folders are removed on the way out."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. One that Python does not know: of its own, raised while code is made from text, it
    remembers that it was raised, and ends the process by a signal after all."""


@contextmanager
def terminable() -> Iterator[None]:
    """Inside, both signals are raised; where that came to nothing, once more.

    Python prints, and forgets, what is raised while an object is finalized.
    """
    lost: list[type[BaseException]] = []
    unraisable = sys.unraisablehook

    def end(signum: int, frame: FrameType | None) -> None:
        raise Interrupted if signum == signal.SIGINT else Terminated

    def again(signum: int, frame: FrameType | None) -> None:
        raise lost[-1]

    def hook(what: "sys.UnraisableHookArgs") -> None:
        if not issubclass(what.exc_type, Interrupted | Terminated):
            return unraisable(what)
        lost.append(what.exc_type)
        signal.setitimer(signal.ITIMER_REAL, _SOON)

    handlers = {signal.SIGTERM: end}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else a parent ignores it
        handlers[signal.SIGINT] = end
    timed = hasattr(signal, "setitimer")  # Windows has no such clock
    if timed:
        handlers[signal.SIGALRM] = again
    before = {number: signal.getsignal(number) for number in handlers}
    try:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    except ValueError:  # not the main thread: signals are the caller's
        yield
        return
    if timed:
        sys.unraisablehook = hook
    try:
        yield
    finally:
        if timed:
            sys.unraisablehook = unraisable
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, earlier in before.items():
            if earlier is not None:  # one of C's own cannot be put back
                signal.signal(number, earlier)
