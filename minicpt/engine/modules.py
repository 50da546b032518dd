"""A tree of modules that other threads use too, and that anybody may change between two calls.

Three things keep a call's numbers its own: a hook that acts in the call that asked for it alone (`during_this_call`), a
copy of the tree around the same weights (`sharing_weights`), and a list of all that a result depends on (`state_of`),
by which a result that was kept is known to be stale.
"""

import copy
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as every_module
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedConfig

# module -> what it does to its arguments, in the present thread (or task) alone
_ACTIONS: ContextVar[dict[nn.Module, Callable]] = ContextVar("actions", default={})
_INSTALLING = threading.Lock()
# these libraries' hooks watch, or treat all tokens alike; any other may count positions, and must see whole rows
_TRUSTED = {"accelerate", "minicpt", "peft", "torch", "transformers"}
_CONSTANTS = {bool, float, int, str, type(None)}
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


_steps = 0


def _count_step(*_) -> None:
    global _steps
    _steps += 1


# a fused optimiser changes weights and does not count up their versions
register_optimizer_step_post_hook(_count_step)


def _act(module: nn.Module, args: tuple) -> tuple | None:
    action = _ACTIONS.get().get(module)
    return action(module, args) if action else None


@contextmanager
def during_this_call(actions: dict[nn.Module, Callable]) -> Iterator[None]:
    """Let `actions[module](module, args)` give a module's arguments (None: as they are), in this thread alone.

    The hook that looks the action up stays in the module and does nothing for anybody else: to add and remove one for
    each call is what threads that share a model trip over.
    """
    for module in actions:
        with _INSTALLING:
            if _act not in module._forward_pre_hooks.values():
                module.register_forward_pre_hook(_act)
    token = _ACTIONS.set(_ACTIONS.get() | actions)
    try:
        yield
    finally:
        _ACTIONS.reset(token)


def sharing_weights(model: nn.Module) -> nn.Module:
    """Copy the tree of modules around the very same weights: what is built into the copy does not touch `model`."""
    tensors = [*model.parameters(), *model.buffers()]
    with _INSTALLING:
        return copy.deepcopy(model, {id(x): x for x in tensors})


# model -> its configuration's values, and what was found out about it
_FOUND: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def found_once(find: Callable) -> Callable:
    """`find(model)`, without gradients, remembered until the model's configuration changes."""

    @torch.no_grad()
    def look_up(model):
        now, known = [*vars(model.config.get_text_config()).values()], _FOUND.get(model)
        if known is None or known[0] != now:
            known = _FOUND[model] = now, {}
        if find not in known[1]:
            known[1][find] = find(model)
        return known[1][find]

    return look_up


def _tree(model: nn.Module) -> list[nn.Module]:
    """The model and all modules in it, four times as fast as `modules()`; one that stands at two places twice."""
    modules = [model]
    for module in modules:  # which grow
        modules += filter(None, vars(module)["_modules"].values())
    return modules


def is_hooked(model: nn.Module) -> bool:
    """Whether a forward hook hangs in the model that is nobody's whom we know: it may need to see whole rows."""
    hooks = [*every_module._global_forward_hooks.values()]
    hooks += every_module._global_forward_pre_hooks.values()
    for module in _tree(model):
        hooks += module._forward_hooks.values()
        hooks += module._forward_pre_hooks.values()
    return any(hook.__module__.split(".")[0] not in _TRUSTED for hook in hooks)


def state_of(model: nn.Module) -> tuple[list, list]:
    """All that a model's result depends on besides its input: a list to compare by ==, and what must live as long.

    Of every module: class, `forward`, weights and buffers (which tensor, which memory, which version), and plain
    attributes with all that stands in their lists, dictionaries and configurations; any step of any optimiser counts as
    a change. No two states are equal if a module is in training mode, for it may draw random numbers, or if a weight
    counts no versions (inference mode).
    Not seen are what goes behind torch's back (`weight.data.mul_(2)`), and what a function of one's own reads.
    """
    things, counts, tensors, others = [], [_steps], [], []
    for module in _tree(model):
        own = vars(module)
        things += [weakref.ref(module), type(module), type(module).forward]
        for name, value in own.items():
            if name not in _OF_EVERY_MODULE:
                (things if type(value) in _CONSTANTS else others).append(value)
        tensors += [*own["_parameters"].values(), *own["_buffers"].values()]
        if module.training:
            counts.append(object())
    configs = set()
    for value in others:  # which grow by what stands in them
        parts = []
        if isinstance(value, dict):
            parts = [*value, *value.values()]
        elif isinstance(value, (list, tuple, set)):
            parts = [*value]
        elif isinstance(value, PreTrainedConfig) and id(value) not in configs:
            configs.add(id(value))
            parts = [vars(value)]
        elif isinstance(value, Tensor):
            tensors.append(value)
            continue
        counts.append(len(parts))
        for part in parts:
            (things if type(part) in _CONSTANTS else others).append(part)
        things.append(weakref.ref(value) if isinstance(value, nn.Module) else value)
    for tensor in tensors:
        if tensor is not None:
            things.append(weakref.ref(tensor))
            # as long as the reference to a storage lives, its address is given to no other
            counts.append(StorageWeakRef(tensor.untyped_storage()))
            counts.append(object() if tensor.is_inference() else tensor._version)
    return [*map(id, things), *counts], things
