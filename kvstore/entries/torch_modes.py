"""Work on tensors that must not depend on the modes that its caller has switched on in torch.

A dispatch mode (FakeTensorMode, a tracer), a function mode (`torch.device("meta")`), a transformation of functions
(`grad`, `vmap`) and autocast change what every operation of their thread does. Inside them a sound record would fail to
decode and be dropped as damaged, and an entry that moves to a lower tier would be lost. Any thread, no state.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch._C import (
    DisableTorchFunction,
    _functorch,
    _is_any_autocast_enabled,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

_P = ParamSpec("_P")
_R = TypeVar("_R")


def without_torch_modes(work: Callable[_P, _R]) -> Callable[_P, _R]:
    """The same function, run outside all modes of its caller."""

    @wraps(work)
    def alone(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        # Checked inline, not in a function: every get and put comes through here.
        if not (
            _len_torch_dispatch_stack()
            or _len_torch_function_stack()
            or _is_any_autocast_enabled()
            or _functorch.peek_interpreter_stack() is not None
        ):
            return work(*args, **kwargs)
        with ExitStack() as without:
            without.enter_context(DisableTorchFunction())
            without.enter_context(temporarily_clear_interpreter_stack())
            without.enter_context(_disable_current_modes())
            without.enter_context(torch.autocast("cpu", enabled=False))
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                without.enter_context(torch.autocast("cuda", enabled=False))
            return work(*args, **kwargs)

    return alone
